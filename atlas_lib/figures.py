"""Show a figure with a description for whoever cannot see it."""

from typing import Any


def show(figure: Any, alt: str, label: str = "") -> None:
    """Display a matplotlib `figure` once: `label` above its titles, `alt` in the output's metadata.

    Screen readers, the site and nbconvert take the alternative text from there.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    if label:  # above all axes, so that no picture travels without it
        figure.suptitle(label, fontsize=8, color="#555555")
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)  # or the inline backend would show it a second time, without the text
