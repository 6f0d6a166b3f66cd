"""Which events a run learns from, validates on and tests on, and which its ids are known from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flm_torchrec.config import Config
from flm_torchrec.data.cohort import LabelRule, Labels, label_events, of_cohort
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.splits import SAMPLE_SEED, Examples, Splits, SplitSettings, split, split_by
from flm_torchrec.data.survey import EventStream, StreamedData, hide_values, load_streamed, stream_of
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.data.weights import check_labels, label_weights, target_kinds
from flm_torchrec.training.follow.growth import FollowedData
from flm_torchrec.training.identity import has_ids_of, read_config

ANY_RANKS = ("distributed.plan=", "distributed.replicas=1", "distributed.collectives=fp32")
"""Overrides for reading a run back: its plan and its replicas may be for another number of ranks, and what it says must
not depend on that number, as rounded vectors do."""
IN_MEMORY = "data.stream=false"
"""Override for reading a run back: its events are read in order, and not shuffled."""


@dataclass(frozen=True)
class RunEvents:
    """The events of the data in memory that a run uses, by what it uses them for, and its stream if it has one."""

    splits: Splits
    learned_from: np.ndarray  # [interactions] bool: events the run learns from
    seen: np.ndarray  # [interactions] bool: events the model has learned from, in this run or in its source
    labels: Labels | None = None
    stream: EventStream | None = None

    @property
    def training_events(self) -> int:
        """Number of events that the run learns from."""
        return int(self.learned_from.sum()) if self.stream is None else self.stream.train_rows

    def stats(self, data: PreparedData, values: bool) -> TrainStats:
        """What the events that the model has learned from say of ids and values.

        Args:
            values: False hides the values from the model.
        """
        if self.stream is not None and values == (self.labels is None):
            return self.stream.stats
        if isinstance(data, FollowedData):
            return data.stats(self.seen, values)
        return TrainStats.of(data, self.seen, values)


def load_data(config: Config, on_disk: bool = False) -> PreparedData:
    """The data that the config names, as the model may see them.

    Args:
        on_disk: leave events on disk, to read them in order; those of `data.stream` stay there anyway, but for what
            pretraining validates on.

    Raises:
        DataError: the data are not there, or are broken.
    """
    settings = config.data
    data: PreparedData
    if settings.stream and not config.finetune.source:
        data = load_streamed(
            Path(settings.path),
            settings.features,
            SplitSettings(settings.split, settings.holdout, settings.target_events),
            config.train.eval_users,
            SAMPLE_SEED,
        )
    else:
        data = with_targets(load_prepared(settings.path, settings.features, on_disk=on_disk or settings.stream), config)
    learns_labels = config.finetune.source and config.finetune.task == "label"
    # Labels are made of the values. Fine-tuning for labels hides the values from the model itself.
    return data if settings.values or learns_labels else hide_values(data)


def with_targets(data: PreparedData, config: Config) -> PreparedData:
    """The data with the kinds of events that the config predicts.

    Raises:
        ConfigError: the data have no such kind.
    """
    targets = target_kinds(data.schema, config.data.target_events)
    return data if targets is data.targets else replace(data, targets=targets)  # a copy has to be digested anew


def events_of(config: Config, data: PreparedData) -> RunEvents:
    """The events of the run that the config describes: the same ones at each call.

    Raises:
        FlmError: the split leaves nothing, or the source of a fine-tuning is no run.
    """
    tuning = config.finetune
    if isinstance(data, StreamedData):
        assert data.stream.rule is not None
        splits = split_by(data, data.stream.rule)
        learned_from = splits.train_mask(data)
        return RunEvents(splits, learned_from, learned_from, stream=data.stream)
    if isinstance(data, FollowedData):
        own = events_of(config, data.before)
        return RunEvents(data.placed(own.splits), data.placed_mask(own.learned_from), data.placed_mask(own.seen))
    if not tuning.source:
        splits = split(data, config.data.split, config.data.holdout)
        learned_from = splits.train_mask(data)
        return RunEvents(splits, learned_from, learned_from)
    seen = data.no_events
    source = Path(tuning.source)
    if has_ids_of(source, data.path, data.fingerprint):
        made = read_config(source)
        seen = events_of(made, with_targets(data, made)).seen
    cohort = np.ones(data.schema.users, bool)
    if tuning.cohort == "new":
        cohort = ~data.users_of(seen)
    labels = None
    if tuning.task == "label":
        names = tuple(label_weights(tuning.labels))
        check_labels(data.schema, names)
        rule = LabelRule(names, tuning.threshold)
        labels = label_events(data, cohort, rule, tuning.share, config.train.seed)
        splits = spans_of(data, labels.train)
    else:
        of_everyone = split(data, config.data.split, config.data.holdout)
        splits = of_cohort(of_everyone, data, cohort, tuning.share, config.train.seed)
    learned_from = splits.train_mask(data)
    known = learned_from
    if tuning.start == "pretrained":
        known = data.column(bool, lambda block: learned_from[block.rows] | seen[block.rows])
    stream = None
    if config.data.stream and data.units is not None:
        stream = stream_of(data, splits.train_end, learned_from, TrainStats.of(data, known, values=labels is None))
    return RunEvents(splits, learned_from, known, labels, stream)


def spans_of(data: PreparedData, labels: np.ndarray) -> Splits:
    """All events of the users who have a label, to learn from; nothing to predict by rank.

    Args:
        labels: [interactions, labels] float32, NaN where there is none.
    """
    labelled = data.users_of(data.column(bool, lambda block: ~np.isnan(labels[block.rows]).all(1)))
    ends = np.where(labelled, data.offsets[1:], data.offsets[:-1])
    nobody = Examples(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Splits(ends, nobody, nobody)
