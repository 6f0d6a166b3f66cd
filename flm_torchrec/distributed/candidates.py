"""Which ranks share the candidates of a loss, and the collectives of the losses of a step."""

from __future__ import annotations

from datetime import timedelta
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import ConfigError

Kind = Literal["global", "node", "local"]


class CandidateRanks:
    """The ranks whose in-batch targets are candidates of a loss here (`loss.candidates`), and their collectives.

    global: those of all ranks; node: those of the ranks of a node; local: of this rank alone. Beside these, the drawn
    negatives are candidates. Each sharing rank looks up its part of them: under `local`, all ranks share them.

    Args:
        timeout: seconds before a collective of a node's ranks that hangs ends the job.
    """

    def __init__(self, comm: Comm, kind: Kind = "global", timeout: float = 600.0) -> None:
        self.comm = comm
        self.timeout = timedelta(seconds=timeout)
        self.rank, self.world_size = comm.rank, comm.world_size
        self.ranks = comm.local_world_size if kind == "node" else comm.world_size
        self.place = comm.rank % self.ranks
        self.alone = kind == "local" and comm.world_size > 1

    def check(self) -> None:
        """Collective.

        Raises:
            ConfigError: nodes have different numbers of ranks.
        """
        if self.ranks < self.world_size and (
            len(set(self.comm.gather(self.ranks))) > 1 or self.world_size % self.ranks
        ):
            raise ConfigError(
                f"loss.candidates: 'node' needs nodes of equally many ranks, and {self.world_size} ranks are no"
                f" multiple of the {self.ranks} of this node; start equally many on each, or use 'local'"
            )

    @cached_property
    def group(self) -> dist.ProcessGroup | None:
        """The sharing ranks; None: all. Made at the first use, which is collective."""
        return None if self.ranks == self.world_size else dist.new_subgroups(self.ranks, timeout=self.timeout)[0]

    def all_gather(self, numbers: Tensor) -> Tensor:
        """[n] of each rank → [world_size, n] of all ranks. No gradient. Collective."""
        return torch.stack(self.comm.all_gather(numbers))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """As of `Comm`."""
        return self.comm.all_reduce_sum(tensor)

    def concat(self, vectors: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """[v] and [b] float32, as long on each sharing rank → [ranks, v] and [ranks, b]. Collective.

        Backward gives each rank the gradients for its own vectors, summed over the sharing ranks. Vectors and gradients
        are sent as `Comm.collectives`, what is beside them to the last bit.
        """
        gathered: tuple[Tensor, Tensor] = _GatherRows.apply(vectors, beside, self)
        return gathered

    def gather_flat(self, values: Tensor) -> Tensor:
        """[n] of each sharing rank → [ranks, n]. Collective."""
        gathered = values.new_empty(self.ranks, len(values))
        dist.all_gather_into_tensor(gathered.view(-1), values, group=self.group)
        return gathered

    def scatter_sum(self, values: Tensor) -> Tensor:
        """[ranks, n] on each sharing rank → [n]: the sum over them of the row of this rank. Collective."""
        own = values.new_empty(values.shape[1])
        dist.reduce_scatter_tensor(own, values.contiguous().view(-1), group=self.group)
        return own


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, beside: Tensor, ranks: CandidateRanks):  # type: ignore[override]
        ctx.ranks, ctx.sent = ranks, torch.bfloat16 if ranks.comm.collectives == "bf16" else vectors.dtype
        # One collective takes both, as bytes.
        sent = vectors.to(ctx.sent).view(torch.uint8)
        gathered = ranks.gather_flat(torch.cat([sent, beside.view(torch.uint8)]))
        # Two new tensors: autograd takes no views of one tensor as outputs that differ in whether they have gradients.
        rows, numbers = gathered[:, : len(sent)].contiguous(), gathered[:, len(sent) :].contiguous()
        rows, numbers = rows.view(ctx.sent).to(vectors.dtype), numbers.view(beside.dtype)
        ctx.mark_non_differentiable(numbers)
        return rows, numbers

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        ranks: CandidateRanks = ctx.ranks
        if not grad.shape[1]:
            return grad[0], None, None
        return ranks.scatter_sum(grad.to(ctx.sent)).to(grad.dtype), None, None
