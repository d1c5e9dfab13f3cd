"""The notebook runs from top to bottom, offline, and its pictures come out."""

from __future__ import annotations

import base64
import io
import warnings

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

from cli.settings import PROJECT

FILE = PROJECT / "visualization.ipynb"


def run(notebook: NotebookNode) -> None:
    """Execute every cell in a fresh kernel, from the project's folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kernel's manager warns about its own parts
        NotebookClient(
            notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(PROJECT)}}
        ).execute()


def check_pictures(notebook: NotebookNode) -> int:
    """Every cell tagged `picture` has one that is not of one colour; how many there are."""
    tagged = [cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", [])]
    for cell in tagged:
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        assert pictures, f"no picture from: {cell.source}"
        for picture in pictures:
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))
            assert min(pixels.shape[:2]) > 100
            assert pixels.std() > 1
    return len(tagged)


def test_the_notebook_runs_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # else the part for a network tries for half a minute
    notebook = nbformat.read(FILE, as_version=4)
    assert check_pictures(notebook) == 7, "committed with its outputs"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    run(notebook)
    assert check_pictures(notebook) == 7


def test_a_failing_cell_and_a_missing_picture_are_noticed() -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("1 / 0")]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(notebook)
    notebook.cells = [nbformat.v4.new_code_cell("print('no picture')", metadata={"tags": ["picture"]})]
    with pytest.raises(AssertionError, match="no picture from"):
        check_pictures(notebook)
