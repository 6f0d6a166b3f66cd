"""What evaluation and export need of a model and of the other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Of = Literal["all", "content", "id"]


class Encoder(Protocol):
    """Users and items → vectors in one space. Both calls are collective: all ranks make them equally often."""

    dim: int

    def users(self, rows: np.ndarray) -> dict[str, Tensor]:
        """[b] indices of examples → by name of REPRESENTATIONS, [b, D] float32."""

    def items(self, ids: np.ndarray, of: Of = "all") -> Tensor:
        """[n] item ids → [n, D] float32, made of the id and the features, or of one of them alone."""

    def views(self, ids: np.ndarray) -> dict[Of, Tensor]:
        """What `items` gives, of each kind at the cost of one."""


class Comm(Protocol):
    """The ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, all of one shape."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in a new tensor."""


class Scorer(Protocol):
    """Scores items for users, in one way or several."""

    names: tuple[str, ...]

    def block(self, rows: np.ndarray) -> Any:
        """What is known of the examples `rows` [b]. Collective: all ranks call it equally often."""

    def scores(self, known: Any, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start] float32 scores of the items `start:stop` for the examples of `block`, until asked again."""
