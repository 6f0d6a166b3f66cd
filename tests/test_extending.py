"""The recipes of docs/extending.md, applied as they are written to a copy of the package that then does its work."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

MOST_FILES = {"A head": 3, "A loss": 2, "A vector store": 2, "An input source": 2, "A sharding rule": 3}
"""By recipe, the files that it may touch."""
WHOLE_BELOW = 1000


@dataclass(frozen=True)
class Edit:
    """A block of a recipe: hunks of an older file, or a new file."""

    file: str
    content: str
    new: bool

    def apply(self, folder: Path) -> None:
        """Change or write the file.

        Raises:
            AssertionError: a hunk's old lines stand in the file not once but never or more often.
        """
        path = folder / self.file
        assert path.exists() != self.new, self.file
        text = self.content
        if not self.new:
            text = path.read_text()
            for hunk in re.split(r"^@@\n", self.content, flags=re.MULTILINE)[1:]:
                before, after = ("".join(lines(hunk, kinds)) for kinds in (" -", " +"))
                assert text.count(before) == 1, f"{self.file}: {text.count(before)} places have:\n{before}"
                text = text.replace(before, after)
        path.write_text(text)


def lines(hunk: str, kinds: str) -> Iterator[str]:
    """The lines of a hunk that begin with one of these signs, without the sign; a line without any is empty."""
    for line in hunk.splitlines():
        sign, text = line[:1] or " ", line[1:]
        if sign in kinds:
            yield f"{text}\n"


def recipes() -> dict[str, list[Edit]]:
    """By heading of the page, the edits below it."""
    _, *parts = re.split(r"^## (.+)\n", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
    found = {}
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        blocks = re.findall(r"^```(diff|python)\n(?:---|#) (\S+)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        assert len(blocks) == len(re.findall(r"^```\w", body, re.MULTILINE)), f"{title}: a block names no file"
        found[title] = [Edit(file, content, kind == "python") for kind, file, content in blocks]
    return found


def copy_of_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "flm_torchrec", folder / "flm_torchrec", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("title", MOST_FILES)
def test_a_recipe_applies_by_itself_to_few_files(title: str, tmp_path: Path) -> None:
    edits = recipes()[title]
    copy = copy_of_package(tmp_path)
    for edit in edits:
        edit.apply(copy)
        assert max(map(len, (copy / edit.file).read_text().splitlines())) <= 120
        compile((copy / edit.file).read_text(), edit.file, "exec")
    assert 0 < len({edit.file for edit in edits}) <= MOST_FILES[title]


def test_the_page_has_these_recipes_and_no_other() -> None:
    assert list(recipes()) == list(MOST_FILES)


def test_a_hunk_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 1\nx = 1\n")
    Edit("a.py", "@@\n-y = 1\n+y = 2\n+\n+z = 3\n x = 1\n", False).apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 2\n\nz = 3\nx = 1\n"
    for hunk in ("@@\n-x = 1\n", "@@\n-x = 2\n"):
        with pytest.raises(AssertionError, match="places have"):
            Edit("a.py", hunk, False).apply(tmp_path)


def write_movielens_1m(folder: Path) -> None:
    """A made-up MovieLens 1M of 40 users and 60 movies."""
    folder.mkdir()
    draw = random.Random(0)
    ratings = [
        f"{user}::{draw.randrange(60)}::{draw.randint(1, 5)}::{10**9 + 60 * n}" for user in range(40) for n in range(10)
    ]
    (folder / "ratings.dat").write_text("\n".join([*ratings, "0::1::five::1000000000"]) + "\n")
    movies = [f"{m}::Movie {m}::{'Drama|War' if m % 2 else 'Comedy'}" for m in range(60)]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder where a package with all five recipes prepared, trained, exported and loaded, and what it printed."""
    folder = tmp_path_factory.mktemp("extended")
    copy = copy_of_package(folder)
    for edit in [edit for edits in recipes().values() for edit in edits]:
        edit.apply(copy)
    write_movielens_1m(folder / "ml-1m")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy), "PYTHONWARNINGS": "ignore"}
    job = ROOT / "tests" / "extending_job.py"
    done = subprocess.run(
        [sys.executable, str(job), str(WHOLE_BELOW)], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_source_is_prepared(extended: tuple[Path, dict]) -> None:
    report = json.loads((extended[0] / "data" / "report.json").read_text())
    assert (report["source"], report["users"], report["rows_read"]) == ("movielens-1m", 40, 401)
    assert report["rows_kept"] >= 400


def test_head_and_loss_are_trained_and_validated(extended: tuple[Path, dict]) -> None:
    lines = [json.loads(line) for line in (extended[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {"loss/basket", "loss/agreement"} <= names
    assert any(name.endswith("basket/ndcg@10") for name in names), names


def test_the_plan_obeys_the_rule(extended: tuple[Path, dict]) -> None:
    rows, types = extended[1]["rows"], extended[1]["types"]
    assert types == {name: "table_wise" if rows[name] < WHOLE_BELOW else "row_wise" for name in rows}
    assert set(types.values()) == {"table_wise", "row_wise"}


def test_the_store_gives_back_what_the_head_recommends(extended: tuple[Path, dict]) -> None:
    result = extended[1]
    assert result["loaded"] == [[result["items"], 0, result["items"]]] * 2  # twice the same is as once
    assert result["found"] == result["best"]
    assert result["recommended"] == 3
    assert result["after_delete"] == result["items"] - 1
    assert "holds other vectors" in result["refused"]
