"""Which rank holds which rows: the planner's choice, readable and saved with the run."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, TopologyFactory, TrainerConfig
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from flm_torchrec.config.schema import DistributedConfig
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.sharders import AUTO_TYPES, sharders
from flm_torchrec.errors import ConfigError

RESERVED = 0.15
"""Share of the memory kept from tables, for the dense part, activations and batches."""


def make_plan(model: nn.Module, comm: Comm, config: DistributedConfig, batch_size: int) -> ShardingPlan:
    """Plan the model's tables over the ranks; the same on every rank.

    Args:
        batch_size: sequences per rank and step.

    Raises:
        ConfigError: the tables do not fit, with the planner's own reason.
    """
    planner = EmbeddingShardingPlanner(
        topology=_topology(comm, config),
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
        constraints=_constraints(model, config),
        debug=False,
    )
    try:
        return planner.collective_plan(model, sharders(), torch.distributed.GroupMember.WORLD)
    except PlannerError as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"the tables do not fit on {comm.world_size} ranks: {reason}; use more ranks, a smaller model.dim,"
            " a --min-count in 'flm prepare', or raise distributed.memory_gib"
        ) from error


def describe(plan: ShardingPlan) -> dict[str, Any]:
    """The plan as JSON: for each table its sharding type, kernel and shards (rank, first row and column, size)."""
    tables = {}
    for path, module in plan.plan.items():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for table, choice in module.items():
            shards = choice.sharding_spec.shards if choice.sharding_spec else []  # type: ignore[attr-defined]
            tables[table] = {
                "module": path,
                "sharding_type": choice.sharding_type,
                "kernel": choice.compute_kernel,
                "shards": [
                    {"rank": s.placement.rank(), "offset": list(s.shard_offsets), "size": list(s.shard_sizes)}
                    for s in shards
                ],
            }
    return tables


def _topology(comm: Comm, config: DistributedConfig) -> Topology:
    given = int(config.memory_gib * 2**30) or None
    memory: dict[str, int | None]
    if comm.device.type == "cuda":
        memory = {"hbm_cap_bytes": given or torch.cuda.get_device_properties(comm.device).total_memory}
    else:
        memory = {"ddr_cap_bytes": given or psutil.virtual_memory().total // comm.local_world_size}
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=comm.world_size,
            local_world_size=comm.local_world_size,
            **memory,  # type: ignore[arg-type]
        ),
        kernel_config=KernelConfig(compute_device=comm.device.type),
    )


def _constraints(model: nn.Module, config: DistributedConfig) -> dict[str, ParameterConstraints]:
    types = AUTO_TYPES if config.sharding == "auto" else [config.sharding]
    kernels = [EmbeddingComputeKernel.FUSED.value]
    return {
        table.name: ParameterConstraints(sharding_types=types, compute_kernels=kernels)
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection)
        for table in _tables(module)
    }


def _tables(module: EmbeddingBagCollection | EmbeddingCollection) -> list[Any]:
    bags = isinstance(module, EmbeddingBagCollection)
    return module.embedding_bag_configs() if bags else module.embedding_configs()
