"""The requirement files hold one complete and consistent set each, and imports flow one way."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flm_torchrec
import launch
from flm_torchrec._versions import _version
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SET = "gpu.txt" if _version("fbgemm-gpu") else "cpu.txt"
"""The set that this environment was made from."""
BESIDE_PYPROJECT = ("torch", "torchrec", "torchmetrics", "fbgemm-gpu", "fbgemm-gpu-cpu")
"""Imported, but not declared in pyproject.toml, which says why."""


def pins(*names: str) -> dict[str, str]:
    """The packages that requirement files pin, by canonical name."""
    lines = [line for name in names for line in (ROOT / "requirements" / name).read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in wanted), wanted
    return {canonicalize_name(k): v for k, v in (line.split("==") for line in wanted)}


def declared(requirement: Requirement) -> Iterator[Requirement]:
    """What an installed package says that it needs here, with the extras that the requirement names."""
    for line in metadata.requires(requirement.name) or []:
        needed = Requirement(line)
        if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
            yield needed


def reached(lines: Iterable[str]) -> set[str]:
    """The packages that these requirements bring, with all that they need in turn."""
    seen: set[str] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        wanted = waiting.pop()
        if str(wanted) not in seen and _version(wanted.name):
            seen.add(str(wanted))
            waiting.extend(declared(wanted))
    return {canonicalize_name(Requirement(line).name) for line in seen}


def unmet(packages: Iterable[str], available: dict[str, str]) -> list[str]:
    """What installed packages declare that the available pins do not satisfy."""
    found = []
    for package in packages:
        for needed in declared(Requirement(package)):
            pinned = available.get(canonicalize_name(needed.name))
            if pinned is None or not needed.specifier.contains(pinned, prereleases=True):
                found.append(f"{package} needs {needed}, pinned: {pinned or 'no'}")
    return found


def test_every_package_of_the_base_set_finds_what_it_declares() -> None:
    """All is installed with --no-deps, so nothing else would notice what is missing."""
    base = pins("base.txt", SET)
    assert {name: (_version(name) or "").split("+")[0] for name in base} == base
    exception = [f"torchrec needs fbgemm-gpu, pinned: {base.get('fbgemm-gpu', 'no')}"] if SET == "cpu.txt" else []
    assert unmet(base, base) == exception


def test_every_package_of_the_extras_finds_what_it_declares() -> None:
    extras = pins("extras.txt", "docs.txt")
    missing = [name for name in extras if not _version(name)]
    if missing:
        pytest.skip(f"the extras are not installed: {missing[0]}")
    base = pins("base.txt", SET)
    assert not set(base) & set(extras)
    assert {name: _version(name) for name in extras} == extras
    assert unmet(extras, base | extras) == []
    optional = PROJECT["optional-dependencies"]
    assert set(extras) <= reached(line for lines in optional.values() for line in lines)


def test_the_documentation_needs_its_own_packages_alone() -> None:
    """Whoever has the base set builds the site with requirements/docs.txt, without the extras."""
    docs, base = pins("docs.txt"), pins("base.txt", SET)
    if missing := [name for name in docs if not _version(name)]:
        pytest.skip(f"make docs has not been called: {missing[0]}")
    assert unmet(docs, base | docs) == []
    wanted = PROJECT["optional-dependencies"]["docs"]
    assert set(docs) <= reached(line for line in wanted if line.startswith("mk"))


def test_a_missing_and_a_wrong_version_are_found() -> None:
    base = pins("base.txt", SET)
    without = {name: version for name, version in base.items() if name not in ("opentelemetry-api", "pillow")}
    assert any(line.startswith("fastapi needs opentelemetry-api") for line in unmet(["fastapi"], without))
    assert any(line.startswith("matplotlib needs pillow") for line in unmet(["matplotlib"], without))
    assert any(line.endswith("pinned: 0.0.1") for line in unmet(["fastapi"], base | {"starlette": "0.0.1"}))


def test_the_base_set_holds_nothing_needless() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"], *BESIDE_PYPROJECT]
    assert set(pins("base.txt", SET)) - reached(wanted) == set()


def test_pyproject_declares_what_the_package_imports() -> None:
    """The base set satisfies it too; each optional part is declared under its extra."""
    of_module = metadata.packages_distributions()
    files = [*Path(flm_torchrec.__path__[0]).rglob("*.py"), *Path(launch.__path__[0]).rglob("*.py")]
    modules = {name for file in files for name in _imported(file)} - set(sys.stdlib_module_names)
    base = [Requirement(line) for line in PROJECT["dependencies"]]
    optional = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
    names = {canonicalize_name(r.name) for r in base}
    # Several packages may share a module's first name; one that is declared comes first.
    owners = [
        sorted({canonicalize_name(n) for n in of_module[m]}, key=lambda n: n not in names)
        for m in modules & set(of_module)
    ]
    imported = {found[0] for found in owners} - {"flm-torchrec"}
    assert imported - names - {canonicalize_name(r.name) for r in optional} - set(BESIDE_PYPROJECT) == set()
    assert names - imported == {"tensorboard"}  # torch.utils.tensorboard imports it
    available = pins("base.txt", SET)
    assert [str(r) for r in base if not r.specifier.contains(available[canonicalize_name(r.name)])] == []


def _imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return plain | {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}


def test_every_module_can_be_imported_without_the_extras() -> None:
    """But for the vector stores, which `flm load` imports when one is named, and the kernels that a GPU takes."""
    apart = re.compile(r"__main__$|\.export\.stores\.|\.attention_kernels$")
    for package in (flm_torchrec, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not apart.search(module.name):
                importlib.import_module(module.name)


@pytest.mark.parametrize(("kind", "file"), [("cpu", "cpu.txt"), ("gpu", "gpu.txt")])
def test_the_extras_of_a_wheel_are_the_pinned_sets(kind: str, file: str) -> None:
    """And have all that torchrec declares, but for the CUDA build of fbgemm where it does not belong."""
    lines = [Requirement(line) for line in PROJECT["optional-dependencies"][kind]]
    pinned = pins("base.txt", file)
    assert [str(r) for r in lines if not r.specifier.contains(pinned[canonicalize_name(r.name)])] == []
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    there = {canonicalize_name(r.name) for r in lines} | base
    needed = {canonicalize_name(r.name) for r in declared(Requirement("torchrec"))} if kind == "cpu" else {"torchrec"}
    assert needed - there == ({"fbgemm-gpu"} if kind == "cpu" else set())
    assert {name for name in pins(file) if name != "torchrec"} <= there


@pytest.mark.parametrize(
    ("file", "build"),
    [("cpu.txt", "fbgemm-gpu-cpu"), ("gpu.txt", "fbgemm-gpu"), ("gpu-torch-2.11.txt", "fbgemm-gpu")],
)
def test_a_set_has_one_build_of_fbgemm_that_fits_torch(file: str, build: str) -> None:
    found = pins("base.txt", file)
    assert [p for p in found if p.startswith("fbgemm")] == [build]
    minor = int(found[build].split(".")[1])
    assert (found["torch"].split(".")[1], found["torchrec"].split(".")[1]) == (str(minor + 5), str(minor))


STAGES = (
    "config", "data", "prepare", "inspection", "model", "distributed", "planner", "evaluation", "training", "export",
    "serve", "privacy", "report", "tuning", "api", "cli",
)  # fmt: skip
MAY_IMPORT = {
    "config": set(),
    "data": {"config"},
    "prepare": {"config", "data"},
    "inspection": {"data", "prepare"},
    "model": {"config", "data"},
    "distributed": {"config"},
    "planner": {"config", "distributed"},
    "evaluation": {"config", "data"},
    "training": {"config", "data", "prepare", "model", "distributed", "planner", "evaluation"},
    "export": {"config", "data", "model", "evaluation"},
    "serve": {"config", "data", "export"},
    "privacy": {"config", "data", "training", "export", "serve"},
    "report": {"config", "data", "evaluation", "export"},
    "tuning": {"config"},
    "api": set(STAGES) - {"api", "cli"},
    "cli": set(STAGES) - {"cli"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_imports_flow_one_way(stage: str) -> None:
    """Every package uses those that `MAY_IMPORT` names, inside functions too."""
    for file in sorted((ROOT / "flm_torchrec" / stage).rglob("*.py")):
        allowed = MAY_IMPORT[stage] | {stage}
        assert _stages_imported(file) <= allowed, file


def _stages_imported(file: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
    parts = [(n.module or "").split(".") for n in nodes]
    return {p[1] for p in parts if p[0] == "flm_torchrec" and len(p) > 1 and p[1] in STAGES}
