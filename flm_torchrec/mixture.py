"""The fusion as a mixture: an event has one cause, and each head speaks of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from flm_torchrec.config.heads import HEADS

LEAST = 50
"""Minimum of the items of each head that a mixture scores."""

MOST = 1e6
"""Maximum of a scale and of a bias: beyond it the scores would leave float32's range."""

PerHead = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False, ge=-MOST, le=MOST)], ...],
    Field(min_length=len(HEADS), max_length=len(HEADS)),
]


@dataclass(frozen=True)
class Mixture:
    """score(i) = log sum over heads k of exp(bias_k + scale_k h_k . v_i), in the order of HEADS.

    It is the log of a sum of probabilities where a weighted sum of scores is a product of them: an item needs one head
    that is sure of it, not all of them (mixture of softmaxes: Yang et al., ICLR 2018, with constant weights).
    """

    scale: PerHead
    bias: PerHead

    def score(self, by_head: Sequence[np.ndarray]) -> np.ndarray:
        """Dot products of each head, one shape each → scores of that shape, float32."""
        parts = [s * np.asarray(z, np.float64) + b for s, b, z in zip(self.scale, self.bias, by_head, strict=True)]
        return np.logaddexp.reduce(parts).astype(np.float32)

    def shares(self, by_head: Sequence[np.ndarray]) -> np.ndarray:
        """Dot products [heads, n] → [heads, n] the heads' shares of each item's probability; they add up to 1."""
        parts = np.array([s * z + b for s, b, z in zip(self.scale, self.bias, by_head, strict=True)], np.float64)
        return np.exp(parts - np.logaddexp.reduce(parts))


def shortlist(k: int) -> int:
    """How many of the best items of each head a mixture scores, to find its k best."""
    return max(LEAST, 2 * k)
