"""What a config would ask of a cluster of any size: no process group, no GPU, no training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flm_torchrec.config import Config
from flm_torchrec.data.sketch import kept_bytes
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.planner.estimate import dense_bytes
from flm_torchrec.planner.workload import Workload
from flm_torchrec.training.build import make_model
from flm_torchrec.training.loaders import make_loader
from flm_torchrec.training.lookup_counts import lookups_of
from flm_torchrec.training.run_events import events_of, load_data
from flm_torchrec.training.step_work import small_config, step_work


def workload_per_rank(config: Config) -> Callable[[int], Workload]:
    """A function from the number of ranks to the work of each, by the prepared data's own sizes and look-ups.

    Raises:
        DataError: the data are not there.
    """
    data = load_data(config)
    events = events_of(config, data)

    def on_ranks(world_size: int) -> Workload:
        comm = Comm(0, world_size, world_size, torch.device("cpu"))
        model = make_model(data.schema, config, comm)
        loader = make_loader(data, events, config, comm)
        small = make_loader(data, events, small_config(config, world_size), comm)
        return Workload(
            model=model,
            batch_size=-(-config.train.batch_size // world_size),
            lookups=lookups_of(loader),
            optimizer=config.train.sparse_optimizer,
            dense_bytes=dense_bytes(model),
            sketch_bytes=kept_bytes(data.schema.items, config.model.dim),
            collectives=config.distributed.collectives,
            step=step_work(model, config, loader, small),
        )

    return on_ranks
