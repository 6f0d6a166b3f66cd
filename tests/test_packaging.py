"""The requirement files hold one consistent set each, and imports flow one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT


def pins(name: str) -> dict[str, str]:
    lines = [line for f in ("base.txt", name) for line in (ROOT / "requirements" / f).read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in wanted), wanted
    return {k.lower().replace("_", "-"): v for k, v in (line.split("==") for line in wanted)}


@pytest.mark.parametrize(("file", "build"), [("cpu.txt", "fbgemm-gpu-cpu"), ("gpu.txt", "fbgemm-gpu")])
def test_a_set_has_one_build_of_fbgemm_that_fits_torch(file: str, build: str) -> None:
    found = pins(file)
    assert [p for p in found if p.startswith("fbgemm")] == [build]
    minor = int(found[build].split(".")[1])
    assert (found["torch"].split(".")[1], found["torchrec"].split(".")[1]) == (str(minor + 5), str(minor))


STAGES = ("config", "data", "model", "distributed", "training", "evaluation", "export", "serve", "report")
MAY_IMPORT = {
    "config": set(),
    "data": {"config"},
    "model": {"config", "data"},
    "distributed": {"config"},
    "training": {"config", "data", "model", "distributed", "evaluation"},
    "evaluation": {"config", "data"},
    "export": {"config", "data", "evaluation"},
    "serve": {"config", "data", "export"},
    "report": {"config", "data", "evaluation", "export"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_imports_flow_one_way(stage: str) -> None:
    """Only the command of a stage may reach to a run that training left."""
    for file in sorted((ROOT / "flm_torchrec" / stage).rglob("*.py")):
        allowed = MAY_IMPORT[stage] | {stage} | ({"training"} if file.name == "command.py" else set())
        assert _stages_imported(file) <= allowed, file


def _stages_imported(file: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
    parts = [(n.module or "").split(".") for n in nodes]
    return {p[1] for p in parts if p[0] == "flm_torchrec" and len(p) > 1 and p[1] in STAGES}
