"""`flm prepare`."""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec.config.options import add_options, options_from
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest
from flm_torchrec.prepare.options import LogOptions, MachineOptions, PrepareOptions, Recipe
from flm_torchrec.safe_text import visible

if TYPE_CHECKING:
    from flm_torchrec.prepare.sources.source_data import SourceData

SYNTHETIC = "synthetic-"
"""Before the name of each option of the synthetic source."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `prepare` to the subcommands."""
    parser = subparsers.add_parser(
        "prepare",
        help="turn logs and features into the layout that everything else reads",
        description="Turn a source into prepared data: cleaned, de-duplicated, ids and features coded, as Parquet.",
        allow_abbrev=False,
    )
    source = f"one of {', '.join(SOURCES)}; synthetic is made up, not data about people (default: %(default)s)"
    parser.add_argument("--source", default="synthetic", metavar="NAME", help=source)
    parser.add_argument(
        "--input",
        metavar="PATH",
        help="folder of the source; for your own logs a file, a folder, or a pattern in quotes such as"
        " 'logs/2024-*.csv', here or at an address that fsspec knows (s3://…, gs://…), gzipped or not"
        " (needed by all sources but synthetic)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write (required)")
    parser.add_argument("--overwrite", action="store_true", help="replace older prepared data (default: refuse)")
    parser.add_argument(
        "--hash-users",
        type=Path,
        metavar="KEYFILE",
        help="replace the ids of users by their HMAC-SHA256 under the bytes of a file (default: keep them)",
    )
    for options in (MachineOptions, PrepareOptions, LogOptions):
        add_options(parser, options)
    add_options(parser, Recipe, SYNTHETIC)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prepare, and print a few lines about the result.

    Raises:
        ConfigError: an option is wrong.
        DataError: an option, an input or the output is wrong.
    """
    started = time.monotonic()
    if args.source not in SOURCES:
        raise DataError(f"--source '{args.source}' is not known; {nearest(args.source, SOURCES)}")
    options, machine = options_from(PrepareOptions, args), options_from(MachineOptions, args)
    _check_input(args.source, args.input)
    # Imported here: a wrong option should be reported at once.
    from flm_torchrec.prepare.hash_users import read_secret
    from flm_torchrec.prepare.prepare import check_output, prepare

    check_output(args.output, args.overwrite)
    secret = read_secret(args.hash_users) if args.hash_users else b""
    report = prepare(SOURCES[args.source](args), args.output, options, args.overwrite, machine, secret)
    _print_report(report, args.output, time.monotonic() - started)


def _check_input(source: str, path: str | None) -> None:
    if source == "synthetic":
        if path is not None:
            raise DataError(f"--input {path}: the source 'synthetic' reads nothing; name yours with --source")
        return
    if path is None:
        raise DataError(f"--input: name the folder or file of the source '{source}'")
    if "://" not in path and not Path(path).exists() and path == glob.escape(path):
        raise DataError(f"{path}: not found; --input must name the folder or file of the source")


def _print_report(report: dict[str, Any], output: Path, seconds: float) -> None:
    made_up = " (synthetic: made up from a seed)" if report["source"] == "synthetic" else ""
    dropped = report["rows_read"] - report["rows_kept"]
    print(
        f"{output}: {report['rows_kept']} events of {report['users']} users with {report['items']} items{made_up};"
        f" {dropped} of {report['rows_read']} rows dropped, sparsity {report['sparsity']:.4%}, {seconds:.1f} s"
    )
    for reason, detail in report["dropped"].items():
        print(visible(f"  dropped {detail['rows']}: {reason} (e.g. {detail['examples'][0]})"))
    if report["items_without_features"]:
        print(f"  {report['items_without_features']} items have no features: only their ids tell of them")
    sys.stdout.flush()
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print(f"next: flm train --data.path {output}")


def _synthetic(args: argparse.Namespace) -> SourceData:
    from flm_torchrec.prepare.sources import synthetic

    return synthetic.read(options_from(Recipe, args, SYNTHETIC))


def _movielens(args: argparse.Namespace) -> SourceData:
    from flm_torchrec.prepare.sources import movielens

    return movielens.read(Path(args.input))


def _s3rec(args: argparse.Namespace) -> SourceData:
    from flm_torchrec.prepare.sources import s3rec

    return s3rec.read(Path(args.input))


def _logs(args: argparse.Namespace) -> SourceData:
    from flm_torchrec.prepare.sources import logs

    return logs.read(args.source, args.input, options_from(LogOptions, args))


SOURCES: dict[str, Callable[[argparse.Namespace], SourceData]] = {
    "synthetic": _synthetic,
    "movielens-100k": _movielens,
    "amazon-s3rec": _s3rec,
    "parquet": _logs,
    "csv": _logs,
    "jsonl": _logs,
}
"""What reads a source."""
