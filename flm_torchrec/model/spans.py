"""Where sequences lie among the tokens of a batch, as native code takes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flm_torchrec.model.elapsed import Clock


@dataclass(frozen=True)
class Spans:
    """B sequences whose tokens lie one after the other."""

    first: Tensor  # [B + 1] int64: the first token of each, and how many tokens there are
    clocks: list[Clock]
    """Of the first b sequences, of the next ones and so on."""

    @cached_property
    def between(self) -> dict[str, Tensor]:
        """[B] int64 each: where the [L, L] times between two tokens of a sequence are in memory, and L."""
        parts = [clock.between for clock in self.clocks]  # which the clocks keep
        none = self.first[:0]
        at = [x.data_ptr() + x.stride(0) * x.itemsize * torch.arange(len(x)) for x in parts]
        side = [torch.full((len(x),), x.shape[1]) for x in parts]
        return {"between": torch.cat([none, *at]), "side": torch.cat([none, *side])}
