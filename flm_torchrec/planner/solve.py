"""TorchRec's planner, with exact optimizer state, the same plan every time, and a reason where nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Storage
from torchrec.distributed.types import PipelineType, ShardingPlan

from flm_torchrec.distributed.sharders import sharders
from flm_torchrec.errors import ConfigError
from flm_torchrec.planner.estimate import DENSE_BYTES, DENSE_PARTS, RESERVED, Enumerator, Reservation

GIB = 2**30
DENSE = "the dense part"
"""In place of a table's name, where it alone does not fit."""


class Infeasible(ConfigError):
    """The tables do not fit. `table` is at fault, by `gap` bytes: on each rank if it alone is too much.

    `table` is `DENSE` where the dense part does not fit.
    """

    def __init__(self, message: str, table: str, gap: int) -> None:
        super().__init__(message)
        self.table = table
        self.gap = gap


@dataclass(frozen=True)
class Solved:
    """A plan with what the planner knows of it: memory and time of each shard."""

    plan: ShardingPlan
    options: list[ShardingOption]
    topology: Topology
    enumerator: Enumerator
    constraints: dict[str, ParameterConstraints]

    def bags(self, table: str) -> list[float]:
        """Of one sample, for each feature of the table."""
        return self.constraints[table].num_poolings or []


def solve(
    model: nn.Module,
    topology: Topology,
    batch_size: int,
    constraints: dict[str, ParameterConstraints],
    optimizer: str,
    dense_bytes: int,
    pipeline: PipelineType,
) -> Solved:
    """Plan the model's tables; needs no process group and no GPU, and gives the same plan every time.

    Args:
        batch_size: samples per rank and step.
        dense_bytes: of a rank's memory that the dense part takes.

    Raises:
        Infeasible: the dense part does not fit, or the tables beside it do not.
        ConfigError: a table has no sharding type or kernel left that the device offers.
    """
    _refuse_dense(topology, dense_bytes)
    enumerator = Enumerator(topology, batch_size, constraints, optimizer, pipeline)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        storage_reservation=Reservation(dense_bytes),
        # Not the search of the whole grid: with a thousand ranks it takes minutes.
        proposer=[GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        constraints=constraints,
        stats=[],
        debug=False,
    )
    try:
        plan = planner.plan(model, sharders())
    except PlannerError as error:
        free = Reservation(dense_bytes).reserve(topology, batch_size, model, sharders(), constraints)
        raise _infeasible(enumerator.enumerate(model, sharders()), free, error) from error
    except RuntimeError as error:
        if "No available sharding type" not in str(error):
            raise
        table = str(error).partition("constraints for ")[2].partition(".")[0]
        raise ConfigError(
            f"table '{table}': none of its sharding types and kernels is there on {topology.compute_device};"
            " loosen distributed.constraints or distributed.sharding"
        ) from error
    return Solved(plan, planner._best_plan or [], topology, enumerator, constraints)


def _refuse_dense(topology: Topology, dense_bytes: int) -> None:
    """Raise Infeasible where the dense part alone is more than a rank may fill."""
    memory = topology.devices[0].storage
    there, tier = (memory.hbm, "HBM") if topology.compute_device == "cuda" else (memory.ddr, "host memory")
    room = int(there * (1 - RESERVED))
    if dense_bytes < room:
        return
    parameters = dense_bytes // DENSE_BYTES
    parts = " + ".join(f"{_gib(4 * copies * parameters)} of {name}" for name, copies in DENSE_PARTS.items())
    raise Infeasible(
        f"the dense part does not fit, whatever the tables take: its {parameters:,} parameters need {_gib(dense_bytes)}"
        f" on every rank ({parts}), which has {_gib(there)} of {tier}, {_gib(room)} of it to fill:"
        f" {_gib(dense_bytes - room)} too much. More ranks do not help: use a smaller dense part"
        " (dense_parameters of --spec; model.dim, model.layers), ranks with more memory, or distributed.dense=fsdp,"
        " which 'flm train' alone counts",
        DENSE,
        dense_bytes - room,
    )


def _infeasible(options: list[ShardingOption], free: Topology, error: PlannerError) -> Infeasible:
    """Which table is at fault, and by how much: one that no rank can hold its part of, else the largest."""
    room = free.devices[0].storage

    def missing(storage: Storage, times: int = 1) -> tuple[int, str, int]:
        """What is lacking, of which memory, and what there is of it."""
        host = (storage.ddr - times * room.ddr, "host memory", times * room.ddr)
        return max(host, (storage.hbm - times * room.hbm, "HBM", times * room.hbm))

    best: dict[str, ShardingOption] = {}
    for option in options:
        if option.name not in best or missing(_largest(option)) < missing(_largest(best[option.name])):
            best[option.name] = option
    worst = max(best, key=lambda name: missing(_largest(best[name])))
    gap, tier, there = missing(_largest(best[worst]))
    if gap > 0:
        return Infeasible(
            f"table '{worst}' needs {_gib(gap + there)} of {tier} on a rank, which has {_gib(there)} for tables:"
            f" {_gib(gap)} too much",
            worst,
            gap,
        )
    largest = max(best, key=lambda name: missing(best[name].total_storage))
    total = reduce(Storage.__add__, (option.total_storage for option in best.values()))
    gap, tier, there = missing(total, free.world_size)
    if gap > 0:
        return Infeasible(
            f"all tables, '{largest}' the largest, need {_gib(gap + there)} of {tier}, but the {free.world_size} ranks"
            f" have {_gib(there)} for tables: {_gib(gap)} too much",
            largest,
            gap,
        )
    left, gap = _left_over(list(best.values()), missing, free.world_size)
    reason = " ".join(str(error).split())[-200:]
    return Infeasible(
        f"the tables fit the ranks' memory in all, but no way to share them out was found: table '{left or largest}'"
        + (f" lacks {_gib(gap)} on the emptiest rank" if left else f" is the largest ({reason})"),
        left or largest,
        gap,
    )


def _largest(option: ShardingOption) -> Storage:
    """Of each memory, what the shard with most of it takes."""
    shards = [shard.storage for shard in option.shards if shard.storage]
    return Storage(hbm=max(shard.hbm for shard in shards), ddr=max(shard.ddr for shard in shards))


def _left_over(
    options: list[ShardingOption], missing: Callable[[Storage], tuple[int, str, int]], ranks: int
) -> tuple[str, int]:
    """Put the largest first, each on the emptiest rank: the table that then has no place, and what it lacks."""
    taken = [Storage(hbm=0, ddr=0)] * ranks
    for option in sorted(options, key=lambda option: missing(_largest(option)), reverse=True):
        for shard in option.shards:
            assert shard.storage is not None
            emptiest = min(range(ranks), key=lambda rank: missing(taken[rank] + shard.storage))
            taken[emptiest] = taken[emptiest] + shard.storage
            if missing(taken[emptiest])[0] > 0:
                return option.name, missing(taken[emptiest])[0]
    return "", 0


def _gib(amount: float) -> str:
    return f"{amount / GIB:,.2f} GiB"
