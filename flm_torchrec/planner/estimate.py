"""Memory and time of each sharding option: TorchRec's estimates, corrected where the memory is known exactly."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Shard, SharderDataMap, ShardingOption, Storage
from torchrec.distributed.types import ModuleSharder, PipelineType, ShardingType
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from flm_torchrec.distributed.sharders import sharders
from flm_torchrec.planner.constraints import KERNELS, TableConstraints, offered_types

RESERVED = 0.15
"""Share of the memory that tables may not use. It is for activations, batches and the allocator."""
DENSE_PARTS = {"weights": 1, "gradients": 1, "AdamW's two moments": 2, "DDP's buckets": 1}
"""Copies of a dense parameter in training, each float32."""
DENSE_BYTES = 4 * sum(DENSE_PARTS.values())
"""Bytes of a dense parameter in training."""
INT8_ROW_BYTES = 8
"""Scale and bias of an int8 row, each float32."""
MAP_BYTES = 24
"""Of a row of a managed table: the id that holds it, the row's number, and a count or a time, each int64."""
LENGTH_BYTES = 8
"""Size of a bag's length, which is int64 in the batches."""
ID_BYTES = 8
"""Size of an id, which is int64 too."""
TABLE_WISE, ROW_WISE = ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value


class Enumerator(EmbeddingEnumerator):
    """Sorts the options of each table. TorchRec's order comes from a set of strings and differs between processes."""

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
        """All options, sorted by table, sharding type and kernel."""
        options = super().enumerate(module, sharders)
        tables, types = list(dict.fromkeys(option.fqn for option in options)), offered_types()
        table_wise = {option.fqn for option in options if option.sharding_type == TABLE_WISE}
        # Column-wise sharding of a table that is too narrow to cut equals table-wise: keep the simpler name only.
        options = [o for o in options if o.num_shards > 1 or o.sharding_type == TABLE_WISE or o.fqn not in table_wise]
        return sorted(
            options,
            key=lambda option: (
                tables.index(option.fqn),
                types.index(option.sharding_type),
                KERNELS.index(option.compute_kernel),
            ),
        )

    def split(self, option: ShardingOption) -> list[dict[str, Storage]]:
        """Memory of each shard of a chosen option, by part: weights, optimizer, input_output, pipeline."""
        storage = next(e for e in self._estimators if isinstance(e, StorageEstimator))
        return storage.split(option, self._sharder_data_map)


class StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimate, plus what it omits, with the size of optimizer state corrected to FBGEMM's.

    TorchRec assumes that state is as wide as the weights and is divided among column-wise shards. FBGEMM's state is
    float32, and row-wise Adagrad holds one number for each row of each shard.
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
        """Set the storage of each shard of the options."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            for shard in option.shards:
                assert shard.storage is not None
                extra = self._state(option, shard.size) + self._beside(option, shard.size)
                shard.storage = shard.storage + extra + self._uncounted(option, shard)

    def split(self, option: ShardingOption, data: SharderDataMap) -> list[dict[str, Storage]]:
        """Memory of each shard by part, from estimates with and without look-ups, and without the pipeline's copies."""
        plain = EmbeddingStorageEstimator(self._topology, self._constraints)
        idle, busy = _copy(option), _copy(option)
        idle.input_lengths = [0.0] * len(option.input_lengths)
        plain.estimate([idle], data)
        plain.estimate([busy], data)
        parts = []
        for shard, without, used in zip(option.shards, idle.shards, busy.shards, strict=True):
            assert shard.storage and without.storage and used.storage
            state, beside = self._state(option, shard.size), self._beside(option, shard.size)
            more = self._uncounted(option, shard)
            parts.append(
                {
                    "weights": without.storage + beside,
                    "optimizer": state,
                    "input_output": used.storage - without.storage + more,
                    "pipeline": shard.storage - used.storage - state - beside - more,
                }
            )
        return parts

    def _state(self, option: ShardingOption, size: list[int]) -> Storage:
        return self._placed(option, state_bytes(self.optimizer, size[0], size[1]))

    def _beside(self, option: ShardingOption, size: list[int]) -> Storage:
        """The scales of int8 rows, and the map of ids to rows of a managed table, which is on the device."""
        scales = self._placed(option, INT8_ROW_BYTES * size[0] if option.tensor.dtype == torch.int8 else 0)
        managed = isinstance(option.module[1], BaseManagedCollisionEmbeddingCollection)
        return scales + self._on_device(MAP_BYTES * size[0] if managed else 0)

    def _uncounted(self, option: ShardingOption, shard: Shard) -> Storage:
        """Memory that TorchRec omits: lengths of bags, vectors of empty bags, rows that are looked up more often."""
        if shard.size[0] * shard.size[1] == 0:
            return Storage(hbm=0, ddr=0)
        assert self._constraints is not None
        allowed = self._constraints[option.name]
        assert isinstance(allowed, TableConstraints)
        samples = option.batch_size * self._topology.world_size
        vector = shard.size[1] * option.tensor.element_size()
        amount = 0.0
        for ids, use in zip(option.input_lengths, allowed.lookups, strict=True):
            bags = samples * use.bags
            amount += bags * (LENGTH_BYTES + (vector * max(0.0, 1 - ids) if option.is_pooled else 0))
            share = use.share(shard.offset[0], shard.offset[0] + shard.size[0])
            if option.sharding_type == ROW_WISE and share is not None:
                more = share - 1 / self._topology.world_size
                amount += more * bags * ids * (ID_BYTES + (0 if option.is_pooled else vector))
        return self._on_device(round(amount))

    def _on_device(self, amount: int) -> Storage:
        return Storage(hbm=amount, ddr=0) if self._topology.compute_device == "cuda" else Storage(hbm=0, ddr=amount)

    def _placed(self, option: ShardingOption, amount: int) -> Storage:
        on_device = option.compute_kernel == "fused" and self._topology.compute_device == "cuda"
        return Storage(hbm=amount, ddr=0) if on_device else Storage(hbm=0, ddr=amount)


class Reservation(FixedPercentageStorageReservation):
    """Reserves a share of the memory, on a CPU too, where TorchRec reserves nothing; and the dense part and sketches.

    Args:
        host_bytes: in host memory beside the tables.
    """

    def __init__(self, dense_bytes: int, host_bytes: int) -> None:
        super().__init__(RESERVED)
        self.dense_bytes, self.host_bytes = dense_bytes, host_bytes

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """The topology with the memory that is left for tables."""
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        for device in reserved.devices:
            if topology.compute_device == "cuda":
                device.storage.hbm = max(0, device.storage.hbm - self.dense_bytes)
                device.storage.ddr = max(0, device.storage.ddr - self.host_bytes)
            else:
                room = int(device.storage.ddr * (1 - RESERVED))
                device.storage.ddr = max(0, room - self.dense_bytes - self.host_bytes)
        return reserved


def state_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Bytes of the optimizer state of one shard in FBGEMM, which is always float32."""
    numbers = {"sgd": 0, "rowwise_adagrad": rows, "adagrad": rows * columns, "adam": 2 * rows * columns}
    return 4 * numbers[optimizer]


def dense_bytes(model: nn.Module) -> int:
    """Bytes of a rank that the dense part takes in training, without activations."""
    tables = [m for m in model.modules() if isinstance(m, tuple(sharder.module_type for sharder in sharders()))]
    sharded = {id(p) for module in tables for p in module.parameters()}
    return DENSE_BYTES * sum(p.numel() for p in model.parameters() if id(p) not in sharded)


def _copy(option: ShardingOption) -> ShardingOption:
    copied = ShardingOption.__new__(ShardingOption)
    copied.__dict__.update(option.__dict__)
    copied.shards = [type(shard)(shard.size, shard.offset) for shard in option.shards]
    return copied
