"""Runs that differ in their seed alone, for means and deviations: `flm report` and `flm push` call this file."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.config import Config, load_config
from flm_torchrec.errors import RunError
from flm_torchrec.folders import CONFIG
from flm_torchrec.training.identity import made_with

OF_A_RUN = ("data.path", "train.run", "train.seed", "train.existing")
"""Settings in which the runs of several seeds may differ."""


def add_seeds(parser: argparse.ArgumentParser, place: str) -> None:
    """Add `--seeds RUN …` to a command that takes a run.

    Args:
        place: where the means and deviations stand.
    """
    parser.add_argument(
        "--seeds",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help=f"runs of the same settings with other seeds, for means and deviations in the {place}",
    )


def check_seed(run: Path, config: Config, other: Path) -> None:
    """Raise RunError where another run differs in more than its seed and its folder."""
    if not (other / CONFIG).is_file():
        raise RunError(f"--seeds {other}: no config.yaml, so no run folder")
    theirs, ours = load_config(other / CONFIG, []).by_name(), config.by_name()
    apart = [name for name, value in ours.items() if theirs[name] != value and name not in OF_A_RUN]
    if apart:
        raise RunError(
            f"--seeds {other}: also differs from {run} in {', '.join(apart)}; give runs of the same settings"
        )
    if made_with(other) != made_with(run):
        raise RunError(f"--seeds {other}: was trained with other data than {run}; give runs of the same data")
    if theirs["train.seed"] == ours["train.seed"]:
        raise RunError(f"--seeds {other}: has the same seed as {run}, {ours['train.seed']}; give runs of other seeds")
