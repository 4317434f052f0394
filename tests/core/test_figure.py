"""A figure in an executed cell: once, with its alternative text, under the run's label."""

import nbformat
from nbclient import NotebookClient

CELL = """
import matplotlib.pyplot as plt
from atlas_lib import notebooks
figure, axes = plt.subplots()
notebooks.show_figure(figure, "a line that rises", "not a result")
figure.get_suptitle()
"""


def test_a_figure_is_shown_once_with_its_text_and_label():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, kernel_name="python3").execute()
    [shown, title] = notebook.cells[0].outputs
    assert shown.metadata["image/png"] == {"alt": "a line that rises"}
    assert title.data["text/plain"] == "'not a result'"
