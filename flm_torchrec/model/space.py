"""The one feature space of users and items, 2 D wide: [shared; collaborative].

The content and the sequential head speak of an item by the same vector v, made of its id and its features. The
collaborative head has a vector of its own for each item, as the factors of a linear autoencoder do. With both in one
space, v = [v_shared; v_collaborative], each head and every weighted sum of the heads is one vector, and each score one
dot product. A head is zero in the half that it does not use.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.config.heads import FUSED, HEADS

OWN_VECTORS = ("collaborative",)
"""Heads that score by the second half of the space; the others use the first."""


def width(dim: int) -> int:
    """Of the space, for tables of the width `dim`."""
    return 2 * dim


def place(head: str, h: Tensor) -> Tensor:
    """[…, D] of a head → [..., 2 D] in the space."""
    dim = h.shape[-1]
    return F.pad(h, (dim, 0) if head in OWN_VECTORS else (0, dim))


def placed(queries: dict[str, Tensor]) -> dict[str, Tensor]:
    """By representation, [n, D] of the heads and [n, 2 D] of the fusion → [n, 2 D]."""
    return {name: h if name == FUSED else place(name, h) for name, h in queries.items()}


def used_by_each(x: Tensor) -> dict[str, Tensor]:
    """[n, 2 D] vectors of the space → by representation [n, D], the half that a head uses; [n, 2 D] for the fusion.

    Each half is in one piece, and heads share it: backward then joins the gradients of the two halves once.
    """
    halves = [half.contiguous() for half in x.chunk(2, 1)]
    return {FUSED: x} | {head: halves[head in OWN_VECTORS] for head in HEADS}
