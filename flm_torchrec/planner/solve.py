"""The plan of TorchRec's planner: the same plan every time, and a reason where nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Storage
from torchrec.distributed.types import PipelineType, ShardingPlan

from flm_torchrec.distributed.sharders import sharders
from flm_torchrec.errors import ConfigError
from flm_torchrec.planner.estimate import DENSE_BYTES, DENSE_PARTS, RESERVED, Enumerator, Reservation
from flm_torchrec.planner.workload import Workload

GIB = 2**30
DENSE = "the dense part"
"""Stands in place of a table's name where the dense part alone does not fit."""


class Infeasible(ConfigError):
    """The tables do not fit.

    Attributes:
        table: the table at fault; `DENSE` where the dense part does not fit.
        gap: bytes that are missing: on one rank if this table alone is too large, else over all ranks.
    """

    def __init__(self, message: str, table: str, gap: int) -> None:
        super().__init__(message)
        self.table = table
        self.gap = gap


@dataclass(frozen=True)
class PlannedTables:
    """A plan with the planner's estimates for it: memory and time of each shard."""

    plan: ShardingPlan
    options: list[ShardingOption]
    topology: Topology
    enumerator: Enumerator
    constraints: dict[str, ParameterConstraints]

    def bags(self, table: str) -> list[float]:
        """Bags in a sample, for each feature of the table."""
        return self.constraints[table].num_poolings or []


def solve(
    workload: Workload, topology: Topology, constraints: dict[str, ParameterConstraints], pipeline: PipelineType
) -> PlannedTables:
    """Plan the tables of a workload. Needs no process group and no GPU, and gives the same plan every time.

    Args:
        constraints: by table, from `planner.constraints.constraints` with the look-ups of the workload.

    Raises:
        Infeasible: the dense part does not fit, or the tables beside it do not.
        ConfigError: a table has no sharding type or kernel left that the device offers.
    """
    model, batch_size, kinds = workload.model, workload.batch_size, sharders(workload.collectives)
    _refuse_dense(topology, workload.dense_bytes)
    reservation = Reservation(workload.dense_bytes, workload.sketch_bytes)
    enumerator = Enumerator(topology, batch_size, constraints, workload.optimizer, pipeline)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        storage_reservation=reservation,
        # Without TorchRec's grid search, which takes minutes for a thousand ranks.
        proposer=[GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        constraints=constraints,
        stats=[],
        debug=False,
    )
    try:
        plan = planner.plan(model, kinds)
    except PlannerError as error:
        free = reservation.reserve(topology, batch_size, model, kinds, constraints)
        raise _infeasible(enumerator.enumerate(model, kinds), free, error) from error
    except RuntimeError as error:
        if "No available sharding type" not in str(error):
            raise
        table = str(error).partition("constraints for ")[2].partition(".")[0]
        raise ConfigError(
            f"table '{table}': none of its sharding types and kernels is there on {topology.compute_device};"
            " loosen distributed.constraints or distributed.sharding"
        ) from error
    return PlannedTables(plan, planner._best_plan or [], topology, enumerator, constraints)


def _refuse_dense(topology: Topology, dense_bytes: int) -> None:
    """Raise Infeasible where the dense part alone needs more memory than a rank may fill."""
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
    """Name the table at fault and the missing bytes: a table whose shard fits on no rank, else the largest one."""
    room = free.devices[0].storage

    def missing(storage: Storage, times: int = 1) -> tuple[int, str, int]:
        """Missing bytes, the kind of memory that misses them, and the bytes that this memory has."""
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
    """The largest shard's bytes, of each kind of memory."""
    shards = [shard.storage for shard in option.shards if shard.storage]
    return Storage(hbm=max(shard.hbm for shard in shards), ddr=max(shard.ddr for shard in shards))


def _left_over(
    options: list[ShardingOption], missing: Callable[[Storage], tuple[int, str, int]], ranks: int
) -> tuple[str, int]:
    """Put each shard on the emptiest rank, the largest table first: the first table that does not fit, and its missing
    bytes."""
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
