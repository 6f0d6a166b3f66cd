"""The process group, and the few collectives that the model and the evaluation need."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from flm_torchrec.config.schema import DistributedConfig
from flm_torchrec.errors import ConfigError


@dataclass(frozen=True)
class Comm:
    """This process's place among the ranks. With one rank nothing is sent."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0 writes files and speaks to people."""
        return self.rank == 0

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, all of one shape; no gradient."""
        if self.world_size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in a new tensor; no gradient."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def concat(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[n, …] of each rank → [ranks * longest, …], padded with zeros, and [ranks * longest] bool: real rows.

        Differentiable: backward gives each rank the summed gradient of all ranks for its own rows.
        """
        if self.world_size == 1:
            return rows, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        counts = torch.stack(self.all_gather(torch.tensor(len(rows), device=rows.device)))
        longest = int(counts.max())
        padding = rows.new_zeros(longest - len(rows), *rows.shape[1:])
        gathered = _GatherRows.apply(torch.cat([rows, padding]), self)
        real = torch.arange(longest, device=rows.device).unsqueeze(0) < counts.unsqueeze(1)
        return gathered, real.flatten()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, comm: Comm) -> Tensor:  # type: ignore[override]
        ctx.comm = comm
        return torch.cat(comm.all_gather(rows))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        comm: Comm = ctx.comm
        return comm.all_reduce_sum(grad.contiguous()).chunk(comm.world_size)[comm.rank], None


@contextmanager
def process_group(config: DistributedConfig) -> Iterator[Comm]:
    """Join the job that the launcher described in the environment, or be a job of one process.

    Raises:
        ConfigError: CUDA asked for and not there.
    """
    # PyTorch warns here of a renamed function that TorchRec calls; nobody who trains can do anything about it.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # TorchRec calls what PyTorch deprecates, and a Linear of no inputs stands where a schema has no features.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
    device = _device(config.device)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.threads or max(1, cores // ranks_on_this_host()))
    try:
        yield Comm(dist.get_rank(), dist.get_world_size(), local_world_size, device)
    finally:
        dist.destroy_process_group()


def ranks_on_this_host() -> int:
    """Of all agents: LOCAL_WORLD_SIZE counts those of one, and a host may have several."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def _device(asked: str) -> torch.device:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ConfigError("distributed.device: 'cuda' asked for, but PyTorch sees no GPU; use 'cpu' or 'auto'")
    if asked == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
