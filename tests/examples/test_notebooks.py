"""The notebooks run as they stand, on the embedded model; they are kept with their outputs."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install 'flash_moe_mlx[dev]'")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'flash_moe_mlx[plot]'")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

# (texts that a run must print, tables and pictures that it must show)
SHOWN = {
    "quickstart": (["42", "tok/s, hit rate"], 2, 0),
    "where_the_time_goes": (["lfu ", "belady"], 1, 3),
    "choose_a_memory_limit": (["experts stay in memory", "42"], 1, 2),
    "expert_heat": (["42", "Paris", "redrawn: True"], 0, 1),
}

# Code that is run after a notebook's own, as its reader would use it.
USE = {
    "expert_heat": "before = picture.value\nslider.value += 20\nprint('redrawn:', picture.value != before)",
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    if path.stem in USE:
        pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install 'flash_moe_mlx[notebook]'")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(USE[path.stem])] if path.stem in USE else []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    texts, tables, pictures = SHOWN[path.stem]
    assert [text for text in texts if text not in printed] == []
    assert sum("<table>" in data.get("text/html", "") for data in shown) == tables
    assert sum("image/png" in data for data in shown) == pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_what_it_shows(path: Path):
    """Run by examples/notebooks/run.py: pictures and tables can be seen on the hub; no warnings, no progress bars."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    _, tables, pictures = SHOWN[path.stem]
    assert sum("<table>" in data.get("text/html", "") for data in shown) == tables
    assert sum("image/png" in data for data in shown) == pictures


def test_all_notebooks_are_known():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)
