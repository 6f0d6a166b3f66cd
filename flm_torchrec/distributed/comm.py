"""The process group of a job, and the collectives that training and evaluation need."""

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
"""Messages of backends for a collective that a rank did not join."""
ROLL_CALL = 3.0
"""Seconds in which ranks report that they still run, after a collective failed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Comm:
    """This rank and its collectives. With one rank nothing is sent."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A gloo group on every device, for small messages that must not wait for a GPU."""
    saving: dist.ProcessGroup | None = None
    """A gloo group for the thread that writes checkpoints during training."""
    launch: dist.Store | None = None
    """The launcher's store, which all attempts of a job share; None without a launcher."""
    collectives: str = "fp32"
    """What ranks send vectors and gradients as, `distributed.collectives`: those of tables, losses and DDP."""

    def set_flag(self, name: str) -> None:
        """Set a flag for this attempt and later attempts of the job, which the launcher starts after a failure."""
        if self.launch is not None and self.main:
            self.launch.set(f"flag/{name}", "")

    def has_flag(self, name: str) -> bool:
        """Whether this attempt or an earlier attempt of the job has set the flag. Collective."""
        return self.gather(self.launch is not None and self.launch.check([f"flag/{name}"]))[0]

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """The gloo group for a tensor in host memory, which NCCL does not take; else None, the default group."""
        return self.control if self.device.type == "cuda" and not tensor.is_cuda else None

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape, in the order of the ranks. No gradient. Collective."""
        if self.world_size == 1:
            return [tensor]
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        dist.all_gather_into_tensor(gathered.view(-1), tensor.contiguous().view(-1), group=self._group(tensor))
        return list(gathered)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in a new tensor. No gradient. Collective."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total, group=self._group(tensor))
        return total

    def exchange(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send `parts[r]` to rank r, and receive `sizes[r]` values from it: [n] tensors in host memory. Collective."""
        if self.world_size == 1:
            return parts
        received = parts[0].new_empty(sum(sizes))
        dist.all_to_all_single(
            received, torch.cat(parts), sizes, [len(part) for part in parts], group=self._group(received)
        )
        return list(received.split(sizes))

    def concat(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, …] of each rank → rows [W n_max, …] of W ranks, padded with zeros, and their mask [W n_max].

        No gradient. Collective.
        """
        if self.world_size == 1:
            return rows, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        counts = torch.stack(self.all_gather(torch.tensor(len(rows), device=rows.device)))
        longest = int(counts.max())
        padding = rows.new_zeros(longest - len(rows), *rows.shape[1:])
        gathered = torch.cat(self.all_gather(torch.cat([rows, padding])))
        real = torch.arange(longest, device=rows.device).unsqueeze(0) < counts.unsqueeze(1)
        return gathered, real.flatten()

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        if self.world_size > 1:
            dist.barrier()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any rank. Collective."""
        if self.world_size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(counts, group=self.control)
        return [bool(count) for count in counts.tolist()]

    def gather(self, value: T) -> list[T]:
        """The objects of all ranks, which are pickled and should be small. Collective."""
        gathered: list[T] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, and give its result, which should be small, to each rank. Collective.

        Raises:
            FlmError: the error of rank 0, raised on every rank, so that no rank waits. An OSError becomes a RunError.
                Of an error that nobody expects rank 0 raises the error itself, and the others a RunError that tells it.
        """
        result: T | None = None
        error: FlmError | None = None
        fault: Exception | None = None
        if self.main:
            try:
                result = action()
            except FlmError as raised:
                error = raised
            except OSError as raised:
                error = RunError(f"{raised.filename}: {raised.strerror}; mend that, or give another --train.run")
            except Exception as raised:
                fault = raised
                error = RunError(f"rank 0 ended by {type(raised).__name__} ({raised}); its log has more")
        result, error = self.gather((result, error))[0]
        if fault is not None:
            raise fault
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


@contextmanager
def process_group(config: DistributedConfig) -> Iterator[Comm]:
    """Join the job that the environment describes, or be a job of one process without a launcher.

    Raises:
        ConfigError: the config asks for CUDA and PyTorch sees no GPU.
        RunError: a rank did not join, or was lost later.
    """
    silence_warnings()
    device = _device(config.device)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout)
    store, launch = join(backend, timeout)
    control = dist.new_group(timeout=timeout, backend="gloo")
    # A slow disk is no hang: ranks may wait longer for each other while they save.
    saving = dist.new_group(timeout=10 * timeout, backend="gloo")
    comm = Comm(
        dist.get_rank(), dist.get_world_size(), local_world_size, device, control, saving, launch, config.collectives
    )
    if device.type == "cpu":
        # Every rank takes part in this collective, also a rank with a given number of threads.
        share = max(1, len(os.sched_getaffinity(0)) // ranks_on_this_host(comm))
        torch.set_num_threads(config.threads or _asked_threads(local_world_size) or share)
    try:
        yield comm
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not LOST.search(str(error)):
            raise
        raise RunError(_lost_ranks(dist.PrefixStore("roll-call", store), config.timeout, error)) from error
    finally:
        dist.destroy_process_group()


def _asked_threads(local_world_size: int) -> int:
    """What OMP_NUM_THREADS asks for; 0: nothing.

    Where it is not set, torchrun sets it to 1 for each of several ranks, which asks for nothing.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the others are for nested regions
    asked = int(first) if first.isdecimal() else 0
    return 0 if asked == 1 and local_world_size > 1 else asked


def silence_warnings() -> None:
    """Silence warnings that a user can do nothing about."""
    # PyTorch warns that TorchRec calls a renamed function.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # TorchRec calls deprecated functions of PyTorch, and a schema without features gives a Linear without inputs.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
    # FBGEMM on a GPU tells of a code path; torch 2.11 asks which backend TorchRec means, of a group that has two.
    warnings.filterwarnings("ignore", message="TBE B200 optimization")
    warnings.filterwarnings("ignore", message="Multiple backends are registered")


def ranks_on_this_host(comm: Comm) -> int:
    """Ranks on this host, of all agents: LOCAL_WORLD_SIZE counts those of one agent. Collective."""
    host = socket.gethostname()
    return comm.gather(host).count(host)


def _lost_ranks(store: dist.Store, timeout: float, error: RuntimeError) -> str:
    """A message that names the ranks which no longer run: every rank that runs reports to the launcher's store."""
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
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ConfigError("distributed.device: 'cuda' asked for, but PyTorch sees no GPU; use 'cpu' or 'auto'")
    if asked == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
