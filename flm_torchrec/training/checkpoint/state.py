"""A state as nested dicts of tensors: its names, its size, and a copy that training does not change."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.remote_device import _remote_device
from torch.distributed.tensor import DTensor

ROWS_AT_ONCE = 65536
"""Rows of a table whose numbers are looked at together."""


def leaves(state: Any) -> list[Any]:
    """The tensors of nested dicts."""
    return [leaf for value in state.values() for leaf in leaves(value)] if isinstance(state, dict) else [state]


def names(state: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the tensors of nested dicts, as DCP joins them: keys with dots between."""
    joined = []
    for key, value in state.items():
        joined += names(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return joined


def own_bytes(tensor: ShardedTensor) -> int:
    """Bytes of this rank's shards; its part of them where replicas hold the same, since a checkpoint has them once."""
    held = sum(shard.tensor.numel() * shard.tensor.element_size() for shard in tensor.local_shards())
    return held * dist.get_world_size(tensor._process_group) // dist.get_world_size()


def is_finite(tensor: Tensor | ShardedTensor) -> bool:
    """Whether all numbers of a tensor are finite, or of what this rank holds of it. Not collective."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not isinstance(tensor, ShardedTensor):
        return bool(tensor.isfinite().all())
    # Part by part, as the answers take memory too.
    return all(bool(rows.isfinite().all()) for s in tensor.local_shards() for rows in s.tensor.split(ROWS_AT_ONCE))


def copies(state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, copied to host memory that the next step does not change."""
    return {name: copies(v) if isinstance(v, dict) else _copy(v) for name, v in state.items()}


def _copy(tensor: Tensor | ShardedTensor) -> Tensor | ShardedTensor:
    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().to("cpu", copy=True)
    described = deepcopy(tensor.metadata())
    own = []
    for entry in described.shards_metadata:
        assert entry.placement is not None
        rank = entry.placement.rank()
        entry.placement = _remote_device(f"rank:{rank}/cpu")
        if rank == dist.get_rank():
            own.append(entry)
    shards = [
        Shard(shard.tensor.detach().to("cpu", copy=True), entry)
        for shard, entry in zip(tensor.local_shards(), own, strict=True)
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=described, process_group=tensor._process_group
    )
