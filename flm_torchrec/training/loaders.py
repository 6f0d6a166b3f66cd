"""Which loader a run has, and how its batches are shaped."""

from __future__ import annotations

import numpy as np

from flm_torchrec.config import Config
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.loader import Loader, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.stream_loader import StreamLoader
from flm_torchrec.data.survey import Stream
from flm_torchrec.data.windows import windows
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.training.run_events import RunEvents


def make_loader(data: PreparedData, events: RunEvents, config: Config, comm: Comm) -> Loader:
    """This rank's training batches."""
    if events.stream is not None:
        return _make_stream_loader(data, events.stream, config, comm)
    counts = np.bincount(data.item[events.learned_from], minlength=data.schema.items)
    labels = events.labels.fit if events.labels is not None else None
    drawn = config.loss.negatives if labels is None else 0
    sequences = -(-config.train.batch_size // comm.world_size)
    return TrainLoader(
        windows(data, events.splits, config.data.max_history),
        Assembler(
            data,
            events.learned_from,
            item_rows=_most_items(data.schema, config, comm, sequences),
            labels=labels,
            known=events.seen,
        ),
        Negatives(counts, drawn, config.loss.negative_power),
        config.train.batch_size,
        config.train.seed,
        comm.rank,
        comm.world_size,
    )


def _make_stream_loader(data: PreparedData, stream: Stream, config: Config, comm: Comm) -> StreamLoader:
    assembler = Assembler(data, np.zeros(len(data.item), bool), known=stream.known)
    loader = StreamLoader(
        stream,
        assembler,
        Negatives(stream.counts, config.loss.negatives, config.loss.negative_power),
        config.data.max_history,
        config.train.batch_size,
        config.train.seed,
        comm.rank,
        comm.world_size,
    )
    assembler.item_rows = _most_items(data.schema, config, comm, loader.most_sequences(config.train.epochs))
    return loader


def _most_items(schema: Schema, config: Config, comm: Comm, sequences: int) -> int:
    """Maximum of different items in a rank's batch of so many sequences; 0 on one rank, where none must agree."""
    if comm.world_size == 1:
        return 0
    drawn = schema.items if config.loss.negatives == "all" else config.loss.negatives
    return min(schema.items, sequences * (config.data.max_history + 1) + -(-drawn // comm.world_size))
