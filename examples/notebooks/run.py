"""Runs the notebooks and keeps their outputs, without progress bars: python examples/notebooks/run.py [NAME ...]."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
    """Run one notebook in its folder, and write it with what it shows."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        cell.execution_count = number + 1
        cell.metadata.pop("execution", None)  # times, which change in every run
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number + 1
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    text = nbformat.writes(notebook).replace(f"{ROOT}/", "")  # plans name their model's path
    path.write_text(text + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        run(FOLDER / f"{name}.ipynb")
