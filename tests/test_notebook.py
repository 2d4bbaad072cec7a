"""The notebook runs from its first cell to its last, in an empty folder."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("MPLBACKEND")  # the kernel shows pictures in its own way
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "commit it without outputs"
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert any("image/png" in output.data for output in shown), "the curves"
    assert any("trace.html" in output.data.get("text/html", "") for output in shown), "the trace"
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "[5, 6, 7, 8, 9, 10, 11, 12, 13]" in text, "what the trained model fills in"
    assert (tmp_path / "trace.html").stat().st_size > 0
