"""`flm evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flm_torchrec.config import add_data_path, add_overrides, given_options, given_overrides
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.files import telling, write_text

if TYPE_CHECKING:
    from flm_torchrec.data.dataset import PreparedData
    from flm_torchrec.data.splits import Examples


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
        action="store_true",
        help="of a run with data.stream, load and rank only the users it validated on; baselines then learn from these"
        " alone (default: load all)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown (default: a table)")
    add_data_path(parser)
    add_overrides(parser, ["eval"], {"eval": "as the run was trained with"})
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Rank the held-out events of a run, write `evaluation-SPLIT.json` and print the tables.

    Raises:
        FlmError: an option, the run or its data is wrong, or the model has diverged.
    """
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    import numpy as np

    from flm_torchrec.evaluation.evaluate import EvaluationTask, evaluate
    from flm_torchrec.evaluation.report import markdown, show
    from flm_torchrec.terminal import PlainConsole
    from flm_torchrec.training.restore import restore

    with restore(args.run_folder, given_overrides(args), args.sample, given_options(args)) as restored:
        job = restored.job
        examples = job.events.splits.test if args.split == "test" else job.events.splits.valid
        if args.user:
            examples = examples.take(np.array(_rows_of(args.user, job.data.user_keys, examples.user.tolist())))
        task = EvaluationTask(job.data, examples, args.split, job.events.seen, job.events.splits.cold_items)
        evaluation = evaluate(task, job.encoder(examples), job.comm, job.config.eval)
        if not job.comm.main:
            return
        if not args.user:
            file = Path(args.run_folder) / f"evaluation-{args.split}.json"
            with telling(file, "make room"):
                write_text(file, json.dumps(evaluation.to_json(), indent=2))
        oracle = _oracle(job.data, examples)
        if args.markdown:
            print(markdown(evaluation, oracle), end="")
            return
        console = PlainConsole()
        # A file or a pipe gets the complete table, not one that is squeezed into 80 columns.
        show(evaluation, console if console.is_terminal else PlainConsole(width=120), oracle)


def _rows_of(keys: list[str], user_keys: list[str], users: list[int]) -> list[int]:
    """Indices of the examples of the users named."""
    user_of = {key: user for user, key in enumerate(user_keys)}
    example_of = {user: row for row, user in enumerate(users)}
    for key in keys:
        if key not in user_of:
            raise RunError(f"--user '{key}': not in users.parquet; ids are those of the source, e.g. '{user_keys[0]}'")
        if user_of[key] not in example_of:
            raise RunError(f"--user '{key}': has no held-out event in this split; choose another user")
    return [example_of[user_of[key]] for key in keys]


def _oracle(data: PreparedData, examples: Examples) -> dict[str, dict[str, float]] | None:
    """Metrics of the best possible ranking, over all examples and by segment; only synthetic data know it.

    It is that of every user's last event: None where other events are ranked, or not all of these.
    """
    if len(examples) != data.schema.users or (examples.end != data.offsets[1:] - 1).any():
        return None
    file = data.path / "report.json"
    try:
        return read_json(file).get("oracle")
    except (Unreadable, AttributeError) as error:
        raise DataError(f"{file}: not a report of 'flm prepare' ({error}); prepare the data again") from error
