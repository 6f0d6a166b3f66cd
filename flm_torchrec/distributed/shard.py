"""Model → DistributedModelParallel and its optimizer. First values of tables do not depend on the plan."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import Adagrad, Adam, RowWiseAdagrad
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from flm_torchrec.config.schema import TrainConfig
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.lookups import JointLookup
from flm_torchrec.distributed.replicas import Replicated, check_replicable, group_of
from flm_torchrec.distributed.sharders import check_whole_rows, sharders

SPARSE_OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "adam": Adam}
BLOCK_ROWS = 65536
"""Rows of a table that are drawn from one random generator."""


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    comm: Comm,
    config: TrainConfig,
    sliced: Sequence[nn.Module] = (),
    replicas: int = 1,
) -> DistributedModelParallel:
    """Fuse the optimizer of the tables into backward, shard by the plan, and set the first values of the tables.

    Args:
        sliced: dense modules whose weights are divided among the ranks (FSDP). Every rank holds the weights of other
            dense modules (DDP).
        replicas: number of groups of ranks that each hold all tables. The plan is for the ranks of one group.

    Raises:
        ConfigError: the optimizer does not fit the plan or the replicas.
    """
    check_whole_rows(plan, config.sparse_optimizer)
    optimizer = SPARSE_OPTIMIZERS[config.sparse_optimizer]
    zeros = set[str]()
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            _apply_optimizer_in_backward(optimizer, module.parameters(), {"lr": config.sparse_lr})
        if isinstance(module, EmbeddingCollection):
            zeros |= {table.name for table in module.embedding_configs() if table.init_fn is nn.init.zeros_}
    names = _slice(model, sliced, comm)
    wrapper: DataParallelWrapper = _Alone()
    if comm.world_size > 1:
        shared = _SharedInHalf if comm.collectives == "bf16" else DefaultDataParallelWrapper
        wrapper = shared(params_to_ignore=names)
    sharded: DistributedModelParallel
    if replicas > 1:
        check_replicable(model, plan, config.sparse_optimizer)
        sharded = Replicated(model, plan, comm, group_of(comm, replicas), wrapper)
    else:
        sharded = DistributedModelParallel(
            module=model,
            env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
            device=comm.device,
            plan=plan,
            sharders=sharders(comm.collectives),
            data_parallel_wrapper=wrapper,
        )
    _hold_empty_shards(sharded)
    if comm.world_size > replicas:
        sharded.module.look_up = JointLookup(comm)
    for name, tensor in sharded.state_dict().items():
        if (
            isinstance(tensor, ShardedTensor) and tensor.dtype.is_floating_point
        ):  # integers are the ids of a managed table
            _initialise(name, tensor, config.seed, zero=name.split(".")[-2] in zeros)
    return sharded


def _slice(model: nn.Module, sliced: Sequence[nn.Module], comm: Comm) -> list[str]:
    """Divide the weights of modules among the ranks; the names of those that are divided."""
    parameters = {p for module in sliced for p in module.parameters()}
    whole = {p for p in parameters if not p.numel()}  # of a layer without inputs; FSDP refuses them
    names = [name for name, p in model.named_parameters() if p in parameters - whole]
    reduced = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if comm.collectives == "bf16" else None)
    for module in sliced:
        mesh = init_device_mesh(comm.device.type, (comm.world_size,))
        fully_shard(module.to(comm.device), mesh=mesh, mp_policy=reduced, ignored_params=whole)
    return names


class _Alone(DataParallelWrapper):
    """One rank shares no gradients. DDP would copy each of them all the same."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        dmp.module.to(device)


class _SharedInHalf(DefaultDataParallelWrapper):
    """DDP that sends gradients as bf16.

    `allreduce_comm_precision` would do it by a hook that DDP refuses over gloo by its name, though gloo sums bf16.
    """

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        super().wrap(dmp, env, device)
        if isinstance(dmp._dmp_wrapped_module, DistributedDataParallel):
            # Under another name.
            dmp._dmp_wrapped_module.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))


def make_optimizer(model: DistributedModelParallel, config: TrainConfig) -> CombinedOptimizer:
    """The fused optimizer of the tables, which steps in backward, and AdamW with clipping for the dense part."""
    named = in_backward_optimizer_filter(model.named_parameters())
    dense = {name: p for name, p in named if p.requires_grad}  # no gradient of what is frozen, nor a norm of it
    world = dist.GroupMember.WORLD
    # TorchRec skips a sliced parameter without a group, because it looks for a gradient of the local slice.
    sliced = {p: [world] for p in dense.values() if isinstance(p, DTensor)}

    def adamw(params: list[nn.Parameter]) -> torch.optim.AdamW:
        decayed = [p for p in params if p.dim() >= 2]
        others = [p for p in params if p.dim() < 2]
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.dense_lr,
            fused=not sliced,  # its kernel takes no sliced parameters beside others
        )

    clipped = GradientClippingOptimizer(
        KeyedOptimizerWrapper(dense, adamw),
        clipping=GradientClipping.NORM,
        max_gradient=config.clip,
        enable_global_grad_clip=bool(sliced),
        param_to_pgs=sliced,  # type: ignore[arg-type]
    )
    return CombinedOptimizer([("tables", model.fused_optimizer), ("dense", clipped)])  # type: ignore[list-item]


def kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules that hold this rank's shards. TorchRec keeps them in plain lists, which `modules()` misses."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", []):
            yield from (inner for inner in lookup.modules() if isinstance(inner, SplitTableBatchedEmbeddingBagsCodegen))


def _hold_empty_shards(model: nn.Module) -> None:
    """Let a CPU rank look up a table of which it has no row. A table with fewer rows than ranks leaves such ranks.

    FBGEMM 1.8 has two faults there. Its lookup_*.py recognise a CPU kernel by `host_weights.numel() > 0`. Its CPU
    kernels search the end of a table in `hash_size_cumsum` as the first larger number, and read past the end of that
    array. So an empty shard counts as one row here, and empty weights become one row of zeros. No id maps to that row,
    no table owns it, and no checkpoint holds it.
    """
    for kernel in kernels(model):
        rows = [spec[0] for spec in kernel.embedding_specs]
        if not kernel.use_cpu or all(rows):
            continue
        starts = [0, *accumulate(max(1, n) for n in rows)]
        counted = [*(starts[table] for table in kernel.feature_table_map), starts[-1]]
        kernel.hash_size_cumsum.copy_(torch.tensor(counted))
        if not any(rows):
            kernel.weights_host = kernel.weights_host.new_zeros(kernel.max_D)


def _initialise(name: str, table: ShardedTensor, seed: int, zero: bool) -> None:
    """Draw from N(0, 1/D) by blocks of rows, so that the first value of a row does not depend on the plan; or zeros."""
    dim = table.size(1)
    for shard in table.local_shards():
        if zero:
            shard.tensor.detach().zero_()
            continue
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        for first, block in _blocks(name, seed, row, row + rows, dim):
            low, high = max(first, row), min(first + BLOCK_ROWS, row + rows)
            values = block[low - first : high - first, column : column + columns]
            shard.tensor.detach()[low - row : high - row].copy_(values)


def _blocks(name: str, seed: int, start: int, end: int, dim: int) -> Iterator[tuple[int, Tensor]]:
    for block in range(start // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}/{block}".encode()))
        # torch.randn draws 16 values at a time: so many rows are the beginning of the whole block, bit for bit.
        rows = min(BLOCK_ROWS, -(-(end - block * BLOCK_ROWS) // 16) * 16)
        yield block * BLOCK_ROWS, torch.randn(rows, dim, generator=generator) * dim**-0.5


def prepare_state(optimizer: CombinedOptimizer, names: Iterable[str]) -> None:
    """Allocate the state of the dense optimizer, which otherwise exists only after the first step.

    Args:
        names: states that a checkpoint holds, such as `dense.WEIGHT.exp_avg`. A parameter without gradient has none.
    """
    dense = dict(optimizer.optimizers)["dense"]
    held = set(names)
    for key, parameter in dense.params.items():
        if f"dense.{key}.step" in held:
            parameter.grad = torch.zeros_like(parameter)
    dense.step()  # changes the weights, which the checkpoint then overwrites
    dense.zero_grad()


def set_step(model: nn.Module, step: int) -> None:
    """Set the number of steps in the kernels of the tables. Adam corrects its moments with this number."""
    for kernel in kernels(model):
        kernel.set_optimizer_step(step)
