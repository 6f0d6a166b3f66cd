"""The notebooks run from their first cell to their last, and are stored small."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tools.notebooks import code_of, execute, kernel, text_of

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLAIN = ("quick-start",)
"""Run by tools/check_readme.py, in an environment without Jupyter."""
NEEDS = {"vector-database": "qdrant_client"}
"""By notebook, an optional part that it uses."""


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    pytest.importorskip("ipykernel", reason="no Jupyter: make extras")
    pytest.importorskip("nbclient", reason="no Jupyter: make extras")
    with kernel() as manager:
        yield manager


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem not in PLAIN], ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, running: Any, tmp_path: Path) -> None:
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem], reason="make extras")
    done = execute(path, running, tmp_path)
    assert [text_of(cell["outputs"]) for cell in done.cells if cell["cell_type"] == "code"][-2:] != ["", ""]


def test_a_cell_that_fails_is_an_error(running: Any, tmp_path: Path) -> None:
    path = tmp_path / "wrong.ipynb"
    content = json.loads(NOTEBOOKS[0].read_text())
    code = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    path.write_text(json.dumps(content | {"cells": [code | {"source": ["assert 1 == 2, 'as it should be'"]}]}))
    with pytest.raises(Exception, match="as it should be"):
        execute(path, running, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_small_and_its_links_lead_to_pages(path: Path) -> None:
    content = json.loads(path.read_text())
    assert path.stat().st_size < 40_000
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", ())]
    assert {output["output_type"] for output in outputs} <= {"stream"}, "no pictures, no errors"
    assert str(ROOT.parent) not in path.read_text() and "/tmp/" not in path.read_text()
    texts = "\n".join("".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", texts)
    assert [link for link in links if not (path.parent / link).exists()] == []
    compile(code_of(path), str(path), "exec")
