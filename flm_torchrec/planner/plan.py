"""The plan of a training run, which says which rank holds which rows: from the planner or from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import PipelineType, ShardingPlan

from flm_torchrec.config.schema import DistributedConfig
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.replicas import group_of
from flm_torchrec.errors import ConfigError
from flm_torchrec.planner.constraints import constraints, read_rules, table_configs
from flm_torchrec.planner.plan_file import load_plan
from flm_torchrec.planner.solve import DENSE, Infeasible, solve
from flm_torchrec.planner.workload import Workload


def make_plan(
    model: nn.Module,
    comm: Comm,
    config: DistributedConfig,
    workload: Callable[[], Workload],
) -> ShardingPlan:
    """Plan the model's tables over the ranks of one replica, or read the plan of `config.plan`. Collective.

    Every rank gets the same plan.

    Args:
        workload: gives the work of a rank. Only the rank that plans calls it.

    Raises:
        ConfigError: the tables do not fit, with the table at fault; or a file does not fit the model.
    """
    group = group_of(comm, config.replicas)

    def attempt() -> ShardingPlan | ConfigError:
        try:
            if config.plan:
                return load_plan(Path(config.plan), model, group)
            rules = read_rules(config, [table.name for table in table_configs(model)])
            work = workload()
            allowed = constraints(model, rules, work.lookups)
            topology, pipeline = _topology(comm, group, config), pipeline_of(comm.device.type)
            return solve(work, topology, allowed, pipeline).plan
        except Infeasible as error:
            if error.table == DENSE:
                return ConfigError(str(error))
            fewer = " or fewer replicas" if config.replicas > 1 else ""
            return ConfigError(
                f"the tables do not fit on {group.world_size} ranks: {error}; use more ranks{fewer}, a smaller"
                " model.dim, a --min-count in 'flm prepare', or raise distributed.memory_gib; 'flm plan' says what"
                " would fit"
            )
        except ConfigError as error:
            return error

    # The error is broadcast too: otherwise the other ranks would wait for a plan that never comes.
    plan = invoke_on_rank_and_broadcast_result(torch.distributed.GroupMember.WORLD, 0, attempt)
    if isinstance(plan, ConfigError):
        raise plan
    return plan


def pipeline_of(device: str) -> PipelineType:
    """The input pipeline that training uses on a kind of device."""
    return PipelineType.TRAIN_SPARSE_DIST if device == "cuda" else PipelineType.NONE


def _topology(comm: Comm, group: Comm, config: DistributedConfig) -> Topology:
    given = int(config.memory_gib * 2**30) or None
    memory: dict[str, int | None]
    if comm.device.type == "cuda":
        memory = {"hbm_cap_bytes": given or torch.cuda.get_device_properties(comm.device).total_memory}
    else:
        memory = {"ddr_cap_bytes": given or psutil.virtual_memory().total // comm.local_world_size}
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=group.world_size,
            local_world_size=group.local_world_size,
            **memory,  # type: ignore[arg-type]
        ),
        kernel_config=KernelConfig(compute_device=comm.device.type),
    )
