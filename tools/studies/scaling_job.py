"""One rank of tools/studies/scaling_study.py: train some steps by a plan, and measure memory and what is sent.

Run by torchrun. Arguments: folder for what each rank measured, steps, overrides of the config.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec import products
from flm_torchrec.config import load_config
from flm_torchrec.data.batch import Batch
from flm_torchrec.distributed.candidates import CandidateRanks
from flm_torchrec.model import fused_softmax
from flm_torchrec.model.losses import Loss
from flm_torchrec.model.rows import Shared
from flm_torchrec.model.tower import Encoded
from flm_torchrec.training.checkpoint.state import leaves, own_bytes
from flm_torchrec.training.job import Job, open_inputs


class Sent(TorchDispatchMode):
    """Counts the collectives of the tables (TorchRec), of the dense part (DDP) and of the losses, and their bytes.

    `bytes` are those that leave the rank: of an all-to-all the parts for others, as its split sizes say; of the other
    collectives what a ring sends (docs/scaling.md), from the size of the tensors.
    """

    LOSS = ("all_gather", "gather_flat", "scatter_sum")
    """Methods of `CandidateRanks` that are collectives."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.in_loss = 0
        """Ranks that a collective of the losses is among, while it runs; else 0."""
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def watch(self, candidates: CandidateRanks) -> None:
        """Tell the collectives of the losses from the others."""
        for name in self.LOSS:
            ranks = self.ranks if name == "all_gather" else candidates.ranks
            setattr(candidates, name, partial(self._within, getattr(candidates, name), ranks))

    def _within(self, collective: Callable[[Tensor], Tensor], ranks: int, values: Tensor) -> Tensor:
        self.in_loss = ranks
        try:
            return collective(values)
        finally:
            self.in_loss = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            name = func.overloadpacket._qualified_op_name.partition("::")[2]
            part = "loss" if self.in_loss else "dense" if name in ("allreduce_", "broadcast_") else "tables"
            self.calls[part] += 1
            self.bytes[part] += self._sent(name, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: tuple[Any, ...]) -> int:
        ranks = self.in_loss or self.ranks
        others = ranks - 1
        if name == "alltoall_base_":
            payload, splits = args[1], args[4]
            rows = splits or [len(payload) // ranks] * ranks
            row = _bytes(payload) // max(1, len(payload))
            return (sum(rows) - rows[self.rank]) * row
        if name == "allreduce_":
            return 2 * others * _bytes(args[0]) // ranks
        if name == "_reduce_scatter_base_":
            return others * _bytes(args[1]) // ranks
        if name == "reduce_scatter_":
            return others * _bytes(args[1]) // ranks
        if name == "_allgather_base_":
            return others * _bytes(args[1])
        if name == "allgather_":
            return others * _bytes(args[1])
        if name in ("broadcast_", "barrier", "monitored_barrier_"):
            return 0
        raise ValueError(f"no rule for what {name} sends; add one")


def in_place_flop(_: Any, left: Sequence[int], right: Sequence[int], **rest: Any) -> int:
    """FLOP of `addmm_`, which PyTorch does not count, by the shapes of its factors."""
    return 2 * left[0] * left[1] * right[1]


class CountedLoss:
    """A loss, and the FLOP of its products of matrices: a softmax makes its gradients in its forward."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.flop = loss, 0
        self.learned, self.rows = loss.learned, loss.rows

    def __call__(self, batch: Batch, encoded: Encoded, shared: Shared) -> tuple[Tensor, dict[str, Tensor]]:
        with ExitStack() as stack:
            for code in (fused_softmax, products):  # PyTorch makes the same products, and counts them
                stack.enter_context(mock.patch.object(code, "_library", lambda: "not counted"))
            counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flop})
            counted = stack.enter_context(counter)
            found = self.loss(batch, encoded, shared)
        self.flop += counted.get_total_flops()
        return found


class Passing:
    """Bytes that go into the tables' look-ups on this rank, and that come out, over all steps."""

    def __init__(self, model: nn.Module) -> None:
        self.input, self.lengths, self.output = 0, 0, 0
        for module in model.modules():
            for lookup in getattr(module, "_lookups", []):
                lookup.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[KeyedJaggedTensor], output: Tensor) -> None:
        self.input += _bytes(inputs[0].values())
        self.lengths += _bytes(inputs[0].lengths())
        self.output += _bytes(output)


def main(folder: str, steps: int, overrides: list[str]) -> None:
    """Train some steps, and write what this rank measured to FOLDER/rankN.json."""
    config = load_config(None, ["distributed.threads=1", *overrides])
    with open_inputs(config) as inputs:
        comm = inputs.comm
        before = psutil.Process().memory_info().rss
        job = Job(inputs)
        passing = Passing(job.model)
        job.model.train()
        dense = job.model.module.dense
        sent, counts = Sent(comm.rank, comm.world_size), np.zeros(3)
        sent.watch(dense.gather)
        dense.losses = tuple(map(CountedLoss, dense.losses))
        for batch in islice(job.loader.after(0), steps):
            with sent:
                job.optimizer.zero_grad()
                loss, _ = job.model(batch)
                loss.backward()
                job.optimizer.step()
            counts += [len(batch.candidates), len(batch.targets), len(torch.unique(batch.targets))]
        measured = {
            "rank": comm.rank,
            "weights": _local(job.model.state_dict()),
            "optimizer": _local(job.model.fused_optimizer.state_dict()["state"]),
            "input": passing.input / steps,
            "lengths": passing.lengths / steps,
            "output": passing.output / steps,
            "dense_parameters": sum(p.numel() for p in job.model.module.dense.parameters()),
            "process_growth": psutil.Process().memory_info().rss - before,
            "sent": {name: amount / steps for name, amount in sorted(sent.bytes.items())},
            "calls": {name: amount / steps for name, amount in sorted(sent.calls.items())},
            "loss_flop": sum(loss.flop for loss in dense.losses) / steps,
            **dict(zip(("candidates", "targets", "items"), (counts / steps).tolist(), strict=True)),
        }
        (Path(folder) / f"rank{comm.rank}.json").write_text(json.dumps(measured, indent=2), encoding="utf-8")


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _local(state: dict[str, Any]) -> int:
    """Bytes of this rank's shards in a state, however deep."""
    return sum(own_bytes(tensor) for tensor in leaves(state) if isinstance(tensor, ShardedTensor))


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[2].isdigit():
        print(__doc__.strip())
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
