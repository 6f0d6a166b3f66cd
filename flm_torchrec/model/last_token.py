"""Layouts of which only the last token of each sequence is represented: where nothing is learned, and in exports.

They have sums over the tokens of a sequence, too, and what attention of the last token alone takes.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.model.elapsed import Clock, by_elapsed, elapsed
from flm_torchrec.model.layout import Attend, Jagged

FEW = 4
"""Rows below which a product of matrices is rounded in another way on CPUs."""


class Padded:
    """[B, L] tokens with padding at the end, where causal layers do not see it. Only the last token is represented.

    Args:
        lengths: [B] events of each sequence; L is at least the largest, plus one for the prefix.
        time: [B, L] seconds.
    """

    def __init__(self, lengths: Tensor, time: Tensor) -> None:
        self.lengths = lengths
        self.clock = Clock(time)
        self.position = torch.arange(time.shape[1], device=time.device)

    @property
    def count(self) -> Tensor:
        """As of `Layout`, [B, 1]."""
        return self.lengths.float().unsqueeze(1)

    @cached_property
    def age(self) -> Tensor:
        """As of `Ends`, [B, L]; below 0 at padding."""
        return self.lengths.unsqueeze(1) - self.position

    @cached_property
    def since(self) -> Tensor:
        """As of `Ends`, [B, L]."""
        now = self.clock.seconds.gather(1, self.lengths.unsqueeze(1))  # [B, 1]
        return elapsed(now, self.clock.seconds)[:, 0]

    def each(self, x: Tensor) -> Tensor:
        """As of `Layout`, [B, D]."""
        return x

    def mean(self, items: Tensor) -> Tensor:
        """As of `Layout`; items [B, L - 1, D] are zero at padding."""
        return items.sum(1) / self.lengths.clamp(min=1).unsqueeze(1)

    def recent(self, items: Tensor, keep: Tensor, old: Tensor | None) -> Tensor:
        """As of `Layout`; items [B, L - 1, D] are zero at padding."""
        counts = (keep.log() * self.age[:, 1:].clamp(min=0)).exp()  # [B, L - 1]
        if old is not None:
            counts = counts * by_elapsed(old, self.since[:, 1:])[0]
        return (counts.unsqueeze(2) * items).sum(1)

    def begin(self, prefix: Tensor, events: Tensor) -> Tensor:
        """As of `Layout`; events [B, L - 1, D]."""
        return torch.cat([prefix.unsqueeze(1), events], 1)

    def group(self, x: Tensor) -> Tensor:
        """As of `Layout`."""
        return x

    def represented(self, x: Tensor) -> Tensor:
        """As of `Layout`, [B, D]."""
        return self.last(x)

    def mix(self, x: Tensor, attend: Attend) -> Tensor:
        """As of `Layout`."""
        return attend(x, self.clock)

    def in_order(self, x: Tensor) -> Tensor:
        """As of `Ends`."""
        return x

    def last(self, x: Tensor) -> Tensor:
        """As of `Ends`, [B, D]."""
        # len() would fix the number of sequences in an exported program.
        return x[torch.arange(self.lengths.shape[0], device=x.device), self.lengths]

    def spread(self, x: Tensor) -> Tensor:
        """As of `Ends`, [B, D] → [B, 1, D]."""
        return x.unsqueeze(1)

    def shares(self, scores: Tensor) -> Tensor:
        """As of `Ends`, [B, L, n]."""
        return scores.masked_fill((self.age < 0).unsqueeze(2), -torch.inf).softmax(1)

    def collect(self, x: Tensor, counts: Tensor) -> Tensor:
        """As of `Ends`, [B, L, D] and [B, L, n] → [B, D]."""
        counts = counts * (self.age >= 0).unsqueeze(2)
        return (x.unflatten(2, (counts.shape[2], -1)) * counts.unsqueeze(3)).sum(1).flatten(1)


class Ends(Jagged):
    """As `Jagged`, but only the last token of each sequence that has tokens is represented.

    Fewer than FEW tokens are filled up with copies of the last one: for products of very few rows, libraries have other
    kernels, which round otherwise. With more rows the bits are on many processors, not on all, those among all tokens.
    """

    def __init__(self, lengths: Tensor, time: Tensor) -> None:
        super().__init__(lengths, time)
        held = lengths > 0
        self.begins, ends = self.first[held], (torch.cumsum(lengths, 0) - 1)[held]  # [sequences with tokens]
        self.copies = max(0, min(FEW, len(time)) - len(ends))
        self.ends = F.pad(ends, (0, self.copies), value=len(time) - 1)  # [R] token
        rows = torch.arange(len(ends), device=lengths.device)
        self.row = torch.repeat_interleave(rows, lengths[held], output_size=len(time))
        """[T] the represented token of each token's sequence."""
        self.end = ends[self.row]
        """[T] the last token of each token's sequence."""
        self.age = self.end - torch.arange(len(time), device=lengths.device)
        """[T] tokens from each token to the last of its sequence."""
        self.time = time

    @cached_property
    def since(self) -> Tensor:
        """[T] as of `elapsed`: the time from each token to the last of its sequence."""
        return elapsed(self.time[self.end, None], self.time[:, None]).flatten()

    def mean(self, items: Tensor) -> Tensor:
        """As of `Layout`; items [T, D], of which those at a prefix are not used."""
        return self.collect(items, (self.position > 0).float().unsqueeze(1)) / self.count.clamp(min=1)

    def recent(self, items: Tensor, keep: Tensor, old: Tensor | None) -> Tensor:
        """As of `Layout`; items [T, D], of which those at a prefix are not used."""
        counts = keep**self.age * (self.position > 0)
        if old is not None:
            counts = counts * by_elapsed(old, self.since)[0]
        return self.collect(items, counts.unsqueeze(1))

    def begin(self, prefix: Tensor, events: Tensor) -> Tensor:
        """As of `Layout`; prefix [R, D], events [T, D]."""
        return events.index_copy(0, self.begins, prefix[: len(self.begins)])

    def in_order(self, x: Tensor) -> Tensor:
        """Tokens in the order of `mix` → […, D] in their first order, which the methods below need."""
        return x if self.back is None else x.index_select(0, self.back)

    def last(self, x: Tensor) -> Tensor:
        """[…, D] → [R, D] of the represented tokens."""
        return self._shown(x)

    def spread(self, x: Tensor) -> Tensor:
        """[R, n] → […, n], at each token what the represented token of its sequence has."""
        return x.index_select(0, self.row)

    def shares(self, scores: Tensor) -> Tensor:
        """[…, n] → […, n], softmax over the tokens of each sequence."""
        most = scores.new_full((len(self.begins), scores.shape[1]), -torch.inf)
        most = most.scatter_reduce(0, self.row.unsqueeze(1).expand_as(scores), scores, "amax")
        weights = (scores - self.spread(most)).exp()
        return weights / self.spread(self.collect(torch.ones_like(weights), weights))

    def collect(self, x: Tensor, counts: Tensor) -> Tensor:
        """[…, D] and what a token counts in each of n parts of D, […, n] → [R, D], sums over each sequence's tokens."""
        parts, tokens = torch.arange(counts.shape[1], device=x.device).unsqueeze(1), len(x)
        summed = F.embedding_bag(
            (torch.arange(tokens, device=x.device) * len(parts) + parts).flatten(),
            x.reshape(tokens * len(parts), x.shape[1] // len(parts)),
            (self.begins + tokens * parts).flatten(),
            mode="sum",
            per_sample_weights=counts.t().flatten(),
        )
        summed = summed.unflatten(0, (len(parts), len(self.begins))).transpose(0, 1).flatten(1)
        return torch.cat([summed, summed[-1:].expand(self.copies, -1)])

    def _shown(self, x: Tensor) -> Tensor:
        return x[self.ends]


LastAlone = Padded | Ends
"""The layouts of which only the last token of a sequence is represented."""
