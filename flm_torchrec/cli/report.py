"""`flm report`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from flm_torchrec.api.seeds import add_seeds, check_seed
from flm_torchrec.config import Config, add_data_path, given_overrides, load_config
from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.files import telling, write_text
from flm_torchrec.folders import CONFIG
from flm_torchrec.safe_text import visible
from flm_torchrec.training.identity import check_is_run, own_data


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `report` to the subcommands."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page of a run: settings, curves, metrics, plan, data, nearest items",
        description="Write one HTML page of a run, which needs no other file: settings, curves, metric tables, fusion"
        " weights, sharding plan, data report, nearest items. What the run folder lacks is named on the page.",
        allow_abbrev=False,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder of 'flm train'")
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write (default: RUN/report.html)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="export of the run, for nearest items")
    add_seeds(parser, "headline")
    add_data_path(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the page, and print its file and what is missing.

    Raises:
        RunError: there is no run folder, or the folder of the page does not exist.
    """
    folder = args.run_folder
    check_is_run(folder)
    output = args.output or folder / "report.html"
    if not output.parent.is_dir():
        raise RunError(f"{output.parent}: not found; --output must be in a folder that is there")
    overrides = given_overrides(args)
    config = load_config(folder / CONFIG, overrides)
    for other in args.seeds:
        check_seed(folder, config, other)
    # Imported here: a wrong option should be reported at once.
    from flm_torchrec import pages
    from flm_torchrec.report import pieces
    from flm_torchrec.report.headline import headline
    from flm_torchrec.report.neighbours import neighbours

    data = _own_data(folder, config, bool(overrides))
    metric = config.train.select.rpartition("/")[2]
    no_result, result = pieces.sections_of({"result": partial(headline, folder, metric, args.seeds)})
    missing, sections = pieces.sections_of(
        {
            "evaluation": partial(pieces.evaluations, folder),
            "best checkpoint": partial(pieces.best, folder),
            "curves": partial(pieces.curves, folder),
            "settings": partial(pieces.settings, config),
            "plan": partial(pieces.plan, folder),
            "nearest items": partial(neighbours, args.export, data),
            "data": partial(pieces.data_report, data),
            "versions": pieces.versions,
        }
    )
    if not any(line.startswith("evaluation: ") for line in missing):  # which says what the result lacks too
        missing = no_result + missing
    absent = [f"missing: {line}" for line in missing]
    with telling(output):
        write_text(output, pages.html(f"Run {folder.name}", absent, result + sections, first=len(result)))
    for line in missing:
        print(f"missing: {visible(line)}")
    print(f"page: {output}")


def _own_data(folder: Path, config: Config, given: bool) -> Path | str:
    """The folder of the run's data, or why they are missing."""
    try:
        return own_data(folder, config, given)
    except FlmError as error:
        return str(error)
