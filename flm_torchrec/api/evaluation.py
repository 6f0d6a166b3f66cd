"""The evaluation of a run: `flm evaluate` and `Run.evaluate` call this file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flm_torchrec._versions import check_versions
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.files import telling, write_text

if TYPE_CHECKING:
    import numpy as np

    from flm_torchrec.data.dataset import PreparedData
    from flm_torchrec.data.splits import Examples
    from flm_torchrec.evaluation.evaluate import Evaluation
    from flm_torchrec.training.job import Job

Split = Literal["test", "valid"]


@dataclass(frozen=True)
class EvaluateOptions:
    """What to rank."""

    split: Split = "test"
    users: Sequence[str] = ()
    """Ids of the users to rank for; none: all."""
    sample: bool = False
    """Load and rank only the users that a run with `data.stream` validated on."""
    drawn: int = 0
    """Rank only so many users, the same for all runs of one split; 0: all. Baselines learn from the events of all."""
    by: Sequence[str] = ()
    """Of "items", "users", "events" and "repeats": break results down by how popular the item is, how much is known of
    the user, the kind of the next event, and whether the user had the item before."""
    windows: int = 0
    """Cut the held-out period of a time split into so many parts, with predictions in each; 0: do not."""
    overrides: Sequence[str] = ()
    """Of the run's settings."""
    given: Mapping[str, str] | None = None
    """Options of the command, which all ranks must have been given alike."""


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a run, and what it must share with a run that it is compared with."""

    evaluation: Evaluation
    examples: Examples
    fingerprint: str
    oracle: dict[str, dict[str, float]] | None
    ks: tuple[int, ...]
    main: bool
    """Whether this is rank 0."""


def evaluate_run(run: str | os.PathLike[str], options: EvaluateOptions, keep_ranks: bool = False) -> Evaluated:
    """Rank the held-out events of a run; collective.

    Args:
        keep_ranks: give every example's rank too.

    Raises:
        FlmError: an option, the run or its data is wrong, or the model has diverged.
    """
    for name, number in (("--windows", options.windows), ("--sample", options.drawn)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise RunError(f"{name} {number}: give 1 or more")
    check_versions()
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.evaluation.evaluate import EvaluationTask, evaluate
    from flm_torchrec.training.restore import restore

    with restore(Path(run), options.overrides, options.sample, options.given) as restored:
        job = restored.job
        splits = job.events.splits
        examples = held_out = splits.test if options.split == "test" else splits.valid
        if options.users:
            examples = examples.take(_rows_of(list(dict.fromkeys(options.users)), job.data, examples.user))
        examples = examples.drawn(options.drawn)
        if options.windows:
            examples = _rolled(job, held_out, examples, options.windows)
        by = tuple(dict.fromkeys(options.by))
        task = EvaluationTask(job.data, examples, options.split, job.events.seen, splits.cold_items, keep_ranks, by)
        if options.sample or options.drawn:
            task = replace(task, drawn_of=job.data.schema.users if options.sample else held_out.users)
        if options.windows and job.data.item_domain is None:  # of joint data, a window has an event of each domain
            task = replace(task, unit="pairs of user and window")
        evaluation = evaluate(task, job.encoder(examples), job.comm, job.config.eval)
        evaluation = replace(evaluation, examples=examples.digest(job.data))
        oracle = _oracle(job.data, examples)
        return Evaluated(evaluation, examples, job.data.fingerprint, oracle, job.config.eval.ks, job.comm.main)


def write_evaluation(
    run: str | os.PathLike[str], evaluation: Evaluation, more: Mapping[str, Any] | None = None
) -> None:
    """Write `evaluation-SPLIT.json` into the run's folder, with more entries.

    Raises:
        RunError: the disk cannot be written.
    """
    file = Path(run) / f"evaluation-{evaluation.split}.json"
    with telling(file, "make room"):
        write_text(file, json.dumps({**evaluation.to_json(), **(more or {})}, indent=2))


def _rows_of(keys: Sequence[str], data: PreparedData, users: np.ndarray) -> np.ndarray:
    """Indices of the examples of the users named, of all examples' users [n]."""
    import numpy as np

    named = data.users_named(keys)
    order = np.argsort(users, kind="stable")
    first, last = (np.searchsorted(users, named, side, sorter=order) for side in ("left", "right"))
    for key, user, examples in zip(keys, named.tolist(), (last - first).tolist(), strict=True):
        if user < 0:
            raise RunError(f"--user '{key}': not in users.parquet; ids are those of the source")
        if not examples:
            raise RunError(f"--user '{key}': has no held-out event in this split; choose another user")
    return np.concatenate([order[begin:end] for begin, end in zip(first, last, strict=True)])


def _rolled(job: Job, held_out: Examples, examples: Examples, windows: int) -> Examples:
    """The predictions in each window, for the users of the examples.

    Raises:
        RunError: the run has no time split, or is one of 'flm follow'.
    """
    from flm_torchrec.evaluation.rolling import RollingWindows
    from flm_torchrec.training.follow.growth import FollowedData

    if isinstance(job.data, FollowedData):
        raise RunError(
            "--windows: a run of 'flm follow' has no windows, as events that it learned from may lie in them; evaluate"
            " the run that it began from"
        )
    if examples.until is None:
        raise RunError(
            f"--windows: the run has a {job.config.data.split} split, whose events are of no common period; train with"
            " --data.split time"
        )
    return RollingWindows.of(job.data, held_out, windows).examples(job.data, examples)


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
