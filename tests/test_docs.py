"""What README and docs/ name is there: files, links, options of commands, settings."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flm_torchrec.cli.main import _parser
from flm_torchrec.config.load import sections
from tests.conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("flm_torchrec", "tools", "tests", "launch", "configs", "requirements", "docs")
FORMER = (
    "configs/studies/objectives.yaml",
    "flm_torchrec/export/stores/duckdb.py",
    "flm_torchrec/prepare/sources/movielens_1m.py",
)
"""Named, and rightly not there: of an older commit, or made by a recipe of docs/extending.md."""
RECIPES = ("--loss.basket", "loss.basket", "distributed.whole_below", "loss.agreement")
"""Settings that only the recipes of docs/extending.md add."""
OTHER_PROGRAMS = {
    "buildah": ("--isolation", "--layers", "--build-arg", "--target"),
    "debootstrap": ("--variant", "--include"),
    "docker": ("--target", "--build-arg", "--rm", "--gpus"),
    "kubectl": ("--from-literal",),
    "pip": ("--no-deps", "--wheel-dir", "--extra-index-url"),
    "tensorboard": ("--logdir",),
    "torchrun": ("--max_restarts", "--nproc_per_node", "--nnodes"),
    "torchx": ("--dryrun", "--image", "--env", "--nodes", "--gpu", "--rdzv_port"),
}
"""Options of programs that are not ours."""


def inline(text: str) -> Iterator[str]:
    """The spans of code in the prose of a page."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def commands(text: str) -> Iterator[str]:
    """The commands of a page, in blocks and in prose, each in one line and without its comment."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for command in (*lines, *inline(text)):
        yield from re.split(r"\s(?:&&|\||;)\s", re.sub(r"\s#\s.*", "", command))


@cache
def options_of() -> dict[str, set[str]]:
    """By subcommand, its options."""
    parser = _parser()[0]
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {name: {o for a in sub._actions for o in a.option_strings} for name, sub in action.choices.items()}


@cache
def options_of_tools() -> set[str]:
    """Options that a tool, the launcher or a test job declares."""
    files = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    return {option for file in files for option in re.findall(r"--[a-z][a-z0-9-]*", file.read_text())}


def missing_files(text: str) -> list[str]:
    """Paths of the repository, or of modules of the package, that a text names and that are not there."""
    of_root = re.findall(rf"(?<![\w/.-])((?:{'|'.join(SOURCES)})/[\w*./-]*[\w*])", text)
    modules = re.findall(r"(?<![\w/.-])(?!torchrec/)((?:[a-z_]+/)+[a-z_0-9]+\.py)\b", text)
    places = {name: [ROOT] for name in of_root} | {n: [ROOT, ROOT / "flm_torchrec"] for n in modules}
    return [n for n, roots in places.items() if n not in FORMER and not any(any(r.glob(n)) for r in roots)]


def unknown_options(text: str) -> list[str]:
    """Options in a text that the command before them does not have, or that nothing here has."""
    anywhere = set().union(*options_of().values(), options_of_tools(), *OTHER_PROGRAMS.values(), RECIPES)
    found = []
    for command in commands(text):
        named = re.search(r"\b(?:flm|-m flm_torchrec(?: --)?) ([a-z-]+)", command)
        known = options_of().get(named[1], set()) if named else anywhere
        after = command[named.end() :] if named else command
        for option in re.findall(r"(?<![\w-])(--[a-z][\w.-]*)", after):
            if option.rstrip(".") not in known:
                found.append(f"{named[0] if named else ''} {option}".strip())
    return found


def names(section: Any) -> list[str]:
    """Fields of a section of the config."""
    return [field.name for field in dataclasses.fields(section)]


def unknown_settings(text: str) -> list[str]:
    """Names `section.field` in a text that are no settings."""
    known = {f"{name}.{field}" for name, section in sections().items() for field in names(section)}
    given = re.findall(rf"(?<![\w/.-])(?:--)?((?:{'|'.join(sections())})\.[a-z_]+)\b(?![/(.])", " ".join(inline(text)))
    return [name for name in given if name not in known and name not in RECIPES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert missing_files(text) == []
    assert unknown_options(text) == []
    assert unknown_settings(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_what_is_not_there_is_found() -> None:
    text = "See `tools/none.py`, `model/nothing.py`, `docs/index.md`, `flm train --batch`, `--no-such`, `train.sed`.\n"
    text += "```sh\nflm prepare --source csv \\\n    --colums user=u    # --unknown in a comment\n```\n"
    assert missing_files(text) == ["tools/none.py", "model/nothing.py"]
    assert unknown_options(text) == ["flm prepare --colums", "flm train --batch", "--no-such"]
    assert unknown_settings(text) == ["train.sed"]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert [name for name in pages if name != "index.md" and f"({name})" not in index] == []


def test_errors_of_the_troubleshooting_page_are_errors_of_the_code() -> None:
    """The fixed parts of each message that a heading shows, though the code may break it over lines."""
    headings = re.findall(r"^### (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    sources = "".join(file.read_text() for file in (ROOT / "flm_torchrec").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    foreign = ("Gloo connectFullMesh failed", "503", "Retry-After", "report.json", "--columns")
    parts = [
        part.strip() for heading in headings for span in re.findall(r"`([^`]+)`", heading) for part in span.split("…")
    ]
    wanted = [part for part in parts if len(part) > 2 and part not in foreign]
    assert len(wanted) >= 14
    assert [part for part in wanted if part not in sources and part.rstrip("'") not in sources] == []


def test_the_metrics_of_a_server_are_listed() -> None:
    """By the names in Prometheus' text format."""
    sources = (ROOT / "flm_torchrec" / "serve" / "metrics.py").read_text()
    made = set(re.findall(r'"(flm_\w+)"', sources))
    counters = set(re.findall(r'Counter\(\s*"(flm_\w+)"', sources))
    listed = set(re.findall(r"`(flm_[a-z_]+)`", (ROOT / "docs" / "operating.md").read_text()))
    assert listed == {f"{name}_total" if name in counters else name for name in made}
