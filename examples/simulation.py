"""What the examples share: draws of users' histories, and the way from tables to recommendations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import flm_torchrec as flm

DAY = 86_400
START = 1_700_000_000
"""Seconds since 1970 at which all made-up logs begin."""


@dataclass(frozen=True)
class Example:
    """Made-up logs of a field, and how to learn from them."""

    events: pl.DataFrame
    items: pl.DataFrame
    prepare: dict[str, Any]
    """Options of `flm.prepare`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Sections of `flm.train`."""


def popularity(rng: np.random.Generator, items: int) -> np.ndarray:
    """[items] shares of a long tail (Zipf's law), in random order."""
    shares = 1 / np.arange(1, items + 1)
    return rng.permutation(shares / shares.sum())


def drawn(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index, by weights of which one at least is positive."""
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def times(rng: np.random.Generator, count: int, mean_gap: float) -> np.ndarray:
    """[count] ascending seconds, the gaps exponential with this mean."""
    return (START + rng.uniform(0, 30 * DAY) + np.cumsum(rng.exponential(mean_gap, count))).astype(np.int64)


def main(make: Callable[[int, int], Example], look_at: Callable[[flm.Run, flm.Recommender], None]) -> None:
    """Make the logs, prepare, train, export, and show what to look at."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="folder to write data, run and export into")
    parser.add_argument("--users", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    example = make(args.users, args.seed)
    data = flm.prepare(example.events, args.folder / "data", items=example.items, **example.prepare)
    run = flm.train(data, args.folder / "run", **example.settings)
    look_at(run, run.export(args.folder / "export"))
