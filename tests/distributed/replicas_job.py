"""Run by test_replicas on four ranks: tables in two replicas, and then the whole model.

Arguments: prepared data, folder for checkpoints, `all` or `some` cases of tables. Fails on the first difference; rank 0
prints a line a case that was equal.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.config import load_config
from flm_torchrec.config.schema import DistributedConfig, TrainConfig
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.distributed.replicas import average_replicas, group_of
from flm_torchrec.distributed.shard import make_optimizer, shard
from flm_torchrec.training.checkpoint.manager import CHECKPOINTS, Checkpoints, Progress
from flm_torchrec.training.checkpoint.state import own_bytes
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import Job, JobInputs
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS as STEPPERS
from tests.distributed.equality_job import (
    CLOSE,
    LR,
    ROWS,
    STEPS,
    Holder,
    Reference,
    Sharded,
    batch_of,
    cases,
    compare,
    loss_of,
    new_tables,
    plan_of,
)

REPLICAS = 2
FIXED = [
    "distributed.threads=1", "model.dim=16", "train.batch_size=32", "data.max_history=6", "loss.negatives=16",
    "train.sparse_lr=0.1",
    "model.dropout=0", "model.embedding_dropout=0", "model.id_dropout=0", "model.user_id_dropout=0", "loss.fused=1",
]  # fmt: skip
DIM = 8
STEPS_OF_MODEL = 5


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


def parts(model: DistributedModelParallel) -> dict[str, str]:
    """Digests of this rank's own weights and optimizer state."""
    found = dict(model.state_dict())
    for of in model.fused_optimizer.state_dict()["state"].values():
        found |= of
    return {
        f"{name} {n}": hashlib.sha256(part.tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in found.items()
        if isinstance(tensor, ShardedTensor)
        for n, part in enumerate(tensor.local_shards())
    }


def differing(model: DistributedModelParallel, comm: Comm) -> int:
    """How many parts are not the same bit for bit on the ranks that hold the same rows."""
    held = comm.gather(parts(model))
    count = 0
    for first in range(0, comm.world_size, REPLICAS):
        one, *others = held[first : first + REPLICAS]
        assert all(other.keys() == one.keys() for other in others)
        count += sum(part != other[name] for other in others for name, part in one.items())
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
        assert (differing(sharded.model, comm) == 0) == same
        average_replicas(sharded.model)
        assert differing(sharded.model, comm) == 0
        for replica, reference in enumerate(references):
            ranks = range(replica, comm.world_size, REPLICAS)
            losses = [loss_of(reference.forward(batch(rank))) for rank in ranks]
            reference.step(sum(losses) / len(losses))  # type: ignore[arg-type]
        mean(references)
    compare(sharded, references[0])


def check_tables(comm: Comm, all_cases: bool) -> None:
    for bags in (True, False):
        for optimizer, types in cases(bags).items():
            for kind in types:
                for same in (False, True) if all_cases else (optimizer == "adagrad",):
                    sharded = TwoDimensional(bags, kind, optimizer, comm)
                    weights = sharded.weights()
                    references = [Reference.of(bags, optimizer, weights) for _ in range(1 if same else REPLICAS)]
                    train(sharded, references, comm, same)
                    if comm.main:
                        print("equal", "bags" if bags else "sequence", kind, optimizer, "same" if same else "own")


def new_job(data: PreparedData, comm: Comm, *overrides: str) -> Job:
    config = load_config(None, [*FIXED, *overrides])
    return Job(JobInputs.of(config, data, comm))


def tables(job: Job) -> list[ShardedTensor]:
    return [tensor for tensor in job.model.state_dict().values() if isinstance(tensor, ShardedTensor)]


def losses_of(job: Job, first: int, count: int, kind: str = "cpu") -> list[list[float]]:
    """Global losses of so many steps of a kind that the training loop has; all replicas are equal after each."""
    comm, config = job.comm, job.config.train
    guard = Guard(comm, config.non_finite, Path(config.run))
    steps = STEPPERS[kind](job.model, job.optimizer, Schedule(job.optimizer, 0, 10_000), comm.device, guard)
    batches = islice(job.loader.after(first), count)
    found = []
    job.model.train()
    for step in range(first, first + count):
        outputs = steps.take(batches, step)
        assert outputs is not None
        found.append(comm.all_reduce_sum(torch.stack(list(outputs.losses.values()))).tolist())
        assert job.config.distributed.replicas == 1 or differing(job.model, comm) == 0
    return found


@contextmanager
def linear_adagrad() -> Iterator[None]:
    """Adagrad whose eps outweighs its state: in effect plain gradient descent, where averages are sums."""

    def apply(optimizer: type, parameters: Iterator[nn.Parameter], options: dict[str, float]) -> None:
        _apply_optimizer_in_backward(optimizer, parameters, {"lr": options["lr"] * 1e4, "eps": 1e4})

    with mock.patch("flm_torchrec.distributed.shard._apply_optimizer_in_backward", apply):
        yield


def check_model(data: PreparedData, folder: Path, comm: Comm) -> None:
    two = f"distributed.replicas={REPLICAS}"
    with linear_adagrad():
        plain = losses_of(new_job(data, comm, "train.sparse_lr=20"), 0, 6)
        still = losses_of(new_job(data, comm, "train.sparse_lr=0"), 0, 6)
        assert not torch.allclose(torch.tensor(still[-1]), torch.tensor(plain[-1]), rtol=1e-2)  # the tables do learn
        for dense in ("ddp", "fsdp"):
            found = losses_of(new_job(data, comm, "train.sparse_lr=20", two, f"distributed.dense={dense}"), 0, 6)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-4, atol=0)
    job = new_job(data, comm, "distributed.sharding=row_wise", two)
    first = losses_of(job, 0, STEPS_OF_MODEL)
    pipelined = losses_of(new_job(data, comm, "distributed.sharding=row_wise", two), 0, STEPS_OF_MODEL, "cuda")
    torch.testing.assert_close(torch.tensor(pipelined), torch.tensor(first), rtol=1e-6, atol=0)
    checkpoints = Checkpoints(folder, job.model, job.optimizer, comm, data.fingerprint)
    checkpoints.save(Progress(step=STEPS_OF_MODEL))
    checkpoints.finish()
    then = losses_of(job, STEPS_OF_MODEL, STEPS_OF_MODEL)
    assert sum(then[-1][:3]) < sum(first[0][:3])
    other = new_job(data, comm, "distributed.sharding=table_wise", two)
    restored = Checkpoints(folder, other.model, other.optimizer, comm, data.fingerprint).restore()
    assert restored is not None and restored[0].step == STEPS_OF_MODEL
    assert differing(other.model, comm) == 0
    torch.testing.assert_close(
        torch.tensor(losses_of(other, STEPS_OF_MODEL, STEPS_OF_MODEL)), torch.tensor(then), rtol=1e-4, atol=0
    )
    alone = new_job(data, comm, "distributed.sharding=row_wise")
    assert Checkpoints(folder, alone.model, alone.optimizer, comm, data.fingerprint).restore() is not None
    torch.testing.assert_close(
        torch.tensor(losses_of(alone, STEPS_OF_MODEL, 1)), torch.tensor(then[:1]), rtol=1e-4, atol=0
    )
    reckoned = [sum(comm.gather(sum(own_bytes(t) for t in tables(j)))) for j in (job, alone)]
    assert reckoned[0] == reckoned[1] > 0
    plainly = Checkpoints(folder / "alone", alone.model, alone.optimizer, comm, data.fingerprint)
    plainly.save(Progress(step=STEPS_OF_MODEL + 1))
    plainly.finish()
    folders = (folder / CHECKPOINTS, plainly.folder)
    written = [sum(file.stat().st_size for file in of.rglob("step-*/*.distcp")) for of in folders]
    assert abs(written[0] / written[1] - 1) < 0.1  # each shard once, not twice
    if comm.main:
        print("equal model")


def main(path: str, folder: str, which: str) -> None:
    with process_group(DistributedConfig(device="cpu", threads=1)) as comm:
        check_tables(comm, which == "all")
        check_model(load_prepared(path), Path(folder), comm)


if __name__ == "__main__":
    main(*sys.argv[1:])
