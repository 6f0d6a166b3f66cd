"""2D parallelism: groups of ranks that each hold all tables, and average them after every step."""

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
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.sharders import sharders
from flm_torchrec.errors import ConfigError

AVERAGED = ("rowwise_adagrad", "adagrad")
"""Optimizers of the tables whose state DMPCollection finds: it asks for `sum` alone."""


class _OnDevice(DistributedModelParallel):
    """What DMPCollection comes to when it calls its parent: puts back the device that was kept from it."""

    def __init__(self, module: nn.Module, env: ShardingEnv2D, device: torch.device, *rest: Any) -> None:
        # Tables as ShardedTensor, as without replicas: DCP writes each shard once, whichever replica has it.
        env.output_dtensor = False
        super().__init__(module, env, self._device, *rest)


class Replicated(DMPCollection, _OnDevice):
    """TorchRec's 2D parallelism on any device; `sync()` after a step averages weights and optimizer state.

    TorchRec 1.8 asserts CUDA or MTIA in the constructor, and averages by ReduceOp.AVG, which gloo has not. Nothing
    else in it asks for a GPU.

    Args:
        plan: over the ranks of one group, as if they were all.
        group: shape of a group, by `group_of`.
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
            plan=deepcopy(plan),  # it is written over with the ranks of this rank's group
            world_size=comm.world_size,
            sharding_group_size=group.world_size,
            global_pg=world,
            node_group_size=group.local_world_size,
            sharders=sharders(),
            data_parallel_wrapper=wrapper,
            custom_all_reduce=self._average,
        )

    def _create_process_groups(self, *args: Any, **kwargs: Any) -> Any:
        self._device = self._real_device
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # with which TorchRec tells of its groups, on every rank
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
                    # TorchRec numbers a host's devices: rank:2/cpu:2. The tensors there are on "cpu".
                    shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")

    def _average(self, tensors: list[Tensor]) -> None:
        replicas = self._default_ctx.replica_pg
        for tensor in tensors:
            dist.all_reduce(tensor, group=replicas)
            tensor /= dist.get_world_size(replicas)


def group_of(comm: Comm, replicas: int) -> Comm:
    """The shape of one group of ranks that holds all tables, for planning; not to send anything by.

    Group g is the ranks g, g + replicas, g + 2 replicas, …: those with the same rows are neighbours.

    Raises:
        ConfigError: the ranks do not make so many equal groups.
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
    """Refuse what TorchRec's averaging does not know.

    Raises:
        ConfigError: a managed table, whose ids lie elsewhere in each replica, a table with a cache, whose newest rows
            the averaging would not see, or an optimizer other than Adagrad.
    """
    for module in model.modules():
        if isinstance(module, ManagedCollisionEmbeddingBagCollection):
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
    if optimizer not in AVERAGED:
        raise ConfigError(
            f"distributed.replicas: TorchRec averages the state of {' and '.join(AVERAGED)}, not that of {optimizer};"
            " change train.sparse_optimizer, or leave replicas out"
        )


def average_replicas(model: nn.Module) -> None:
    """To be called after each step of training; does nothing where tables are not replicated. Collective."""
    if isinstance(model, Replicated):
        model.sync()
