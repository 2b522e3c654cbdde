"""Runs the notebooks and stores what they print and draw.

    python notebooks/execute.py              # all of them
    python notebooks/execute.py 01           # those whose name starts with 01

The ``.py`` file of a pair is the source and is only read; its ``.ipynb`` is written anew, without
the metadata that differs from run to run, so that running again changes little.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 600  # seconds a cell


def sources(prefixes: list[str]) -> list[Path]:
    """The ``.py`` files of the pairs whose names start with one of the prefixes; none: all."""
    found = sorted(FOLDER.glob("[0-9]*.py"))
    return [path for path in found if not prefixes or path.name.startswith(tuple(prefixes))]


def read(source: Path) -> nbformat.NotebookNode:
    """A pair's ``.py`` file as a notebook; cells are named after what they hold."""
    notebook = jupytext.read(source)
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        text = f"{cell.cell_type}\n{cell.source}"
        seen[text] = seen.get(text, 0) + 1
        cell["id"] = hashlib.sha256(f"{text}\n{seen[text]}".encode()).hexdigest()[:8]
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs all cells on the CPU, in the notebooks' folder; raises on the first error."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    root = str(FOLDER.parent)  # optimkit need not be installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    return client.execute()


def strip(notebook: nbformat.NotebookNode) -> None:
    """Removes what changes from run to run: times, the Python version, output metadata."""
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.metadata.get("jupytext", {}).pop("text_representation", None)  # as jupytext does
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell["outputs"] = joined(cell.outputs)


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without metadata; what a cell prints arrives in pieces that depend on the timing."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "metadata" in output:
            output["metadata"] = {}
        last = kept[-1] if kept else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            kept.append(output)
    return kept


def main() -> None:
    """Executes and writes every chosen notebook."""
    chosen = sources(sys.argv[1:])
    if not chosen:
        sys.exit(f"no notebook starts with {' or '.join(sys.argv[1:])}")
    for source in chosen:
        start = time.perf_counter()
        notebook = execute(read(source))
        strip(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.stem}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
