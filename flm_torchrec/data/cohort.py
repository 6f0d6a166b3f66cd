"""What a fine-tuning learns from: a cohort of users, a share of their labelled events."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flm_torchrec.data.dataset import PreparedData
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

    def of(self, data: PreparedData) -> np.ndarray:
        """[interactions, labels] float32: 1 or 0."""
        found = np.empty((len(data.item), len(self.names)), np.float32)
        for number, name in enumerate(self.names):
            positive = data.value >= self.threshold if name == VALUE else data.event == data.schema.events.index(name)
            found[:, number] = positive
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
    of_event = np.where(data.of_targets(np.ones(len(data.item), bool)), np.repeat(part, np.diff(data.offsets)), -1)
    learnable = np.random.default_rng(seed).permutation(np.flatnonzero(of_event == 0))
    of_event[learnable[max(1, round(share * len(learnable))) :]] = -1
    label = rule.of(data)
    parts = [np.where((of_event == number)[:, None], label, np.float32(np.nan)) for number in range(3)]
    for name, values in zip(("learn from", "choose by", "test on"), parts, strict=True):
        for which, of_label in zip(rule.names, values.T, strict=True):
            if len(np.unique(of_label[~np.isnan(of_label)])) < 2:
                by = f" at finetune.threshold={rule.threshold}" if which == VALUE else ""
                mend = "threshold" if which == VALUE else "label"
                raise DataError(
                    f"{data.path}: the labels '{which}' to {name} are not of both kinds{by};"
                    f" choose another {mend}, a larger finetune.share or finetune.cohort"
                )
    return Labels(*parts)
