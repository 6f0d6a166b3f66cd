"""Look-ups of all tables of a step together: one exchange of sizes and one of ids, however many modules hold tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.distributed.dist_data import KJTAllToAllTensorsAwaitable, SplitsAllToAllAwaitable
from torchrec.distributed.embedding_sharding import (
    KJTListAwaitable,
    KJTSplitsAllToAllMeta,
    _set_sharding_context_intra_a2a,
)
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline.runtime_forwards import KJTAllToAllForward
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.distributed.comm import Comm

SUMMED_OVER_RANKS = {
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.GRID_SHARD.value,
}
"""Sharding types by which ranks sum parts of a pooled vector."""


class JointLookup:
    """Looks up in several sharded modules, where each module alone would exchange sizes, lengths and ids by itself.

    The parts are TorchRec's: its input pipeline, which GPUs train with, shares the exchange of sizes in the same way,
    but not that of lengths and ids. Outside of that pipeline, modules on a GPU look up in turn. Results are those of
    the modules called in turn, with empty bags at the end where ranks sum vectors.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.together = comm.device.type == "cpu"
        self.begun = False
        """TorchRec makes what distributes the ids of a module at its first call."""

    def __call__(self, asked: Sequence[tuple[nn.Module, KeyedJaggedTensor]]) -> list[Any]:
        """The output of each module for its features, as if it were called. Collective."""
        summed = [features for module, features in asked if sums_over_ranks(module)]
        padded = iter(as_long_on_each_rank(summed, self.comm))
        given: list[tuple[Any, KeyedJaggedTensor]] = [
            (module, next(padded) if sums_over_ranks(module) else features) for module, features in asked
        ]
        if not self.together or not self.begun:
            self.begun = True
            return [module(features) for module, features in given]
        contexts = [module.create_context() for module, _ in given]
        with _not_sent([module for module, _ in given]):
            requests = [
                module.input_dist(context, features)
                for (module, features), context in zip(given, contexts, strict=True)
            ]
        received = iter(_exchange([meta for request in requests for meta in request.awaitables]))
        found = []
        for (module, _), context, request in zip(given, contexts, requests, strict=True):
            parts = [next(received) for _ in request.awaitables]
            _set_sharding_context_intra_a2a(parts, context)
            found.append(module.compute_and_output_dist(context, KJTListAwaitable(parts, context).wait()))
        return found


def sums_over_ranks(module: nn.Module) -> bool:
    """Whether ranks sum parts of the vectors that a sharded module gives."""
    return any(
        not SUMMED_OVER_RANKS.isdisjoint(bags._sharding_types)
        for bags in module.modules()
        if isinstance(bags, ShardedEmbeddingBagCollection)
    )


def as_long_on_each_rank(features: Sequence[KeyedJaggedTensor], comm: Comm) -> list[KeyedJaggedTensor]:
    """With empty bags at the end, up to the largest number on any rank: a reduce-scatter over gloo needs equal parts.

    Collective, unless there are no features.
    """
    if not features:
        return []
    most = torch.stack(comm.all_gather(torch.tensor([part.stride() for part in features]))).amax(0).tolist()
    return [with_empty_bags(part, stride) for part, stride in zip(features, most, strict=True)]


def with_empty_bags(features: KeyedJaggedTensor, stride: int) -> KeyedJaggedTensor:
    """With empty bags at the end of each key, up to `stride` bags."""
    keys, missing = features.keys(), stride - features.stride()
    if missing <= 0:
        return features
    lengths = F.pad(features.lengths().view(len(keys), -1), (0, missing)).flatten()
    return KeyedJaggedTensor(keys, features.values(), lengths=lengths)


@contextmanager
def _not_sent(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the modules' `input_dist` says what is to be sent, and sends nothing."""
    inner = chain.from_iterable(module.modules() for module in modules)
    made = chain.from_iterable(getattr(part, "_input_dists", []) for part in inner)
    senders = [one._dist for one in made if hasattr(one, "_dist")]
    before = [sender.forward for sender in senders]
    for sender in senders:
        sender.forward = KJTAllToAllForward(sender._pg, sender._splits, sender._stagger)
    try:
        yield
    finally:
        for sender, forward in zip(senders, before, strict=True):
            sender.forward = forward


def _exchange(metas: Sequence[KJTSplitsAllToAllMeta]) -> list[KJTAllToAllTensorsAwaitable]:
    """Send what each of the requests has for the other ranks, all in one all-to-all after one of the sizes."""
    group = metas[0].pg
    told = iter(SplitsAllToAllAwaitable([sizes for meta in metas for sizes in meta.splits_tensors], group).wait())
    answers = [[next(told) for _ in meta.splits_tensors] for meta in metas]  # the last: rows of each rank
    tensors = [tensor for meta in metas for tensor in meta.input_tensors]
    sent = [sizes for meta in metas for sizes in meta.input_splits]
    due = [sizes for answer in answers for sizes in answer[:-1]]
    received = iter(_all_to_all(tensors, sent, due, group))
    found = []
    for meta, answer in zip(metas, answers, strict=True):
        # Given no tensors, TorchRec's class sends nothing: it rearranges what has been received.
        part = KJTAllToAllTensorsAwaitable(
            pg=group,
            input=meta._input,
            splits=meta.splits,
            input_splits=[],
            output_splits=[],
            input_tensors=[],
            labels=[],
            keys=meta.keys,
            device=meta.device,
            stagger=meta.stagger,
            stride_per_rank=answer[-1],
        )
        part._input_splits = dict(zip(meta.labels, meta.input_splits, strict=True))
        part._output_splits = dict(zip(meta.labels, answer[:-1], strict=True))
        part._output_tensors = [next(received) for _ in meta.labels]
        found.append(part)
    return found


def _all_to_all(
    tensors: Sequence[Tensor], sent: Sequence[list[int]], due: Sequence[list[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Integers [n] each → what the ranks have sent for them, rank after rank. Collective.

    Args:
        sent, due: by tensor and rank, how many go there, and come from there.
    """
    pieces = [tensor.long().split(sizes) for tensor, sizes in zip(tensors, sent, strict=True)]
    packed = torch.cat(list(chain.from_iterable(zip(*pieces, strict=True))))  # rank by rank, then tensor by tensor
    sizes_in, sizes_out = ([sum(of_rank) for of_rank in zip(*sizes, strict=True)] for sizes in (due, sent))
    received = packed.new_empty(sum(sizes_in))
    dist.all_to_all_single(received, packed, sizes_in, sizes_out, group=group)
    parts = received.split(list(chain.from_iterable(zip(*due, strict=True))))
    return [torch.cat(parts[n :: len(tensors)]).to(tensor.dtype) for n, tensor in enumerate(tensors)]
