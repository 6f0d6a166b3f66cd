"""`flm inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.errors import DataError
from flm_torchrec.files import telling, write_text
from flm_torchrec.prepare.memory import LEAST, duckdb_bytes, memory_bytes


class Problems(DataError):
    """Data are readable but not fit to learn from: the error of `--strict`."""

    exit_code = 1


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `inspect` to the subcommands."""
    parser = subparsers.add_parser(
        "inspect",
        help="is prepared data fit to learn from: distributions, drift, leakage, dead features",
        description="Look through prepared data, out of core: counts, distributions, drift between days, leakage"
        " between the parts of a split, dead features, top ids. Problems are told with what to do.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="prepared data")
    parser.add_argument("--output", type=Path, metavar="FILE", help="HTML page to write, with plots (default: none)")
    split = "split to look for leakage in (default: %(default)s)"
    parser.add_argument("--split", choices=("leave-one-out", "time"), default="leave-one-out", help=split)
    holdout = "time: share of events to test on (default: %(default)s)"
    parser.add_argument("--holdout", type=float, default=0.1, metavar="X", help=holdout)
    memory = (
        "of the whole command, such as 2GiB or 500MB, at least 100MiB; DuckDB gets half of it, what does not fit goes"
        " to disk (default: %(default)s)"
    )
    parser.add_argument("--memory", default="2GiB", metavar="SIZE", help=memory)
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 where there are problems: a gate (default: 0)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print, and write the page if one is asked for.

    Raises:
        DataError: an option or the data is wrong.
        Problems: with `--strict`, there are problems.
    """
    if not 0 < args.holdout < 0.5:
        raise DataError(f"--holdout {args.holdout}: must be between 0 and 0.5")
    memory = duckdb_bytes(memory_bytes(args.memory, LEAST))
    if args.output and not args.output.parent.is_dir():
        raise DataError(f"{args.output.parent}: not found; --output must be in a folder that is there")
    # Imported here: a wrong option should be reported at once.
    from flm_torchrec import pages
    from flm_torchrec.inspection.drift import look_at_drift
    from flm_torchrec.inspection.features import look_at_features
    from flm_torchrec.inspection.inspect import look_at_counts, look_at_distributions, look_at_top, opened
    from flm_torchrec.inspection.leakage import look_at_splits
    from flm_torchrec.terminal import PlainConsole

    with opened(args.folder, memory) as data:
        look_at_counts(data)
        look_at_splits(data, args.split, args.holdout)
        look_at_distributions(data)
        look_at_drift(data)
        look_at_features(data)
        look_at_top(data)
    console = PlainConsole()
    pages.show(data.findings, data.sections, console if console.is_terminal else PlainConsole(width=160))
    if args.output:
        page = pages.html(f"{data.schema.name}: prepared data", data.findings, data.sections, "No problems found.")
        with telling(args.output):
            write_text(args.output, page)
        print(f"page: {args.output}")
    if data.findings and args.strict:
        raise Problems(f"{args.folder}: {len(data.findings)} problems, told above; mend them, or leave out --strict")
    print(f"{len(data.findings)} problems found" if data.findings else "no problems found")
