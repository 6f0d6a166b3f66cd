"""The data of tools/studies/conformance.py: what models may see, and what only the suite knows.

FOLDER/data/            for models; see tools/studies/conformance_adapters/protocol.py
FOLDER/test.parquet     each user's next event: user, item, timestamp, signal (what planted it), and the rank of the
                        item by two oracles: of that signal alone, and of the mixture
FOLDER/runs/oracle-0/   the oracles' lists, as if they were models
FOLDER/suite.json       the recipe, and the SHA-256 of every file of the data
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.claim import claim
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import RunError
from flm_torchrec.files import replacing, sha256, telling, write_text
from flm_torchrec.prepare.options import Recipe
from flm_torchrec.prepare.sources.synthetic import MECHANISMS, MIXTURE, Truth, read_with_truth
from tools.studies.conformance_adapters.protocol import Task

FORMAT = 1
ANOTHER = "give another folder"


@dataclass(frozen=True)
class Suite:
    """A folder of the suite."""

    folder: Path
    recipe: Recipe

    @classmethod
    def load(cls, folder: Path) -> Suite:
        """Open a folder and check its data.

        Raises:
            RunError: the folder is no suite, of another version, or its data have changed.
        """
        try:
            found = read_json(folder / "suite.json")
            recipe, version, files = Recipe(**found["recipe"]), found["format"], found["files"]
        except (Unreadable, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{folder}: no suite ({reason}); make one with: conformance write {folder}") from error
        if version != FORMAT:
            raise RunError(f"{folder}/suite.json: format {version}, this tool reads {FORMAT}; {ANOTHER} to write")
        for name, digest in files.items():
            file = folder / name
            if not file.is_file() or sha256(file) != digest:
                raise RunError(f"{file}: missing or changed since the suite was written; write it anew elsewhere")
        return cls(folder, recipe)

    @property
    def data(self) -> Path:
        """What models may see."""
        return self.folder / "data"

    @property
    def runs(self) -> Path:
        """A folder for each adapter and seed."""
        return self.folder / "runs"

    @cached_property
    def test(self) -> pl.DataFrame:
        """Each user's next event: user, item, timestamp, signal, signal_rank, mixture_rank."""
        return pl.read_parquet(self.folder / "test.parquet")

    @cached_property
    def items(self) -> pl.Series:
        """All items."""
        return pl.read_parquet(self.data / "items.parquet")["item"]


def write_suite(folder: Path, recipe: Recipe) -> Suite:
    """Draw the data and write the folder, or keep it where it was made by the same recipe.

    Raises:
        FlmError: the recipe leaves nothing to draw, or the folder holds something else.
    """
    with claim(folder, ANOTHER):
        if folder.exists():
            found = Suite.load(folder)
            if found.recipe != recipe:
                raise RunError(f"{folder}: was made by another recipe ({asdict(found.recipe)}); {ANOTHER}")
            return found
        source, truth = read_with_truth(recipe)
        with telling(folder, ANOTHER), replacing(folder) as fresh:
            (fresh / "data").mkdir()
            assert isinstance(source.interactions, pl.DataFrame) and source.items is not None
            assert source.users is not None
            _write_events(fresh, source.interactions, truth)
            source.items.rename({"key": "item"}).write_parquet(fresh / "data" / "items.parquet")
            source.users.rename({"key": "user"}).write_parquet(fresh / "data" / "users.parquet")
            _write_oracles(fresh, source.items["key"].to_numpy(), source.users["key"].to_list(), truth)
            files = [file for file in sorted(fresh.rglob("*.parquet")) if "runs" not in file.parts]
            digests = {file.relative_to(fresh).as_posix(): sha256(file) for file in files}
            write_json(fresh / "suite.json", {"format": FORMAT, "recipe": asdict(recipe), "files": digests})
    return Suite.load(folder)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file for people to read too."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write_events(folder: Path, events: pl.DataFrame, truth: Truth) -> None:
    """The last event of each user is test, the one before it validation."""
    events = events.select("user", "item", "timestamp", signal="segment")  # users one after the other, in order of time
    left = pl.int_range(pl.len()).reverse().over("user")
    known = events.with_columns(left=left)
    for name, wanted in ("train", pl.col("left") > 1), ("valid", pl.col("left") == 1):
        known.filter(wanted).select("user", "item", "timestamp").write_parquet(folder / "data" / f"{name}.parquet")
    test = known.filter(pl.col("left") == 0).drop("left")
    own = np.stack([truth.ranks[name] for name in MECHANISMS])[truth.mechanism, np.arange(len(test))]
    test = test.with_columns(signal_rank=pl.Series(own), mixture_rank=pl.Series(truth.ranks[MIXTURE]))
    test.select("user").write_parquet(folder / "data" / "test_users.parquet")
    test.write_parquet(folder / "test.parquet")


def _write_oracles(folder: Path, items: np.ndarray, users: list[str], truth: Truth) -> None:
    output = folder / "runs" / "oracle-0"
    output.mkdir(parents=True)
    task = Task(folder / "data", output, output, seed=0, minutes=0)
    for name, best in truth.best.items():
        task.write("mixture" if name == MIXTURE else f"{name} alone", users, items[best].tolist())
    write_json(output / "about.json", {"adapter": "oracle", "seed": 0, "versions": {}, "processor_seconds": 0.0})
