"""What an adapter of tools/studies/conformance.py gets and gives. Any other system can do the same, in any language.

It gets the folder DATA: `train.parquet` and `valid.parquet` (user, item, timestamp: valid has the last known event of
each user), `items.parquet` and `users.parquet` (features), `test_users.parquet` (who must be answered). It gives
lists: Parquet files with columns user, rank (1 to 10) and item, one file for each model, named after the model. No user
meets an item twice, so lists are best without the user's known items.

This module imports the standard library and pyarrow alone: each peer has an environment of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

K = 10
"""Length of a list."""


@dataclass(frozen=True)
class Task:
    """The arguments of an adapter."""

    data: Path
    """The folder DATA."""
    output: Path
    """Where the lists go; it exists."""
    work: Path
    """Scratch space."""
    seed: int
    minutes: float
    """Processor time that training may take."""
    model: str = ""
    """Which model to train, where a program has several that take long."""

    def table(self, name: str) -> pa.Table:
        """A file of the data, by its name without `.parquet`."""
        return pq.read_table(self.data / f"{name}.parquet")

    def spent(self) -> bool:
        """Whether the processor time of this process is over the limit."""
        return time.process_time() > 60 * self.minutes

    def write(self, model: str, users: Sequence[str], lists: Sequence[Sequence[str]]) -> None:
        """Write the lists of a model: for each user, the best items, best first."""
        columns = {
            "user": [user for user, items in zip(users, lists, strict=True) for _ in items],
            "rank": pa.array([rank for items in lists for rank in range(1, len(items) + 1)], pa.int32()),
            "item": [item for items in lists for item in items],
        }
        pq.write_table(pa.table(columns), self.output / f"{model}.parquet")


def task_of(argv: Sequence[str] | None = None) -> Task:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="An adapter of tools/studies/conformance.py.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--model", default="")
    return Task(**vars(parser.parse_args(argv)))


def histories(task: Task) -> dict[str, list[str]]:
    """By user, the items of all known events in order of time."""
    events = pa.concat_tables([task.table("train"), task.table("valid")]).sort_by("timestamp")
    known: dict[str, list[str]] = {user: [] for user in task.table("test_users")["user"].to_pylist()}
    for user, item in zip(events["user"].to_pylist(), events["item"].to_pylist(), strict=True):
        known[user].append(item)
    return known


def blocks(users: Sequence[str], size: int = 512) -> Iterator[Sequence[str]]:
    """The users, a few at a time."""
    return (users[start : start + size] for start in range(0, len(users), size))
