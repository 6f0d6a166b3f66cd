"""2D parallelism: groups of ranks that each hold all tables, and average their tables after every step."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel, DMPCollection
from torchrec.distributed.types import EmbeddingModuleShardingPlan, EnumerableShardingSpec, ShardingEnv2D, ShardingPlan
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.sharders import sharders
from flm_torchrec.errors import ConfigError

AVERAGED = ("rowwise_adagrad", "adagrad")
"""Table optimizers whose state DMPCollection averages: it looks only for states named `sum`."""


class _OnDevice(DistributedModelParallel):
    """The parent that DMPCollection calls. It restores the real device, which DMPCollection did not get."""

    def __init__(self, module: nn.Module, env: ShardingEnv2D, device: torch.device, *rest: Any) -> None:
        # ShardedTensor instead of DTensor, as without replicas: DCP then writes each shard once, from any replica.
        env.output_dtensor = False
        super().__init__(module, env, self._device, *rest)


class Replicated(DMPCollection, _OnDevice):
    """TorchRec's 2D parallelism on any device. `sync()` averages weights and optimizer state after a step.

    TorchRec 1.8 asserts CUDA or MTIA in the constructor, and averages with ReduceOp.AVG, which gloo lacks. Nothing else
    in it needs a GPU.

    Args:
        plan: for the ranks of one group, numbered from 0.
        group: shape of a group, from `group_of`.
    """

    def __init__(
        self, model: nn.Module, plan: ShardingPlan, comm: Comm, group: Comm, wrapper: DefaultDataParallelWrapper
    ) -> None:
        self._real_device = comm.device
        world = dist.GroupMember.WORLD
        assert world is not None
        super().__init__(  # type: ignore[call-arg]  # DMPCollection's
            module=model,
            device=torch.device("cuda"),
            plan=deepcopy(plan),  # DMPCollection changes it to the ranks of this group
            world_size=comm.world_size,
            sharding_group_size=group.world_size,
            global_pg=world,
            node_group_size=group.local_world_size,
            sharders=sharders(comm.collectives),
            data_parallel_wrapper=wrapper,
            custom_all_reduce=self._average,
        )

    def _create_process_groups(self, *args: Any, **kwargs: Any) -> Any:
        self._device = self._real_device
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # TorchRec logs its groups on every rank as warnings
        try:
            return super()._create_process_groups(*args, **kwargs)
        finally:
            logging.disable(before)

    def _remap_sharding_plan(self, plan: ShardingPlan, *args: Any, **kwargs: Any) -> None:
        super()._remap_sharding_plan(plan, *args, **kwargs)
        if self._device.type != "cpu":
            return
        for module in plan.plan.values():
            assert isinstance(module, EmbeddingModuleShardingPlan)
            for choice in module.values():
                assert isinstance(choice.sharding_spec, EnumerableShardingSpec)
                for shard in choice.sharding_spec.shards:
                    # TorchRec writes rank:2/cpu:2, but the device of CPU tensors is "cpu".
                    shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")

    def _average(self, tensors: list[Tensor]) -> None:
        replicas = self._default_ctx.replica_pg
        for tensor in tensors:
            dist.all_reduce(tensor, group=replicas)
            tensor /= dist.get_world_size(replicas)


def group_of(comm: Comm, replicas: int) -> Comm:
    """The shape of a group of ranks that holds all tables. For planning only: its collectives must not be used.

    Group g has the ranks g, g + replicas, g + 2 replicas, …: ranks that hold the same rows are neighbours.

    Raises:
        ConfigError: the ranks do not divide into this number of groups, or the groups do not fit the hosts.
    """
    if comm.world_size % replicas:
        raise ConfigError(
            f"distributed.replicas: {comm.world_size} ranks do not divide by {replicas}; change one of them"
        )
    if comm.local_world_size % replicas and replicas % comm.local_world_size:
        raise ConfigError(
            f"distributed.replicas: {replicas} do not share out evenly over hosts of {comm.local_world_size} ranks;"
            " take a divisor or a multiple of that"
        )
    local = max(1, comm.local_world_size // replicas)
    return replace(comm, world_size=comm.world_size // replicas, local_world_size=local)


def check_replicable(model: nn.Module, plan: ShardingPlan, optimizer: str) -> None:
    """Refuse tables and optimizers that TorchRec cannot average.

    Raises:
        ConfigError: a managed table (each replica would give its rows to other ids), a table with a cache (averaging
            would miss its newest rows), tables of fp16 (an average would be rounded to the nearest number), or an
            optimizer other than Adagrad.
    """
    for module in model.modules():
        if isinstance(module, BaseManagedCollisionEmbeddingCollection):
            name = module._managed_collision_collection.embedding_configs()[0].name
            raise ConfigError(
                f"distributed.replicas: table '{name}' is managed (zch), and replicas would give its rows to different"
                " ids; prepare the data with hash or direct in --tables, or leave replicas out"
            )
    for tables in plan.plan.values():
        assert isinstance(tables, EmbeddingModuleShardingPlan)
        for name, choice in tables.items():
            if choice.compute_kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
                raise ConfigError(
                    f"distributed.replicas: table '{name}' has a cache ({choice.compute_kernel}), whose rows TorchRec"
                    " would not average; give it another kernel, or leave replicas out"
                )
    if any(weight.dtype == torch.float16 for weight in model.parameters()):
        raise ConfigError(
            "distributed.replicas: the average of tables in fp16 would be rounded to the nearest number, so that small"
            " updates are lost; set train.sparse_precision=fp32, or leave replicas out"
        )
    if optimizer not in AVERAGED:
        raise ConfigError(
            f"distributed.replicas: TorchRec averages the state of {' and '.join(AVERAGED)}, not that of {optimizer};"
            " change train.sparse_optimizer, or leave replicas out"
        )


def average_replicas(model: nn.Module) -> None:
    """Average the tables of all replicas, after each training step; does nothing without replicas. Collective."""
    if isinstance(model, Replicated):
        model.sync()
