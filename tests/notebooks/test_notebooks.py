import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NAMES = ("01_quick_start", "02_surviving_spikes")
BYTES = 600_000
PROGRAM_SECONDS = 240


def environment():
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "PYTHONPATH": path}


def stored(name):
    return nbformat.read(str(FOLDER / f"{name}.ipynb"), as_version=4)


def texts(notebook):
    """Everything that the outputs of a notebook say; pictures are left out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield output.get("data", {}).get("text/plain", "")
            yield "\n".join(output.get("traceback", []))


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_every_notebook_is_listed_here_and_in_the_readme():
    found = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert found == {path.stem for path in FOLDER.glob("[0-9]*.py")} == set(NAMES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_both_files_of_a_pair_have_the_same_cells(name):
    source = jupytext.read(str(FOLDER / f"{name}.py"))
    notebook = stored(name)
    cells = [[(cell.cell_type, cell.source) for cell in n.cells] for n in (source, notebook)]
    assert cells[0] == cells[1], f"run: python notebooks/execute.py {name}"
    assert notebook.metadata.kernelspec.name == source.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_outputs_are_those_of_one_clean_run(name):
    notebook = stored(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    speaking = [cell for cell in code if re.search(r"\b(print|plt\.show)\(", cell.source)]
    assert len(speaking) >= 4
    # Cells that only define functions have no output; a call stands at the margin, or in a loop.
    for cell in speaking:
        if re.search(r"^(print|plt\.show)\(", cell.source, re.MULTILINE):
            assert cell.outputs, cell.source
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds == {"stream", "display_data"}
    assert {o.name for cell in code for o in cell.outputs if o.output_type == "stream"} == {
        "stdout"
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_outputs_name_no_place_and_no_trouble(name):
    trouble = r"Traceback|Warning|\bERROR\b|\bnan\b|0x[0-9a-f]{6,}|/(home|root|tmp|work|Users)/"
    for text in texts(stored(name)):
        assert not re.search(trouble, text), text


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_differs_from_run_to_run_is_stored(name):
    notebook = stored(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < BYTES
    assert set(notebook.metadata) == {"jupytext", "kernelspec", "language_info"}
    assert "version" not in notebook.metadata.language_info
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"lines_to_next_cell"}  # jupytext's, for the .py
        assert not any(output.get("metadata") for output in cell.get("outputs", []))


@pytest.mark.parametrize("name", NAMES)
def test_the_source_runs_as_a_program_and_prints_what_is_stored(name):
    done = subprocess.run(
        [sys.executable, f"notebooks/{name}.py"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = [
        o.text for cell in stored(name).cells for o in cell.get("outputs", []) if "text" in o
    ]
    # The numbers depend on the machine in their last digits; the words do not.
    words = [re.sub(r"[\d.e+-]+", "#", text) for text in (done.stdout, "".join(printed))]
    assert re.sub(r"\s+", " ", words[0]) == re.sub(r"\s+", " ", words[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs_in_a_kernel(name, monkeypatch):
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("MPLBACKEND")  # the kernel has its own
    before, notebook = stored(name), stored(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        timeout=PROGRAM_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    assert len(pictures(notebook)) == len(pictures(before)) >= 2
