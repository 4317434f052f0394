"""Show a figure with a description for whoever cannot see it."""

from typing import Any


def show(figure: Any, alt: str, label: str = "") -> None:
    """Display a matplotlib `figure` once: `label` above its titles, `alt` in the output's metadata.

    The site and nbconvert's classic template make the image's alternative text of it.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    if label:  # above all axes, so that no picture travels without it
        figure.suptitle(label, fontsize=8, color="#555555")
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)  # or the inline backend would show it a second time, without the text
