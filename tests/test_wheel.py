"""A wheel holds what the commands need, and runs where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_packaging import PROJECT, pins


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python, outside the repository."""
    command = [sys.executable, *map(str, arguments)]
    given = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd="/", env=given, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel that was built of a copy of the sources and installed without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("flm_torchrec", "launch", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"import os; os.chdir('{source}'); from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = run("-c", build)
    # setuptools announces in warnings what it will refuse later.
    assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr, done.stderr
    options = ("--no-deps", "--no-index", "--no-compile", "--target", target)
    done = run("-m", "pip", "install", "-qq", *options, *(source / "dist").glob("*.whl"))
    assert done.returncode == 0, done.stderr
    return target


def test_a_wheel_holds_all_that_the_commands_need(installed: Path) -> None:
    for folder, place in (("flm_torchrec", ""), ("launch", ""), ("configs", "share/flm_torchrec")):
        files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        wanted = [path for path in files if "__pycache__" not in path.parts]
        assert len(wanted) > 2 and [path for path in wanted if not (installed / place / path).is_file()] == []
    lines = next(installed.glob("*.dist-info/METADATA")).read_text().splitlines()
    assert "License-Expression: BSD-3-Clause" in lines and "License-File: LICENSE" in lines


def test_a_wheel_runs_where_it_is_installed(installed: Path) -> None:
    shown = run(installed / "bin" / "flm", "--help", PYTHONPATH=str(installed))
    assert shown.returncode == 0 and "prepare" in shown.stdout, shown.stderr
    code = "import flm_torchrec as flm; from flm_torchrec._versions import mend; print(flm.__file__, flm.__version__)"
    told = run("-c", f"{code}; print(mend(False)); print(mend(True))", PYTHONPATH=str(installed)).stdout.splitlines()
    assert told[0] == f"{installed}/flm_torchrec/__init__.py {PROJECT['version']}"
    torchrec = pins("cpu.txt")["torchrec"]  # no file of requirements is there
    assert told[1:] == [
        f"pip install 'flm_torchrec[cpu]' && pip install --no-deps torchrec=={torchrec}",
        "pip install 'flm_torchrec[gpu]'",
    ]
