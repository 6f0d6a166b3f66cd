"""Run by test_replicas on four ranks: tables in two replicas against 2D parallelism written out in plain PyTorch.

Ranks on a host, of which there are two in pretence, come from the environment. Fails on the first difference; rank 0
prints a line a case that was equal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.config.schema import DistributedConfig, TrainConfig
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.distributed.replicas import average_replicas, group_of
from flm_torchrec.distributed.shard import make_optimizer, shard
from tests.equality_job import (
    CLOSE, LR, ROWS, STEPS, Holder, Reference, Sharded, batch_of, cases, compare, loss_of, new_tables, plan_of,
)  # fmt: skip

REPLICAS = 2
DIM = 8


class TwoDimensional(Sharded):
    """Two groups of two ranks."""

    def __init__(self, bags: bool, kind: str, optimizer: str, comm: Comm) -> None:
        tables = new_tables(bags, DIM)
        group = group_of(comm, REPLICAS)
        plan = plan_of(tables, kind, group.world_size, group.local_world_size)
        config = TrainConfig(sparse_optimizer=optimizer, sparse_lr=LR)  # type: ignore[arg-type]
        self.model = shard(Holder(tables, bags), plan, comm, config, replicas=REPLICAS)
        self.optimizer = make_optimizer(self.model, config)
        self.dim = DIM

    def weights(self) -> dict[str, Tensor]:
        return {table: found / REPLICAS for table, found in super().weights().items()}

    def state(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {table: found / REPLICAS for table, found in super().state(like).items()}


def parts(sharded: TwoDimensional) -> dict[str, Tensor]:
    """This rank's own weights and optimizer state."""
    found = dict(sharded.model.state_dict())
    for of in sharded.model.fused_optimizer.state_dict()["state"].values():
        found |= of
    return {
        f"{name} {n}": part.tensor.detach().clone()
        for name, tensor in found.items()
        if isinstance(tensor, ShardedTensor)
        for n, part in enumerate(tensor.local_shards())
    }


def differing(sharded: TwoDimensional, comm: Comm) -> int:
    """How many parts are not the same bit for bit on the ranks that hold the same rows."""
    held = comm.gather(parts(sharded))
    count = 0
    for first in range(0, comm.world_size, REPLICAS):
        one, *others = held[first : first + REPLICAS]
        assert all(other.keys() == one.keys() for other in others)
        count += sum(not torch.equal(part, other[name]) for other in others for name, part in one.items())
    assert sum(len(one) for one in held) > 0
    return count


def mean(references: list[Reference]) -> None:
    with torch.no_grad():
        for kind in ("weights", "state"):
            for table in ROWS:
                tensors = [getattr(reference, kind)[table] for reference in references]
                average = torch.stack(tensors).mean(0)
                for tensor in tensors:
                    tensor.copy_(average)


def train(sharded: TwoDimensional, references: list[Reference], comm: Comm, same: bool) -> None:
    """Each group steps by the mean loss of its own ranks, then both take the mean of weights and state.

    Args:
        references: one per group, or one for both where they see the same batches.
    """
    for step in range(STEPS):

        def batch(rank: int, step: int = step) -> KeyedJaggedTensor:
            return batch_of(step, rank // REPLICAS if same else rank)

        outputs = sharded.model(batch(comm.rank))
        own = references[comm.rank % len(references)].forward(batch(comm.rank))
        for name, out in outputs.items():
            torch.testing.assert_close(out, own[name], **CLOSE)
        sharded.optimizer.zero_grad()
        loss_of(outputs).backward()
        sharded.optimizer.step()
        assert (differing(sharded, comm) == 0) == same
        average_replicas(sharded.model)
        assert differing(sharded, comm) == 0
        for replica, reference in enumerate(references):
            ranks = range(replica, comm.world_size, REPLICAS)
            losses = [loss_of(reference.forward(batch(rank))) for rank in ranks]
            reference.step(sum(losses) / len(losses))  # type: ignore[arg-type]
        mean(references)
    compare(sharded, references[0])


def main() -> None:
    with process_group(DistributedConfig(device="cpu", threads=1)) as comm:
        for bags in (True, False):
            for optimizer, types in cases(bags).items():
                for kind in types:
                    for same in (False, True):
                        sharded = TwoDimensional(bags, kind, optimizer, comm)
                        weights = sharded.weights()
                        references = [Reference.of(bags, optimizer, weights) for _ in range(1 if same else REPLICAS)]
                        train(sharded, references, comm, same)
                        if comm.main:
                            print("equal", "bags" if bags else "sequence", kind, optimizer, "same" if same else "own")


if __name__ == "__main__":
    main()
