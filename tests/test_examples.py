"""The notebook in examples/, run from the first cell to the last."""

from __future__ import annotations

import os

import pytest

from tests.helpers import ROOT

NOTEBOOK = ROOT / "examples" / "ldm2.ipynb"


def pages(cell) -> list[str]:
    """The HTML that a cell shows."""
    return [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]


def test_the_notebook_runs_and_shows_players(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells)               # none are committed
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [pages(cell) for cell in book.cells if cell.cell_type == "code"]
    players = sum(page.count("<audio") for outputs in shown for page in outputs)
    assert players >= 7 and sum(page.count("image/png") for outputs in shown for page in outputs) >= 7
    assert [path.name for path in tmp_path.rglob("*.flac")] == ["sweep.flac"]
    printed = "".join(output.text for cell in book.cells for output in cell.get("outputs", ()) if "text" in output)
    assert "5 of 20" in printed
