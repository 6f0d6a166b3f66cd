"""TorchRec's planner, with exact optimizer state, the same plan every time, and a reason where nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, SharderDataMap, ShardingOption, Storage
from torchrec.distributed.types import ModuleSharder, PipelineType, ShardingPlan, ShardingType

from flm_torchrec.distributed.constraints import KERNELS
from flm_torchrec.distributed.sharders import SHARDING_TYPES, sharders
from flm_torchrec.errors import ConfigError

RESERVED = 0.15
"""Share of the memory kept from tables, for activations, batches and the allocator."""
DENSE_BYTES = 20
"""A dense parameter in training: fp32 weight, gradient, two AdamW moments, and its place in DDP's buckets."""
INT8_ROW_BYTES = 8
"""Scale and bias of a row of int8, float32 each."""
GIB = 2**30
TABLE_WISE = ShardingType.TABLE_WISE.value


class Infeasible(ConfigError):
    """The tables do not fit. `table` is at fault, by `gap` bytes: on each rank if it alone is too much."""

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
        Infeasible: the tables do not fit.
        ConfigError: a table has no sharding type or kernel left that the device offers.
    """
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
    return Solved(plan, planner._best_plan or [], topology, enumerator)


class Enumerator(EmbeddingEnumerator):
    """Each table's options in one order: TorchRec's comes out of a set of strings, another one in each process."""

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        optimizer: str,
        pipeline: PipelineType,
    ) -> None:
        storage = StorageEstimator(topology, constraints, pipeline, optimizer)
        perf = EmbeddingPerfEstimator(topology, constraints)
        super().__init__(topology, batch_size, constraints, [perf, storage])

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        tables = list(dict.fromkeys(option.fqn for option in options))
        whole = {option.fqn for option in options if option.sharding_type == TABLE_WISE}
        # A table too narrow to cut is the same thing column-wise as table-wise, and called by the plainer name.
        options = [o for o in options if o.num_shards > 1 or o.sharding_type == TABLE_WISE or o.fqn not in whole]
        return sorted(
            options,
            key=lambda option: (
                tables.index(option.fqn),
                SHARDING_TYPES.index(option.sharding_type),
                KERNELS.index(option.compute_kernel),
            ),
        )

    def split(self, option: ShardingOption) -> list[dict[str, Storage]]:
        """A chosen option's memory by shard: weights, optimizer, input_output, pipeline."""
        storage = next(e for e in self._estimators if isinstance(e, StorageEstimator))
        return storage.split(option, self._sharder_data_map)


class StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimate, with the embeddings' outputs, and the optimizer's state counted as FBGEMM holds it.

    TorchRec takes state to be as wide as the weights and spread over column-wise shards; FBGEMM's is float32, and
    row-wise Adagrad has one number for each row of each shard.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints],
        pipeline: PipelineType,
        optimizer: str,
    ) -> None:
        super().__init__(topology, constraints, pipeline_type=pipeline, run_embedding_at_peak_memory=True)
        self.optimizer = optimizer

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            for shard in option.shards:
                assert shard.storage is not None
                shard.storage = shard.storage + self._state(option, shard.size) + self._scales(option, shard.size)

    def split(self, option: ShardingOption, data: SharderDataMap) -> list[dict[str, Storage]]:
        """Memory of each shard: with and without look-ups, with and without the pipeline's copies."""
        plain = EmbeddingStorageEstimator(self._topology, self._constraints)
        idle, busy = _copy(option), _copy(option)
        idle.input_lengths = [0.0] * len(option.input_lengths)
        plain.estimate([idle], data)
        plain.estimate([busy], data)
        found = []
        for shard, without, used in zip(option.shards, idle.shards, busy.shards, strict=True):
            assert shard.storage and without.storage and used.storage
            state, scales = self._state(option, shard.size), self._scales(option, shard.size)
            found.append(
                {
                    "weights": without.storage + scales,
                    "optimizer": state,
                    "input_output": used.storage - without.storage,
                    "pipeline": shard.storage - used.storage - state - scales,
                }
            )
        return found

    def _state(self, option: ShardingOption, size: list[int]) -> Storage:
        return self._placed(option, state_bytes(self.optimizer, size[0], size[1]))

    def _scales(self, option: ShardingOption, size: list[int]) -> Storage:
        return self._placed(option, INT8_ROW_BYTES * size[0] if option.tensor.dtype == torch.int8 else 0)

    def _placed(self, option: ShardingOption, amount: int) -> Storage:
        on_device = option.compute_kernel == "fused" and self._topology.compute_device == "cuda"
        return Storage(hbm=amount, ddr=0) if on_device else Storage(hbm=0, ddr=amount)


class Reservation(FixedPercentageStorageReservation):
    """Keeps a share of the memory, and the dense part's, from the tables; on a CPU too, where TorchRec keeps none."""

    def __init__(self, dense_bytes: int) -> None:
        super().__init__(RESERVED)
        self.dense_bytes = dense_bytes

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        for device in reserved.devices:
            if topology.compute_device == "cuda":
                device.storage.hbm = max(0, device.storage.hbm - self.dense_bytes)
            else:
                device.storage.ddr = max(0, int(device.storage.ddr * (1 - RESERVED)) - self.dense_bytes)
        return reserved


def state_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Optimizer state of one shard as FBGEMM holds it, always float32."""
    numbers = {"sgd": 0, "rowwise_adagrad": rows, "adagrad": rows * columns, "adam": 2 * rows * columns}
    return 4 * numbers[optimizer]


def dense_bytes(model: nn.Module) -> int:
    """Memory of a rank that the dense part takes in training, activations aside."""
    sharded = {id(p) for sharder in sharders() for m in model.modules() if isinstance(m, sharder.module_type)
               for p in m.parameters()}  # fmt: skip
    return DENSE_BYTES * sum(p.numel() for p in model.parameters() if id(p) not in sharded)


def _copy(option: ShardingOption) -> ShardingOption:
    copied = ShardingOption.__new__(ShardingOption)
    copied.__dict__.update(option.__dict__)
    copied.shards = [type(shard)(shard.size, shard.offset) for shard in option.shards]
    return copied


def _infeasible(options: list[ShardingOption], free: Topology, error: PlannerError) -> Infeasible:
    """Which table is at fault: one that no rank can hold its part of, else the largest."""
    cuda = free.compute_device == "cuda"
    tier = "HBM" if cuda else "host memory"

    def device(storage: Storage | None) -> int:
        assert storage is not None
        return storage.hbm if cuda else storage.ddr

    room = device(free.devices[0].storage)
    shard: dict[str, ShardingOption] = {}
    whole: dict[str, int] = {}
    for option in options:
        total = device(option.total_storage)
        whole[option.name] = min(total, whole.get(option.name, total))
        if option.name not in shard or _largest(option, device) < _largest(shard[option.name], device):
            shard[option.name] = option
    worst = max(shard, key=lambda name: _largest(shard[name], device))
    need = _largest(shard[worst], device)
    if need > room:
        return Infeasible(
            f"table '{worst}' needs {_gib(need)} of {tier} on a rank, which has {_gib(room)} for tables:"
            f" {_gib(need - room)} too much",
            worst,
            need - room,
        )
    largest = max(whole, key=lambda name: whole[name])
    gap = sum(whole.values()) - room * free.world_size
    if gap > 0:
        return Infeasible(
            f"table '{largest}', the largest, needs {_gib(whole[largest])} of {tier} and all tables"
            f" {_gib(sum(whole.values()))}, but the {free.world_size} ranks have {_gib(room * free.world_size)} for"
            f" tables: {_gib(gap)} too much",
            largest,
            gap,
        )
    left, gap = _left_over(list(shard.values()), device, room, free.world_size)
    reason = " ".join(str(error).split())[-200:]
    return Infeasible(
        f"the tables fit the ranks' {tier} in all, but no way to share them out was found: table '{left or largest}'"
        f" lacks {_gib(gap)} on the emptiest rank" + ("" if left else f" ({reason})"),
        left or largest,
        gap,
    )


def _largest(option: ShardingOption, device: Callable[[Storage | None], int]) -> int:
    return max(device(shard.storage) for shard in option.shards)


def _left_over(
    options: list[ShardingOption], device: Callable[[Storage | None], int], room: int, ranks: int
) -> tuple[str, int]:
    """Put the largest first, each on the emptiest rank: the table that then has no place, and what it lacks."""
    free = [room] * ranks
    for option in sorted(options, key=lambda option: -_largest(option, device)):
        for shard in option.shards:
            emptiest = max(range(ranks), key=lambda rank: free[rank])
            free[emptiest] -= device(shard.storage)
            if free[emptiest] < 0:
                return option.name, -free[emptiest]
    return "", 0


def _gib(amount: float) -> str:
    return f"{amount / GIB:,.2f} GiB"
