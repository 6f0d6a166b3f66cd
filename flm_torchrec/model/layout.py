"""How the tokens of B sequences lie in memory. The layers of the tower are the same for each layout.

A sequence is a prefix token, which stands for the user, and then one token for each event.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from flm_torchrec.model.elapsed import Clock, by_elapsed
from flm_torchrec.model.spans import Spans
from flm_torchrec.model.token_passes import gather, is_native, mean_so_far, recent_so_far, sum_by

SHORT = 8
"""Sequences up to this length are padded together; so are those up to twice it, up to four times it, and so on."""
SHORT_ON_GPU = 64
"""A GPU waits for the launch of a kernel longer than it computes over so little padding."""
MANY = 32
"""So many sequences of one length, the longest of those that would be padded together, are by themselves, unpadded."""

Attend = Callable[[Tensor, Clock], Tensor]
"""[b, L, parts * D] projections and [b, L] times of padded sequences → [b, L, D]."""


class Layout(Protocol):
    """`…` stands for the dimensions of the tokens, R for the number of tokens that get a representation."""

    @property
    def position(self) -> Tensor:
        """[…] or [L]: position of each token in its sequence, from 0."""

    @property
    def count(self) -> Tensor:
        """[R, 1] float: items up to each represented token."""

    def each(self, x: Tensor) -> Tensor:
        """[B, D] of each sequence → [R, D] at each of its represented tokens."""

    def mean(self, items: Tensor) -> Tensor:
        """[items of …, D] → [R, D]: mean over the items up to each represented token; zeros without any."""

    def recent(self, items: Tensor, keep: Tensor, old: Tensor | None) -> Tensor:
        """[items of …, D], zero where there is no item → [R, D]: sum over the items up to each represented token.

        Args:
            keep: [1], below 1: what an item counts, of what the item after it counts.
            old: [1, BUCKETS] of `by_elapsed`, a factor of what an item counts by the time since then; None: 1.
        """

    def begin(self, prefix: Tensor, events: Tensor) -> Tensor:
        """[R, D] of `each` and [events of …, D] → […, D]: the tokens, the prefix of each sequence first."""

    def group(self, x: Tensor) -> Tensor:
        """[…, D] → the same tokens in the order that `mix` needs."""

    def represented(self, x: Tensor) -> Tensor:
        """Tokens in the order of `mix` → [R, D]."""

    def mix(self, x: Tensor, attend: Attend) -> Tensor:
        """[…, parts * D] → […, D]: attention inside each sequence, none between sequences."""


class Jagged:
    """[T] tokens, one sequence after the other without padding. Every token is represented.

    With padding, attention costs the longest length squared for each sequence, and most sequences are much shorter
    than the longest. So `group` sorts sequences by length, and `mix` pads only those of similar length together.
    Sequences that are sorted already, as those of training, are not moved.

    Args:
        lengths: [B] tokens of each sequence, the prefix included; 0 is a sequence without tokens.
        time: [T] seconds.
    """

    def __init__(self, lengths: Tensor, time: Tensor) -> None:
        self.lengths = lengths
        sequences = torch.arange(len(lengths), device=lengths.device)
        self.sequence = torch.repeat_interleave(sequences, lengths, output_size=len(time))  # [T]
        self.first = torch.cumsum(lengths, 0) - lengths  # [B] the first token of each sequence
        self.position = torch.arange(len(self.sequence), device=lengths.device) - self.first[self.sequence]  # [T]
        sizes = lengths.tolist()
        ordered = sorted(sizes)
        self.bounds = [0, *accumulate(ordered)]
        """[B + 1] in the order of `mix`, the first token of each sequence, and T."""
        self.tokens: Tensor | None = None  # [T] in the order of `mix`; None: they are in this order
        self.back: Tensor | None = None  # [T] where each token is in that order
        nth = self.sequence  # [T] of each token, the place of its sequence in that order
        if sizes != ordered:
            nth = _inverse(torch.argsort(lengths, stable=True))[self.sequence]
            self.tokens = torch.argsort(nth, stable=True)
            self.back = _inverse(self.tokens)
        self._make_buckets(ordered, self.group(nth), self.group(self.position))
        parts = self.group(time).split(self.sizes)
        self.clocks = [Clock(self._pad(part.unsqueeze(1), n).squeeze(2)) for n, part in enumerate(parts)]

    def _make_buckets(self, lengths: list[int], sequence: Tensor, position: Tensor) -> None:
        """Split the sequences, sorted by length, into buckets of similar length.

        Args:
            lengths: by sequence, tokens.
            sequence: [T] number of each token's sequence.
            position: [T].
        """
        self.shapes: list[tuple[int, int]] = []  # of each bucket, sequences and longest length
        self.sizes: list[int] = []  # of each bucket, tokens
        cuts, limit = [0], SHORT_ON_GPU if sequence.is_cuda else SHORT
        while cuts[-1] < len(lengths):
            last = bisect_right(lengths, limit)
            if last > cuts[-1]:
                longest = bisect_left(lengths, lengths[last - 1])
                cuts += [longest, last] if last - longest >= MANY else [last]
            limit *= 2
        for first, last in pairwise(cuts):
            if last > first:
                self.shapes.append((last - first, lengths[last - 1]))
                self.sizes.append(sum(lengths[first:last]))
        self.slots: list[Tensor | None] = []  # of each bucket, [its tokens] index among its padded tokens; None: all
        begin = 0
        parts = zip(self.shapes, sequence.split(self.sizes), position.split(self.sizes), strict=True)
        for (count, longest), sequences, positions in parts:
            full = len(sequences) == count * longest
            self.slots.append(None if full else (sequences - begin) * longest + positions)
            begin += count

    @cached_property
    def spans(self) -> Spans:
        """The sequences in the order of `mix`."""
        return Spans(torch.tensor(self.bounds), self.clocks)

    @property
    def count(self) -> Tensor:
        """As of `Layout`, [R, 1]."""
        return self._shown(self.position).float().unsqueeze(1)

    def each(self, x: Tensor) -> Tensor:
        """As of `Layout`, [R, D]."""
        return gather(x, self._shown(self.sequence))

    def mean(self, items: Tensor) -> Tensor:
        """As of `Layout`; items [T, D], of which those at a prefix are not used."""
        if is_native(items):
            return self.represented(mean_so_far(self.group(items), self.spans))
        return self._summed(items, lambda position, _age, _clock: 1.0 / position.clamp(min=1))

    def recent(self, items: Tensor, keep: Tensor, old: Tensor | None) -> Tensor:
        """As of `Layout`; items [T, D], of which those at a prefix are not used."""
        if is_native(items):
            return self.represented(recent_so_far(self.group(items), keep, old, self.spans))
        # A rank without events owes the others these gradients.
        if old is None:
            return self._summed(items, lambda _position, age, _clock: keep**age) + 0.0 * keep
        found = self._summed(items, lambda _position, age, clock: keep**age * by_elapsed(old, clock.between)[0])
        return found + 0.0 * (keep + old.sum())

    def _summed(self, items: Tensor, count: Callable[[Tensor, Tensor, Clock], Tensor]) -> Tensor:
        """[T, D] → [R, D]: sums over the tokens up to each represented token, but for the prefix.

        As products with padded sequences: along tokens, sums take a pass for each power of two, and running sums one
        thread a column on a GPU.

        Args:
            count: [L, 1] position of a token, [L, L] how many tokens ago another one was and [b, L] times → what that
                one counts, [L, L] or [b, L, L].
        """

        def summed(part: Tensor, clock: Clock) -> Tensor:
            position = torch.arange(part.shape[1], device=part.device)
            age = position[:, None] - position  # below 0: a later token
            counts = count(position[:, None], age.clamp(min=0), clock) * ((age >= 0) & (position > 0))
            return torch.bmm(counts.expand(len(part), -1, -1), part)

        return self.represented(self.mix(self.group(items), summed))

    def others(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] of the item after each token → [T, D]: mean over the other items of its sequence; [T, 1]: how many.

        An item follows each token, so these are all items of the sequence, the one after the last token too.
        """
        total = sum_by(targets, self.sequence, len(self.lengths))
        count = (self.lengths[self.sequence] - 1).float().unsqueeze(1)
        return (gather(total, self.sequence) - targets) / count.clamp(min=1), count

    def begin(self, prefix: Tensor, events: Tensor) -> Tensor:
        """As of `Layout`; events [T, D], of which those at a prefix are not used."""
        return torch.where((self.position == 0).unsqueeze(1), prefix, events)

    def group(self, x: Tensor) -> Tensor:
        """As of `Layout`."""
        return x if self.tokens is None else x.index_select(0, self.tokens)

    def represented(self, x: Tensor) -> Tensor:
        """As of `Layout`, [R, D]."""
        return self._shown(x) if self.back is None else x.index_select(0, self._shown(self.back))

    def _shown(self, x: Tensor) -> Tensor:
        """[T, …] of all tokens → [R, …] of those that are represented: here all."""
        return x

    def mix(self, x: Tensor, attend: Attend) -> Tensor:
        """As of `Layout`."""
        mixed = [attend(self._pad(part, n), self.clocks[n]).flatten(0, 1) for n, part in enumerate(x.split(self.sizes))]
        return torch.cat([m if at is None else m.index_select(0, at) for m, at in zip(mixed, self.slots, strict=True)])

    def _pad(self, part: Tensor, bucket: int) -> Tensor:
        (count, longest), slots = self.shapes[bucket], self.slots[bucket]
        if slots is not None:
            part = part.new_zeros(count * longest, part.shape[1]).index_copy_(0, slots, part)
        return part.unflatten(0, (count, longest))


def _inverse(order: Tensor) -> Tensor:
    """[n] a permutation → [n] the one that undoes it."""
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
