"""How the tokens of B sequences lie in memory. The layers of the tower are the same for each layout.

A sequence is a prefix token, which stands for the user, and then one token for each event.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.model.elapsed import Clock, by_elapsed, elapsed

SHORT = 8
"""Sequences up to this length are padded together; so are those up to twice it, up to four times it, and so on."""
SHORT_ON_GPU = 64
"""A GPU waits for the launch of a kernel longer than it computes over so little padding."""
MANY = 32
"""So many sequences of one length, the longest of those that would be padded together, are by themselves, unpadded."""
FEW = 4
"""Rows below which a product of matrices is rounded in another way on CPUs."""

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

    @property
    def age(self) -> Tensor:
        """As of `Ends`, [B, L]; below 0 at padding."""
        return self.lengths.unsqueeze(1) - self.position

    @property
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
        self.tokens: Tensor | None = None  # [T] in the order of `mix`; None: they are in this order
        self.back: Tensor | None = None  # [T] where each token is in that order
        nth = self.sequence  # [T] of each token, the place of its sequence in that order
        if sizes != sorted(sizes):
            nth = _inverse(torch.argsort(lengths, stable=True))[self.sequence]
            self.tokens = torch.argsort(nth, stable=True)
            self.back = _inverse(self.tokens)
        self._make_buckets(sorted(sizes), self.group(nth), self.group(self.position))
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

    @property
    def count(self) -> Tensor:
        """As of `Layout`, [R, 1]."""
        return self._shown(self.position).float().unsqueeze(1)

    def each(self, x: Tensor) -> Tensor:
        """As of `Layout`, [R, D]."""
        return x.index_select(0, self._shown(self.sequence))

    def mean(self, items: Tensor) -> Tensor:
        """As of `Layout`; items [T, D], of which those at a prefix are not used."""
        return self._summed(items, lambda position, _age, _clock: 1.0 / position.clamp(min=1))

    def recent(self, items: Tensor, keep: Tensor, old: Tensor | None) -> Tensor:
        """As of `Layout`; items [T, D], of which those at a prefix are not used."""
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
        total = targets.new_zeros(len(self.lengths), targets.shape[1]).index_add(0, self.sequence, targets)
        count = (self.lengths[self.sequence] - 1).float().unsqueeze(1)
        return (total.index_select(0, self.sequence) - targets) / count.clamp(min=1), count

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
        end = ends[self.row]
        self.age = end - torch.arange(len(time), device=lengths.device)
        """[T] tokens from each token to the last of its sequence."""
        self.since = elapsed(time[end, None], time[:, None]).flatten()
        """[T] as of `elapsed`: the time from each token to the last of its sequence."""

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


def _inverse(order: Tensor) -> Tensor:
    """[n] a permutation → [n] the one that undoes it."""
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
