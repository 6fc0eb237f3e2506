"""The notebooks run from a clean kernel, and are committed with what they print and draw."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import ppo_jax.algorithm

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow
def test_runs_from_a_clean_kernel(path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # else figures would not reach the notebook
    imported_from = Path(ppo_jax.algorithm.__file__).parents[2]  # the kernel tests the same code
    monkeypatch.setenv("PYTHONPATH", str(imported_from), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises on the first error, a failed assertion included
    assert count_figures(notebook) == count_figures(nbformat.read(path, as_version=4))


def test_is_committed_whole(path):
    """Executed top to bottom, with figures, without complaints, small, and tied to no machine."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert count_figures(notebook) >= 2
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 500_000
    text = "\n".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?:^|[\s'\"(])(?:/[\w.-]+){2,}|[A-Z]:\\", text)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def count_figures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)
