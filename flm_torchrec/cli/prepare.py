"""`flm prepare`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from flm_torchrec.api import data as api
from flm_torchrec.config.options import add_options
from flm_torchrec.errors import DataError
from flm_torchrec.names import nearest
from flm_torchrec.prepare.options import LogOptions, MachineOptions, PrepareOptions, Recipe
from flm_torchrec.safe_text import visible

SOURCES = [name for name in api.SOURCES if name != "table"]
"""Those that a command can name."""
OWN = ("command", "run", "input", "output", "overwrite", "version")
"""Arguments that are no options of a source or of the preparation."""


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
        " 'logs/2024-*.csv', here or at an address that fsspec knows (s3://…, gs://…), packed or not, or the folder or"
        " address of a Delta or Iceberg table, or catalog://CATALOG/NAMESPACE.TABLE of Iceberg"
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
    add_options(parser, Recipe, api.SYNTHETIC)
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
    options = {name: value for name, value in vars(args).items() if name not in OWN}
    prepared = api.prepare(args.input, args.output, overwrite=args.overwrite, **options)
    _print_report(prepared.report, args.output, time.monotonic() - started)


def _print_report(report: dict[str, Any], output: Path, seconds: float) -> None:
    made_up = " (synthetic: made up from a seed)" if report["source"] == "synthetic" else ""
    dropped = report["rows_read"] - report["rows_kept"]
    print(
        f"{output}: {report['rows_kept']} events of {report['users']} users with {report['items']} items{made_up};"
        f" {dropped} of {report['rows_read']} rows dropped, sparsity {report['sparsity']:.4%}, {seconds:.1f} s"
    )
    for reason, detail in report["dropped"].items():
        example = f" (e.g. {detail['examples'][0]})" if detail["examples"] else ""
        print(visible(f"  dropped {detail['rows']}: {reason}{example}"))
    if report["items_without_features"]:
        print(f"  {report['items_without_features']} items have no features: only their ids tell of them")
    sys.stdout.flush()
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print(f"next: flm train --data.path {output}")
