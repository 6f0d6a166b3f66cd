"""What a rank of a config does in a step beside the tables: counted in batches, with no process group and no GPU."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flm_torchrec.config import Config
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.loader import Loader
from flm_torchrec.model.linear import Linear
from flm_torchrec.model.pretrain import PretrainModel
from flm_torchrec.model.tower import EmbeddingOutputs
from flm_torchrec.planner.loss_work import LossWork
from flm_torchrec.planner.step import StepWork
from flm_torchrec.training.guard import as_arrays
from flm_torchrec.training.lookup_counts import BATCHES

MOST_SEQUENCES = 64
"""Sequences that the products of the tower are counted with; those of a batch are counted by their share."""
PASSES = 3
"""Of the products of a forward: itself, and two as large in backward, for the inputs and for the weights."""


def step_work(model: PretrainModel, config: Config, loader: Loader, small: Loader) -> StepWork:
    """The work of a rank, from its first batches.

    Args:
        small: the loader of the same data with `MOST_SEQUENCES` sequences a rank at most.
    """
    batches = list(islice(loader.epoch(0), BATCHES))
    schema, loss = loader.assembler.data.schema, config.loss
    work = LossWork(
        dim=config.model.dim,
        negatives=schema.items if loss.negatives == "all" else loss.negatives,
        targets=float(np.mean([len(batch.targets) for batch in batches])),
        items=float(np.mean([len(torch.unique(batch.targets)) for batch in batches])),
        softmaxes=_softmaxes(config),
        collectives=config.distributed.collectives,
        every=loss.negatives == "all",
    )
    counted = next(islice(small.epoch(0), 1))
    sequences = np.mean([len(batch.lengths) for batch in batches]) / len(counted.lengths)
    return StepWork(
        loss=work,
        candidates=loss.candidates,
        precision=loss.precision,
        dense_flop=float(dense_flop(model, counted) * sequences),
        input_bytes=float(np.mean([input_bytes(batch) for batch in batches])),
        steps=len(loader),
    )


def small_config(config: Config, ranks: int) -> Config:
    """The config with the batch size of `step_work`'s small loader."""
    size = min(config.train.batch_size, MOST_SEQUENCES * ranks)
    return replace(config, train=replace(config.train, batch_size=size))


def dense_flop(model: PretrainModel, batch: Batch) -> int:
    """FLOP of the tower's products for a batch, forward and backward, counted by PyTorch; its tables are not read."""
    tower = deepcopy(model.tower).train()
    for layer in tower.modules():
        if isinstance(layer, Linear):
            layer.plain = True
    # Not every fused kernel of attention is counted, nor native code of it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as products:
        tower(_embedded(model, batch), batch)
    return PASSES * products.get_total_flops()


def input_bytes(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    return sum(array.nbytes for name, array in as_arrays(batch).items() if not name.endswith(".keys"))


def _embedded(model: PretrainModel, batch: Batch) -> EmbeddingOutputs:
    """Zeros in place of what the tables give for a batch."""
    dense, dim = model.dense, model.tower.config.dim
    items, users, tokens = len(batch.items), len(batch.lengths), len(batch.tokens)
    shapes = {
        "item_features": (items, len(dense.item_keys) * dim),
        "user": (users, len(dense.user_keys) * dim),
        "history": (tokens, model.tower.event.in_features - 1),
        "context": (tokens, dim),
    }
    names = [field.name for field in fields(EmbeddingOutputs)]
    zeros: dict[str, Tensor] = {name: torch.zeros(shapes.get(name, (items, dim))) for name in names}
    return EmbeddingOutputs(**zeros)


def _softmaxes(config: Config) -> int:
    """`LossWork.softmaxes`: of each representation with a weight, and of that with an event left out."""
    loss = config.loss
    weights = (loss.content, loss.collaborative, loss.sequential, loss.collaborative * loss.left_out)
    return sum(weight > 0 for weight in weights) + 2 * (loss.fused > 0)
