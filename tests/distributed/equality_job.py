"""Run by test_sharding as one rank or several: sharded tables against a reference written out in plain PyTorch.

Arguments: a folder for checkpoints; ranks on a host, of which there are more than one in pretence. Fails on the first
difference; rank 0 prints a line a case that was equal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import sharding_plan
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from flm_torchrec.config.schema import DistributedConfig, TrainConfig
from flm_torchrec.distributed.comm import Comm, process_group, ranks_on_this_host
from flm_torchrec.distributed.shard import kernels, make_optimizer, set_step, shard
from flm_torchrec.distributed.sharders import BAG_TYPES, SHARDING_TYPES, BagSharder, SequenceSharder
from flm_torchrec.errors import ConfigError
from flm_torchrec.model.tables import LookUp, look_up_in_turn

ROWS = {"odd": 13, "few": 7}  # neither divides by the ranks
FEWER_THAN_RANKS = {"odd": 3, "few": 1}  # by rows, the last rank of four has none, and the others not of both
FEATURES = {"a": "odd", "b": "odd", "c": "few"}  # a and b share a table
POOLING = {"odd": PoolingType.MEAN, "few": PoolingType.SUM}
BATCH, STEPS, LR, EPS = 5, 4, 0.1, 1e-8
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
CUTS_ROWS = {"column_wise", "table_column_wise"}


class Holder(nn.Module):
    """Tables as a part of a model."""

    def __init__(self, tables: nn.Module, bags: bool) -> None:
        super().__init__()
        self.tables = tables
        self.bags = bags
        self.look_up: LookUp = look_up_in_turn

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        [found] = self.look_up([(self.tables, features)])
        if self.bags:  # empty bags may stand at the end, where ranks sum vectors
            return {k: v[: features.stride()] for k, v in found.to_dict().items()}
        return {k: v.values() for k, v in found.items()}


def new_tables(bags: bool, dim: int) -> nn.Module:
    names = {table: [f for f, t in FEATURES.items() if t == table] for table in ROWS}
    meta = torch.device("meta")
    if bags:
        return EmbeddingBagCollection(
            tables=[EmbeddingBagConfig(name=t, embedding_dim=dim, num_embeddings=n, feature_names=names[t],
                                       pooling=POOLING[t]) for t, n in ROWS.items()], device=meta)  # fmt: skip
    return EmbeddingCollection(
        tables=[EmbeddingConfig(name=t, embedding_dim=dim, num_embeddings=n, feature_names=names[t])
                for t, n in ROWS.items()], device=meta)  # fmt: skip


def plan_of(tables: nn.Module, kind: str, world: int, local: int) -> ShardingPlan:
    """Every table by `kind`, over all ranks where the kind splits tables."""
    ranks = list(range(world))
    generators = {
        "data_parallel": sharding_plan.data_parallel(),
        "table_wise": sharding_plan.table_wise(rank=world - 1),
        "row_wise": sharding_plan.row_wise(),
        "column_wise": sharding_plan.column_wise(ranks=ranks),
        "table_column_wise": sharding_plan.column_wise(ranks=ranks[-local:]),
        "table_row_wise": sharding_plan.table_row_wise(host_index=world // local - 1),
        "grid_shard": sharding_plan.grid_shard(host_indexes=[0]),
    }
    sharder = BagSharder() if isinstance(tables, EmbeddingBagCollection) else SequenceSharder()
    plan = sharding_plan.construct_module_sharding_plan(
        tables, dict.fromkeys(ROWS, generators[kind]), sharder=sharder, world_size=world, local_size=local,
        device_type="cpu",
    )  # fmt: skip
    for choice in plan.values():
        choice.sharding_type = kind
        choice.compute_kernel = "dense" if kind == "data_parallel" else "fused"
    return ShardingPlan({"tables": plan})


def batch_of(step: int, rank: int) -> KeyedJaggedTensor:
    """Repeated rows, empty bags and a last row of each table among them; more bags on later ranks."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    lengths = torch.randint(0, 4, (len(FEATURES), BATCH + rank), generator=generator)
    values = [torch.randint(0, ROWS[t], (int(n.sum()),), generator=generator)
              for t, n in zip(FEATURES.values(), lengths, strict=True)]  # fmt: skip
    return KeyedJaggedTensor(keys=list(FEATURES), values=torch.cat(values), lengths=lengths.flatten())


@dataclass
class Reference:
    """The unsharded tables, their Adagrad written out: s += g^2 (its mean over the row), w -= lr g / (sqrt s + eps)."""

    bags: bool
    optimizer: str
    weights: dict[str, Tensor]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, bags: bool, optimizer: str, weights: dict[str, Tensor]) -> Reference:
        rowwise = optimizer == "rowwise_adagrad"
        state = {t: torch.zeros(len(w) if rowwise else w.shape) for t, w in weights.items()}
        return cls(bags, optimizer, {t: w.clone().requires_grad_() for t, w in weights.items()}, state)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        found = {}
        for name, table in FEATURES.items():
            one = features[name]
            rows = self.weights[table][one.values()]
            if self.bags:
                bag = torch.repeat_interleave(torch.arange(features.stride()), one.lengths())
                rows = torch.zeros(features.stride(), rows.shape[1]).index_add(0, bag, rows)
                if POOLING[table] is PoolingType.MEAN:
                    rows = rows / one.lengths().clamp(min=1)[:, None]
            found[name] = rows
        return found

    def step(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        with torch.no_grad():
            for (table, weight), g in zip(self.weights.items(), gradients, strict=True):
                state = self.state[table]
                if self.optimizer == "rowwise_adagrad":
                    state += g.square().mean(1)
                    weight -= LR * g / (state.sqrt() + EPS)[:, None]
                else:
                    state += g.square()
                    weight -= LR * g / (state.sqrt() + EPS)


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """Not linear, so a wrong output is a wrong gradient; no gradient near 0, which Adagrad would blow up to a step."""
    return sum(((out - 3) / (n + 1)).square().sum() for n, out in enumerate(outputs.values()))  # type: ignore[return-value]


def whole(tensor: ShardedTensor | None, size: torch.Size) -> Tensor:
    """All ranks' shards in one tensor, on every rank; None where this rank has none."""
    full = torch.zeros(size)
    for part in tensor.local_shards() if tensor is not None else []:
        place = tuple(slice(o, o + n) for o, n in
                      zip(part.metadata.shard_offsets, part.metadata.shard_sizes, strict=True))  # fmt: skip
        full[place] += part.tensor
    dist.all_reduce(full)
    return full


class Sharded:
    """What the project makes of the tables under one plan."""

    def __init__(self, bags: bool, dim: int, kind: str, optimizer: str, comm: Comm, local: int) -> None:
        tables = new_tables(bags, dim)
        plan = plan_of(tables, kind, comm.world_size, local)
        config = TrainConfig(sparse_optimizer=optimizer, sparse_lr=LR)  # type: ignore[arg-type]
        self.model: DistributedModelParallel = shard(Holder(tables, bags), plan, comm, config)
        self.optimizer = make_optimizer(self.model, config)
        self.dim = dim

    def weights(self) -> dict[str, Tensor]:
        found = {name.split(".")[-2]: t for name, t in self.model.state_dict().items()}
        return {table: whole(found[table], torch.Size([n, self.dim])) for table, n in ROWS.items()}

    def state(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {key.split(".")[-2]: t for of in self.model.fused_optimizer.state_dict()["state"].values()
                 for key, t in of.items() if key.endswith(".momentum1")}  # fmt: skip
        return {table: whole(found.get(table), s.shape) for table, s in like.items()}

    def checkpoint(self) -> dict[str, object]:
        # A rank without a row has no state, and an empty dict would be asked for as if it were a tensor.
        state = self.model.fused_optimizer.state_dict()
        return {"model": self.model.state_dict()} | ({"optimizer": state} if state["state"] else {})


def train_and_compare(sharded: Sharded, reference: Reference, comm: Comm, first: int, steps: int) -> None:
    """Outputs of every step, then weights and state: state is the sum of squared gradients, so backward is seen."""
    for step in range(first, first + steps):
        outputs = sharded.model(batch_of(step, comm.rank))
        expected = [reference.forward(batch_of(step, rank)) for rank in range(comm.world_size)]
        for name, out in outputs.items():
            torch.testing.assert_close(out, expected[comm.rank][name], **CLOSE)
        sharded.optimizer.zero_grad()
        loss_of(outputs).backward()
        sharded.optimizer.step()
        reference.step(sum(loss_of(e) for e in expected) / comm.world_size)  # type: ignore[arg-type]
    compare(sharded, reference)


def compare(sharded: Sharded, reference: Reference) -> None:
    for table, weight in sharded.weights().items():
        torch.testing.assert_close(weight, reference.weights[table].detach(), **CLOSE)
    for table, state in sharded.state(reference.state).items():
        assert state.count_nonzero() > 0
        torch.testing.assert_close(state, reference.state[table], **CLOSE)


def cases(bags: bool) -> dict[str, list[str]]:
    """By optimizer, the sharding types that go with it."""
    types = BAG_TYPES if bags else SHARDING_TYPES
    return {"rowwise_adagrad": [t for t in types if t not in CUTS_ROWS], "adagrad": types}


def check_reshards(sharded: list[Sharded], reference: Reference, folder: Path, comm: Comm) -> None:
    """Weights and optimizer state go from plan to plan, once round, and train on as the unsharded tables do."""
    for n, (old, new) in enumerate(pairwise([*sharded, sharded[0]])):
        dcp.save(old.checkpoint(), checkpoint_id=folder / str(n))
        state = new.checkpoint()
        dcp.load(state, checkpoint_id=folder / str(n))
        new.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        if "optimizer" in state:
            new.model.fused_optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        compare(new, reference)
        train_and_compare(new, reference, comm, STEPS + n, 1)


def check_cut_rows_are_refused(bags: bool, comm: Comm, local: int) -> None:
    try:
        Sharded(bags, 8, "column_wise", "rowwise_adagrad", comm, local)
    except ConfigError as error:
        assert "table 'odd': column_wise cuts its rows" in str(error)
    else:
        assert comm.world_size == 1


def check_types(bags: bool, dims: Sequence[int], folder: Path, comm: Comm, local: int) -> None:
    """Each sharding type learns as the unsharded tables do, and its state goes to each other type."""
    for dim, (optimizer, types) in product(dims, cases(bags).items()):
        sharded = [Sharded(bags, dim, kind, optimizer, comm, local) for kind in types]
        references = [Reference.of(bags, optimizer, s.weights()) for s in sharded]
        for kind, one, reference in zip(types, sharded, references, strict=True):
            train_and_compare(one, reference, comm, 0, STEPS)
            if comm.main:
                print("equal", folder.name, "bags" if bags else "sequence", dim, kind, optimizer)
        if dim == 8:
            check_reshards(sharded, references[0], folder / f"{bags}-{optimizer}", comm)


def check_steps_reach_the_kernels(comm: Comm, local: int) -> None:
    """A resumed run tells every kernel its step, of tables and of parts of tables."""
    for bags in (True, False):
        model = Sharded(bags, 8, "row_wise", "adagrad", comm, local).model
        set_step(model, 7)
        counted = [int(kernel.iter[0]) for kernel in kernels(model)]
        assert counted and set(counted) == {7}, counted


def check_what_is_not_offered(comm: Comm, local: int) -> None:
    """The reasons that sharders.py gives. When one fails here after an upgrade, that type can be offered."""
    parallel = Sharded(True, 8, "data_parallel", "rowwise_adagrad", comm, local)
    loss_of(parallel.model(batch_of(0, comm.rank))).backward()
    assert not parallel.model.fused_optimizer.state_dict()["state"]

    grid = Sharded(True, 8, "grid_shard", "adagrad", comm, local)
    found = grid.model(batch_of(0, comm.rank))
    expected = Reference.of(True, "adagrad", grid.weights()).forward(batch_of(0, comm.rank))
    torch.testing.assert_close(found["c"], expected["c"], **CLOSE)  # SUM
    count = batch_of(0, comm.rank)["a"].lengths().clamp(min=1)[:, None]
    torch.testing.assert_close(found["a"], expected["a"] * count, **CLOSE)  # MEAN, not divided


def main(folder: Path) -> None:
    with process_group(DistributedConfig(device="cpu", threads=1)) as comm:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        # Which shares out the cores, whatever the launcher says.
        assert ranks_on_this_host(comm) == comm.world_size
        for bags in (True, False):
            check_cut_rows_are_refused(bags, comm, local)
            check_types(bags, (8, 64), folder / "many", comm, local)
        check_what_is_not_offered(comm, local)
        check_steps_reach_the_kernels(comm, local)
        ROWS.update(FEWER_THAN_RANKS)
        for bags in (True, False):
            check_types(bags, (8,), folder / "few", comm, local)


if __name__ == "__main__":
    os.environ["LOCAL_WORLD_SIZE"] = sys.argv[2]
    main(Path(sys.argv[1]))
