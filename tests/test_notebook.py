"""The notebook of docs/, run from top to bottom on a tiny run."""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from lattejax.training.interrupt import InterruptGuard
from lattejax.training.stages import train
from tests.helpers import NO_SCORES, ROOT, tiny_config

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def figures(notebook: nbformat.NotebookNode) -> list[int]:
    """Which of the cells show a picture."""
    outputs = {i: cell.get("outputs", []) for i, cell in enumerate(notebook.cells)}
    return [i for i, shown in outputs.items() if any("image/png" in one.get("data", {}) for one in shown)]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_the_figures_that_it_is_stored_with(tmp_path, monkeypatch):
    train(tiny_config(**NO_SCORES), tmp_path / "run", InterruptGuard())
    monkeypatch.setenv("LATTEJAX_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = figures(notebook)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    here = tmp_path / "docs"
    here.mkdir()
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(here)}})
    client.execute()  # raises where a cell does
    assert figures(notebook) == stored and len(stored) == 4


def test_what_is_stored_is_whole_small_and_of_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 250_000 and not re.search(r"/(root|home|tmp|Users|usr|opt)/", text)
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(one.output_type == "error" or one.get("name") == "stderr" for cell in cells for one in cell.outputs)
