"""What evaluation and export need of a model and of the other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flm_torchrec.mixture import Mixture

Of = Literal["all", "content", "id"]


class Encoder(Protocol):
    """Users and items → vectors in one space. Every call is collective: all ranks make the same number of calls."""

    dim: int

    @property
    def growth(self) -> int:
        """Bytes of host memory that encoding all items will keep, beside what is held already."""

    @property
    def mixture(self) -> Mixture | None:
        """How the heads' scores become the fused one, where that is no dot product."""

    def users(self, rows: np.ndarray) -> dict[str, Tensor]:
        """[b] indices of examples → by name of REPRESENTATIONS, [b, D] float32."""

    def items(self, ids: np.ndarray, of: Of = "all") -> Tensor:
        """[n] item ids → [n, D] float32, of the id and the features together, or of one of the two alone."""

    def views(self, ids: np.ndarray) -> dict[Of, Tensor]:
        """[n] item ids → by kind, the [n, D] that `items` gives. All kinds together cost as much as one."""


class Collectives(Protocol):
    """The operations over all ranks that evaluation and export use; `distributed.comm.Comm` has these."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in order of rank; all have one shape."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in a new tensor."""

    def exchange(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send `parts[r]` to rank r, and receive `sizes[r]` values from it: [n] tensors in host memory."""


class Scorer(Protocol):
    """Scores items for users, in one way or in several."""

    names: tuple[str, ...]
    """The ways, as the table of results names them."""
    alike: bool
    """Whether all users get the same scores; what `scores` takes is then their number, and all is in host memory."""

    def blocks(self, own: np.ndarray, scored: list[np.ndarray]) -> list[Any]:
        """Indices of examples of blocks of users → for each block of `scored` what `scores` needs of its users.

        Collective, as an `Encoder`. Where the processes share the items, a process scores the blocks of all, of which
        `own` is one; else its own alone.
        """

    def scores(self, users: Any, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start] float32 scores of the items `start:stop`. The next call may reuse the tensor."""

    def scores_of(self, users: Any, name: str, items: Tensor) -> Tensor:
        """[b] ids → [b] float32, the score of an item for each user: that of `scores`, perhaps with other last bits."""
