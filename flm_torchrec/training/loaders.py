"""Which loader a run has, and how its batches are shaped."""

from __future__ import annotations

import numpy as np

from flm_torchrec.config import Config
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.domain_shares import DomainShares, check_domains
from flm_torchrec.data.lanes import LanePlan
from flm_torchrec.data.loader import Loader, Sharing, TrainLoader
from flm_torchrec.data.negatives import DrawnShare, Negatives
from flm_torchrec.data.sketch import Sketches
from flm_torchrec.data.stream_loader import StreamLoader
from flm_torchrec.data.weights import kind_weights
from flm_torchrec.data.windows import windows
from flm_torchrec.distributed.candidates import CandidateRanks
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.training.run_events import RunEvents


def make_loader(data: PreparedData, events: RunEvents, config: Config, comm: Comm) -> Loader:
    """This rank's training batches."""
    # The share of a domain is counted in windows, which other cuts could give to another domain.
    moved = config.data.domain_weights == "natural"
    sharing = Sharing(config.train.batch_size, config.train.seed, comm.rank, comm.world_size, moved)
    if events.stream is not None:
        return _make_stream_loader(data, events, config, comm, sharing)
    spans = windows(data, events.splits, config.data.max_history)
    shares = DomainShares.of(data, spans, config.data.domain_weights)
    # How often an item is among the targets of a step follows from how often its events are learnt.
    counts = data.item_counts(events.learned_from)
    check_domains(data, counts)
    if shares is not None:
        counts = shares.item_counts(data, spans, events.learned_from)
    labels = events.labels.train if events.labels is not None else None
    drawn = config.loss.negatives if labels is None else 0
    assembler = Assembler(
        data,
        events.learned_from,
        stats=events.stats(data, values=labels is None),
        labels=labels,
        kind_weights=weights_of(data, config),
        sketches=Sketches(data, config.model.dim),
    )
    negatives = Negatives(counts, drawn, config.loss.negative_power, drawn_share(config, comm))
    return TrainLoader(spans, assembler, negatives, sharing, shares)


def _make_stream_loader(
    data: PreparedData, events: RunEvents, config: Config, comm: Comm, sharing: Sharing
) -> StreamLoader:
    stream, labels = events.stream, None if events.labels is None else events.labels.train
    assert stream is not None
    check_domains(data, stream.counts)
    plan = LanePlan(stream, config.data.max_history, sharing)
    kinds, sketches = weights_of(data, config), Sketches(data, config.model.dim)
    assembler = Assembler(data, events.learned_from, stream.stats, labels, kinds, sketches)
    drawn = config.loss.negatives if labels is None else 0
    negatives = Negatives(stream.counts, drawn, config.loss.negative_power, drawn_share(config, comm))
    return StreamLoader(plan, assembler, negatives)


def weights_of(data: PreparedData, config: Config) -> np.ndarray | None:
    """[kinds of events] float32: what a target of each counts; None: 1.

    Raises:
        ConfigError: `loss.event_weights` does not fit the data.
    """
    return kind_weights(data.schema, config.loss.event_weights, data.targets)


def drawn_share(config: Config, comm: Comm) -> DrawnShare:
    """Which of a step's negatives this rank looks up."""
    ranks = CandidateRanks(comm, config.loss.candidates)
    return DrawnShare(ranks.place, ranks.ranks, ranks.alone)
