"""`flm tune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.tuning.space import read_space


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `tune` to the subcommands."""
    parser = subparsers.add_parser(
        "tune",
        help="search for settings: trials of 'flm train', compared on validation",
        description="Search a space of settings for the highest train.select on validation, with Optuna. Each trial is"
        " a run of 'flm train' in OUTPUT. Called again, it goes on: trials that were not finished resume from their"
        " checkpoints. Writes OUTPUT/trials.md, all trials, and OUTPUT/best.yaml, for 'flm train --config'.",
        allow_abbrev=False,
    )
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="settings with their choices or ranges")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the search and its runs")
    parser.add_argument(
        "--trials", type=int, default=20, metavar="N", help="of the whole search, with earlier ones (default: 20)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at once, cores shared (default: 1)")
    parser.add_argument(
        "--pruner",
        choices=("median", "asha", "none"),
        default="median",
        help="end a trial early whose validation is below the median of the others at the same time, or by asynchronous"
        " successive halving; none: never (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the values that are tried (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Search, and print the table of trials.

    Raises:
        FlmError: the space, an option or the output is wrong, or no trial has a value.
        Interrupted: asked to stop; the same command goes on.
    """
    space = read_space(args.space)
    # Imported here: Optuna and PyTorch take seconds, and a wrong space should be reported at once.
    from flm_torchrec.errors import RunError
    from flm_torchrec.training.trackers import check_trackers
    from flm_torchrec.training.trainer import check_select
    from flm_torchrec.tuning.study import BEST, TuneOptions, table, tune

    check_select(space.base)
    check_trackers(space.base.train.trackers)
    options = TuneOptions(args.output, args.trials, args.jobs, args.pruner, args.seed)
    found = tune(space, options, lambda text: print(text, flush=True))
    print(table(found), end="")
    if found.best is None:
        raise RunError(f"{args.output}: no trial has ended with a value; the table says why")
    print(f"flm train --config {args.output / BEST}")
