"""Run the notebooks, each in an empty folder; one kernel runs them all, since importing PyTorch takes seconds.

python tools/notebooks.py                   # all of notebooks/; exits 1 at the first cell that fails
python tools/notebooks.py --write           # and store what they print
python tools/notebooks.py quick-start --plain    # the code alone, in this process: needs no Jupyter
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LONGEST = 300
"""Seconds for one cell."""
FORGET = "import os\nos.chdir({folder!r})\n%reset -f"
"""What is run between two notebooks, so that nothing of the one before is left."""
SECONDS = re.compile(r"\b\d+(\.\d+)? s\b")
"""Times, which differ from run to run, and are not stored."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def kernel() -> Iterator[Any]:
    """A running kernel's manager."""
    from jupyter_client.manager import KernelManager

    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    manager = KernelManager(kernel_name="python3", transport="ipc")
    manager.start_kernel(env=environment)
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def execute(path: Path, manager: Any, folder: Path) -> Any:
    """The notebook with the outputs of its cells.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    between = nbformat.v4.new_code_cell(FORGET.format(folder=str(folder)))
    notebook.cells.insert(0, between)
    NotebookClient(notebook, km=manager, timeout=LONGEST).execute(cleanup_kc=False)
    del notebook.cells[0]
    return notebook


def write(path: Path, notebook: Any, folder: str) -> None:
    """Store a notebook with its texts; no pictures, no counts of executions, no name of the folder it ran in."""
    content = json.loads(path.read_text())
    for cell, done in zip(content["cells"], notebook.cells, strict=True):
        if cell["cell_type"] == "code":
            printed = SECONDS.sub("… s", text_of(done["outputs"])).replace(f"{folder}/", "")
            lines = printed.splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def text_of(outputs: list[Any]) -> str:
    """What a cell has printed, and what rich has shown, without its colours."""
    shown = "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    return COLOURS.sub("", shown)


def code_of(path: Path) -> str:
    """The cells of a notebook as one script."""
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def main() -> int:
    """Run what was named; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in FOLDER.glob("*.ipynb")))
    parser.add_argument("--write", action="store_true", help="store what the notebooks print")
    parser.add_argument("--plain", action="store_true", help="run the code in this process, without Jupyter")
    args = parser.parse_args()
    paths = [FOLDER / f"{name}.ipynb" for name in args.names]
    if args.plain:
        for path in paths:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                exec(compile(code_of(path), str(path), "exec"), {"__name__": "__main__"})
        return 0
    with kernel() as manager:
        for path in paths:
            with tempfile.TemporaryDirectory() as folder:
                done = execute(path, manager, Path(folder))
            if args.write:
                write(path, done, folder)
            print(f"done  {path.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
