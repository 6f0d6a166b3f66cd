"""`flm evaluate`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flm_torchrec.api.evaluation import Evaluated, EvaluateOptions, evaluate_run, write_evaluation
from flm_torchrec.config import add_data_path, add_overrides, given_options, given_overrides
from flm_torchrec.errors import RunError
from flm_torchrec.folders import CONFIG

if TYPE_CHECKING:
    from flm_torchrec.data.splits import Examples
    from flm_torchrec.evaluation.paired import Comparison

VALIDATED = -1
"""`--sample` without a number."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `evaluate` to the subcommands."""
    parser = subparsers.add_parser(
        "evaluate",
        help="rank every item for held-out events: each head, their fusion and baselines",
        description="Rank all items for the held-out event of each user, the user's earlier items left out, by each"
        " head, by the fused representation and by the baselines. Writes RUN/evaluation-SPLIT.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="run folder of 'flm train'")
    parser.add_argument(
        "--split", choices=("test", "valid"), default="test", help="examples to rank (default: %(default)s)"
    )
    parser.add_argument(
        "--user",
        action="append",
        default=[],
        metavar="KEY",
        help="only this user, by the id of the source; may be repeated (default: all)",
    )
    parser.add_argument(
        "--sample",
        nargs="?",
        type=int,
        const=VALIDATED,
        metavar="N",
        help="rank only N users, drawn once; baselines learn from all users. Without N, of a run with data.stream: load"
        " and rank only the users it validated on; baselines then learn from these alone (default: all users)",
    )
    parser.add_argument(
        "--by",
        action="append",
        choices=("items", "users", "events", "repeats"),
        default=[],
        help="also a table for each kind of next item (head, tail, without training events), of user (new, of few"
        " events, of many), or of next event; repeats: for next items that are new to the user, and for those had"
        " before; may be repeated (default: none; repeats above 20 %% of items had before)",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=0,
        metavar="N",
        help="of a run with data.split time: cut the held-out period into N windows of equal length, and predict in"
        " each from all events before (default: one prediction for each user)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown (default: a table)")
    parser.add_argument(
        "--against",
        metavar="ROW|DIR",
        help="also tell how each row differs from this row of the table, such as sequential, or from the same row of"
        " this other run of the same data, with a 95 %% interval over users (default: no comparison)",
    )
    add_data_path(parser)
    add_overrides(parser, ["eval"], {"eval": "as the run was trained with"})
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Rank the held-out events of a run, write `evaluation-SPLIT.json` and print the tables.

    Raises:
        FlmError: an option, the run or its data is wrong, or the model has diverged.
    """
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.evaluation.report import markdown, markdown_comparison, show, show_comparison
    from flm_torchrec.terminal import PlainConsole

    if args.sample is not None and args.sample < 1 and args.sample != VALIDATED:
        raise RunError(f"--sample {args.sample}: give 1 user or more")
    if args.sample is not None and args.sample > 0 and args.user:
        raise RunError("--sample: --user names the users to rank; leave out one of the two")
    if args.against:
        _check_against(args.run_folder, args.against)
    options = EvaluateOptions(
        split=args.split,
        users=args.user,
        sample=args.sample == VALIDATED,
        drawn=max(0, args.sample or 0),
        by=args.by,
        windows=args.windows,
        overrides=given_overrides(args),
        given=given_options(args),
    )
    found = evaluate_run(args.run_folder, options, keep_ranks=bool(args.against))
    compared = _compared(args.against, found, options) if args.against else None
    if not found.main:
        return
    evaluation = found.evaluation
    if not args.user:
        write_evaluation(args.run_folder, evaluation, {} if compared is None else {"comparison": compared.to_json()})
    if args.markdown:
        print(markdown(evaluation, found.oracle), end="")
        if compared is not None:
            print("\n" + markdown_comparison(compared), end="")
        return
    console = PlainConsole()
    # A file or a pipe gets the complete table, not one that is squeezed into 80 columns.
    console = console if console.is_terminal else PlainConsole(width=120)
    show(evaluation, console, found.oracle)
    if compared is not None:
        show_comparison(compared, console)


def _check_against(run_folder: str, against: str) -> None:
    """Raise RunError where --against names neither a row nor a run of the same data."""
    from flm_torchrec.evaluation.evaluate import ROWS
    from flm_torchrec.training.checkpoint.manager import BEST
    from flm_torchrec.training.checkpoint.storage import read_meta

    if against in ROWS:
        return
    if not (Path(against) / CONFIG).is_file():
        raise RunError(f"--against '{against}': neither a run folder nor a row; rows are {', '.join(ROWS)}")
    if read_meta(Path(against) / BEST)["data"] != read_meta(Path(run_folder) / BEST)["data"]:
        raise RunError(f"--against {against}: was trained on other data than {run_folder}; no events are common")


def _compared(against: str, found: Evaluated, options: EvaluateOptions) -> Comparison:
    """Each row against the row that --against names, or against the same row of the run that it names; collective.

    Raises:
        RunError: a row that this evaluation has not, or a run of other held-out events.
    """
    from flm_torchrec.evaluation.paired import RanksOfExamples

    ranks = found.evaluation.ranks
    if against in ranks:
        others = {name: ranks[against] for name in ranks if name != against}
    elif not (Path(against) / CONFIG).is_file():
        raise RunError(f"--against '{against}': this table has no such row; its rows are {', '.join(ranks)}")
    else:
        heads_alone = replace(options, overrides=[*options.overrides, "eval.baselines=[]"])
        other = evaluate_run(against, heads_alone, keep_ranks=True)
        if other.fingerprint != found.fingerprint or not _same(other.examples, found.examples):
            raise RunError(f"--against {against}: its data or held-out events are others; compare runs of one split")
        others = {name: other.evaluation.ranks[name] for name in ranks if name in other.evaluation.ranks}
    # Wider tables do not fit a terminal.
    ks = (10,) if 10 in found.ks else found.ks[:1]
    return RanksOfExamples(ranks, others, found.examples.user).compared(against, ks, found.evaluation.chosen)


def _same(one: Examples, other: Examples) -> bool:
    """Whether these are the same events of the same users."""
    import numpy as np

    return np.array_equal(one.user, other.user) and np.array_equal(one.end, other.end)
