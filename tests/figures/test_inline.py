"""A notebook shows each picture once, however often it is run, and the reader's own as before."""

from __future__ import annotations

import nbformat
from nbclient import NotebookClient

CELLS = [
    "import numpy as np, pandas as pd",
    # Of the package: the value of a cell.
    "from repeatlab.figures import repeats_over_time, picture_grid\n"
    "rows = {'fresh_batch': [0, 1], 'repeat': [0, 0], 'repeats': [2, 1], 'loss': [2.0, 1.0]}\n"
    "repeats_over_time(pd.DataFrame(rows))",
    "picture_grid({'seen': np.zeros((3, 4, 4), np.uint8)})",
    # The first that pyplot draws, so that it chooses its backend in the package's style.
    "from repeatlab.figures import style\nimport matplotlib.pyplot as plt\n"
    "with style():\n    _ = plt.subplots(figsize=(1, 1))",
    "plt.plot([1, 2, 3]);",
    "plt.rcParams['font.size']",
]
PICTURES = [0, 1, 1, 1, 1, 0]


def shown(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_a_notebook_that_is_run_twice_in_one_kernel_shows_its_pictures_twice():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")
    with client.setup_kernel():
        for _ in range(2):
            for place, cell in enumerate(notebook.cells):
                client.execute_cell(cell, place)
            assert [shown(cell) for cell in notebook.cells] == PICTURES
            assert notebook.cells[-1].outputs[0]["data"]["text/plain"] == "10.0"
