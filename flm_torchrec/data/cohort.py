"""What a fine-tuning learns from: a cohort of users, a share of their labelled events."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flm_torchrec.data.columns import EventBlock, new_column
from flm_torchrec.data.dataset import BLOCK_ROWS, PreparedData
from flm_torchrec.data.splits import Examples, Splits
from flm_torchrec.data.weights import VALUE
from flm_torchrec.errors import DataError


@dataclass(frozen=True)
class Labels:
    """Labels of events, by part. Each part is [interactions, labels] float32: 1 positive, 0 negative, NaN where an
    event is not labelled.

    No user has labels in two parts.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def of_cohort(splits: Splits, data: PreparedData, cohort: np.ndarray, share: float, seed: int) -> Splits:
    """Predict only for the users of `cohort` [users] bool, and learn from a share of them, drawn once.

    Raises:
        DataError: no user is left to learn from or to predict for.
    """
    learners = np.flatnonzero(cohort & (splits.train_end > data.offsets[:-1]))
    drawn = np.random.default_rng(seed).permutation(learners)[: max(1, round(share * len(learners)))]
    train_end = data.offsets[:-1].copy()
    train_end[drawn] = splits.train_end[drawn]

    def only(examples: Examples) -> Examples:
        return examples.take(np.flatnonzero(cohort[examples.user]))

    chosen = replace(splits, train_end=train_end, valid=only(splits.valid), test=only(splits.test))
    if not len(learners) or not len(chosen.valid) or not len(chosen.test):
        raise DataError(
            f"{data.path}: no user of the cohort has events to learn from and to predict; take finetune.cohort=all,"
            " or a pretraining with data.split=cold-start, which leaves some users out"
        )
    return chosen


@dataclass(frozen=True)
class LabelRule:
    """What events are labelled by."""

    names: tuple[str, ...]
    """VALUE, or kinds of events of the data."""
    threshold: float
    """Least value of an event that is positive by its value."""

    def of(self, data: PreparedData, rows: slice) -> np.ndarray:
        """[n, labels] float32 of these events: 1 or 0."""
        found = np.empty((rows.stop - rows.start, len(self.names)), np.float32)
        for number, name in enumerate(self.names):
            if name == VALUE:
                found[:, number] = data.value[rows] >= self.threshold
            else:
                found[:, number] = data.event[rows] == data.schema.events.index(name)
        return found


def label_events(data: PreparedData, cohort: np.ndarray, rule: LabelRule, share: float, seed: int) -> Labels:
    """Label events by a rule: of the cohort's users, 60 % to train, 20 % to validate, 20 % to test.

    Events of a kind that is not predicted have no label.

    Args:
        share: of the training users' events, the share that is labelled, drawn once.

    Raises:
        DataError: a label of a part is the same for all events, or a part has none.
    """
    users = np.random.default_rng(0).permutation(np.flatnonzero(cohort))  # the same test users for any seed
    part = np.full(data.schema.users, -1, np.int8)
    for number, members in enumerate(np.split(users, [int(0.6 * len(users)), int(0.8 * len(users))])):
        part[members] = number
    predicted, of_event = data.of_targets(~data.no_events), new_column(len(data.item), np.int8)
    for block in data.blocks():
        of_event[block.rows] = np.where(predicted[block.rows], part[block.users], -1)
    _leave_out(of_event, share, seed)

    def labels(number: int) -> np.ndarray:
        def of_block(block: EventBlock) -> np.ndarray:
            wanted = of_event[block.rows] == number
            return np.where(wanted[:, None], rule.of(data, block.rows), np.float32(np.nan))

        return data.column(np.float32, of_block, (len(rule.names),))

    parts = [labels(number) for number in range(3)]
    for name, values in zip(("learn from", "choose by", "test on"), parts, strict=True):
        there = [np.zeros(len(rule.names), bool) for _ in range(2)]
        for block in data.blocks():
            for found, kind in zip(there, (0, 1), strict=True):
                found |= (values[block.rows] == kind).any(0)
        for which, both in zip(rule.names, there[0] & there[1], strict=True):
            if not both:
                by = f" at finetune.threshold={rule.threshold}" if which == VALUE else ""
                mend = "threshold" if which == VALUE else "label"
                raise DataError(
                    f"{data.path}: the labels '{which}' to {name} are not of both kinds{by};"
                    f" choose another {mend}, a larger finetune.share or finetune.cohort"
                )
    return Labels(*parts)


def _leave_out(of_event: np.ndarray, share: float, seed: int) -> None:
    """Set [interactions] int8 to -1 where it is 0, but for a share that is drawn once."""
    count = int(np.count_nonzero(of_event == 0))
    kept = max(1, round(share * count))
    if kept >= count:
        return
    learnable, done = new_column(count, np.int64), 0
    for start in range(0, len(of_event), BLOCK_ROWS):
        here = start + np.flatnonzero(of_event[start : start + BLOCK_ROWS] == 0)
        learnable[done : done + len(here)] = here
        done += len(here)
    np.random.default_rng(seed).shuffle(learnable)
    of_event[learnable[kept:]] = -1
