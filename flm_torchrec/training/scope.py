"""Which events a run learns from and which ids it then knows: of pretraining, or of a fine-tuning's cohort."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flm_torchrec.config import Config
from flm_torchrec.data.cohort import Labels, label_events, of_cohort
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.splits import Examples, Splits, split, split_by
from flm_torchrec.data.survey import Stream, StreamedData, hide_values, load_streamed
from flm_torchrec.training.identity import has_ids_of, read_config

ANY_RANKS = ("distributed.plan=", "distributed.replicas=1")
"""Laid over a run's config where it is read back: its plan and replicas may be for another number of ranks."""
IN_MEMORY = "data.stream=false"
"""Laid over it where every user's events are needed."""


@dataclass(frozen=True)
class Scope:
    """What a run may use of the data in memory, and of its stream if it has one."""

    splits: Splits
    fit: np.ndarray  # [interactions] bool: events it learns from
    known: np.ndarray  # [interactions] bool: events that its ids were learnt from, those of its source included
    labels: Labels | None = None
    stream: Stream | None = None

    @property
    def learnt_from(self) -> int:
        """Training events."""
        return int(self.fit.sum()) if self.stream is None else self.stream.fit_rows


def load_data(config: Config) -> PreparedData:
    """The data that the config names, as the model may see it."""
    chosen = config.data
    data: PreparedData
    if chosen.stream:
        data = load_streamed(
            Path(chosen.path), chosen.features, chosen.split, chosen.holdout, config.train.eval_users, config.train.seed
        )
    else:
        data = load_prepared(chosen.path, chosen.features)
    tells_labels = config.finetune.source and config.finetune.task == "label"
    # Fine-tuning for labels makes them of the values, and hides these from the model itself.
    return data if chosen.values or tells_labels else hide_values(data)


def scope_of(config: Config, data: PreparedData) -> Scope:
    """The scope that the config describes, the same whenever it is asked for.

    Raises:
        FlmError: the split leaves nothing, or the source of a fine-tuning is no run.
    """
    tuning = config.finetune
    if isinstance(data, StreamedData):
        splits = split_by(data, data.stream.rule)
        return Scope(splits, splits.fit(data), splits.fit(data), stream=data.stream)
    if not tuning.source:
        splits = split(data, config.data.split, config.data.holdout)
        return Scope(splits, splits.fit(data), splits.fit(data))
    seen = np.zeros(len(data.item), bool)
    source = Path(tuning.source)
    if has_ids_of(source, data.path, data.fingerprint):
        seen = scope_of(read_config(source), data).known
    users = data.event_users()
    cohort = np.ones(data.schema.users, bool)
    if tuning.cohort == "new":
        cohort[users[seen]] = False
    labels = None
    if tuning.task == "label":
        labels = label_events(data, cohort, tuning.threshold, tuning.share, config.train.seed)
        splits = spans_of(data, labels.fit)
    else:
        whole = split(data, config.data.split, config.data.holdout)
        splits = of_cohort(whole, data, cohort, tuning.share, config.train.seed)
    fit = splits.fit(data)
    return Scope(splits, fit, fit | seen if tuning.start == "pretrained" else fit, labels)


def spans_of(data: PreparedData, labels: np.ndarray) -> Splits:
    """All events of the users who have a label, nothing to predict by rank."""
    users = data.event_users()
    labelled = np.isin(np.arange(data.schema.users), users[~np.isnan(labels)])
    ends = np.where(labelled, data.offsets[1:], data.offsets[:-1])
    nobody = Examples(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Splits(ends, nobody, nobody)
