"""Weights averaged over steps: validated and saved in place of the newest ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor


class WeightAverage:
    """Exponential moving average of a sharded model's weights, each rank of its own shards (Izmailov et al., UAI 2018).

    Costs one more copy of every table and a pass over it at each update.

    Args:
        decay: share of the old mean kept at an update; 0 keeps no mean at all.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = list(_local(model)) if decay else []
        self.mean = [w.clone() for w in self.weights]
        self.updates = 0

    def update(self) -> None:
        """Take the newest weights in; the first few updates are a plain mean, so that the start is forgotten."""
        self.updates += 1
        weight = max(1 - self.decay, 1 / self.updates)
        if self.weights:
            torch._foreach_lerp_(self.mean, self.weights, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model holds the means."""
        newest = [w.clone() for w in self.weights]
        self._copy(self.mean)
        try:
            yield
        finally:
            self._copy(newest)

    def _copy(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)


def _local(model: nn.Module) -> Iterator[Tensor]:
    for tensor in model.state_dict().values():
        shards = [s.tensor for s in tensor.local_shards()] if isinstance(tensor, ShardedTensor) else [tensor]
        yield from (shard.detach() for shard in shards if shard.is_floating_point())
