"""The process group, and the few collectives that the model and the evaluation need."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flm_torchrec.config.schema import DistributedConfig
from flm_torchrec.distributed.join import join
from flm_torchrec.errors import ConfigError, FlmError, RunError

LOST = re.compile(r"timed? ?out|connection (was )?(closed|reset|refused)|closed by peer|broken pipe", re.IGNORECASE)
"""What backends say of a collective that a rank did not join."""
ROLL_CALL = 3.0
"""Seconds that ranks have to report after a collective failed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Comm:
    """This process's place among the ranks. With one rank nothing is sent."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """Over gloo on every device: small words between ranks that must not wait for a GPU."""
    saving: dist.ProcessGroup | None = None
    """Over gloo, for the thread that writes checkpoints while the others train."""
    launch: dist.Store | None = None
    """What the launcher keeps over all attempts of a job; None where each start is a job of its own."""

    def remember(self, word: str) -> None:
        """Leave a word to later attempts of this job, should the launcher start it anew."""
        if self.launch is not None and self.main:
            self.launch.set(f"word/{word}", "")

    def remembers(self, word: str) -> bool:
        """Whether an earlier attempt of this job, or this one, has left the word. Collective."""
        return self.gather(self.launch is not None and self.launch.check([f"word/{word}"]))[0]

    @property
    def main(self) -> bool:
        """Rank 0 writes files and speaks to people."""
        return self.rank == 0

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """NCCL takes no tensor in host memory: those go over gloo. None: the default group."""
        return self.control if self.device.type == "cuda" and not tensor.is_cuda else None

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, all of one shape; no gradient."""
        if self.world_size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group(tensor))
        return parts

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in a new tensor; no gradient."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total, group=self._group(tensor))
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

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: whether it is set on any rank. Collective."""
        if self.world_size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(counts, group=self.control)
        return [bool(count) for count in counts.tolist()]

    def gather(self, found: T) -> list[T]:
        """The objects of all ranks, small ones, on each rank. Collective."""
        gathered: list[T] = [found] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, found, group=self.control)
        return gathered

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, small, on each rank. Collective.

        Raises:
            FlmError: that of rank 0, or what a file system told it, on every rank, so that none is left waiting.
        """
        done: T | None = None
        error: FlmError | None = None
        if self.main:
            try:
                done = action()
            except FlmError as raised:
                error = raised
            except OSError as raised:
                error = RunError(f"{raised.filename}: {raised.strerror}; mend that, or give another --train.run")
        done, error = self.gather((done, error))[0]
        if error is not None:
            raise error
        return done  # type: ignore[return-value]


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
    hush()
    device = _device(config.device)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout)
    store, launch = join(backend, timeout)
    control = dist.new_group(timeout=timeout, backend="gloo")
    # A disk may take its time: a rank that waits there for others has not hung.
    saving = dist.new_group(timeout=10 * timeout, backend="gloo")
    comm = Comm(dist.get_rank(), dist.get_world_size(), local_world_size, device, control, saving, launch)
    if device.type == "cpu":
        # Asked of all ranks, also of one that was told its threads.
        share = max(1, len(os.sched_getaffinity(0)) // ranks_on_this_host(comm))
        torch.set_num_threads(config.threads or share)
    try:
        yield comm
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not LOST.search(str(error)):
            raise
        raise RunError(_who_is_lost(dist.PrefixStore("roll-call", store), config.timeout, error)) from error
    finally:
        dist.destroy_process_group()


def hush() -> None:
    """Keep back warnings that nobody who trains or plans can do anything about."""
    # PyTorch warns here of a renamed function that TorchRec calls.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # TorchRec calls what PyTorch deprecates, and a Linear of no inputs stands where a schema has no features.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")


def ranks_on_this_host(comm: Comm) -> int:
    """Of all agents: LOCAL_WORLD_SIZE counts those of one, and a host may have several."""
    host = socket.gethostname()
    return comm.gather(host).count(host)


def _who_is_lost(store: dist.Store, timeout: float, error: RuntimeError) -> str:
    """Every rank that still runs reports to the store, which the launcher keeps alive, and sees who does not."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    reason = " ".join(str(error).split())[:200]
    try:
        store.set(str(rank), "here")
        time.sleep(ROLL_CALL)
        lost = [str(r) for r in range(world_size) if not store.check([str(r)])]
    except (RuntimeError, ValueError) as gone:
        return f"the job's store does not answer ({gone}), after: {reason}; see the logs of all ranks"
    if not lost:
        return f"a collective failed, though every rank answers: {reason}; see the logs of all ranks"
    return (
        f"rank {', '.join(lost)} of {world_size} does not answer: it died, or hung for distributed.timeout ="
        f" {timeout:g} s ({reason}); see its log, and go on with --train.existing resume"
    )


def _device(asked: str) -> torch.device:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ConfigError("distributed.device: 'cuda' asked for, but PyTorch sees no GPU; use 'cpu' or 'auto'")
    if asked == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
