"""Bytes that a rank sends for the losses of a step, and the FLOP of their products, by `loss.candidates`."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("global", "node", "local")
SENT_BYTES = {"fp32": 4, "bf16": 2}
"""Of a number of a vector or a gradient that ranks send, by `distributed.collectives`."""
SOFTMAXES = 4
"""Of the default heads: content, collaborative, the same with an event left out, sequential."""


@dataclass(frozen=True)
class LossWork:
    """The work of a rank's step; the same on each rank, so that a rank with more rows than others is not seen."""

    dim: int
    """Width of a head; an item's vector has twice that."""
    negatives: int
    """Drawn in a step; with `every`, the items of the catalogue."""
    targets: float
    """Of a rank."""
    items: float
    """Different items among them."""
    shown: float | None = None
    """Different candidates that a rank shows to others, counted; None: targets and negatives are all different."""
    softmaxes: int = SOFTMAXES
    """Over all candidates, by vectors of width `dim`; one of fused vectors, which are twice as wide, counts as two."""
    every: bool = False
    """Every item is a candidate of every query, with each setting of `loss.candidates`; ranks show each item once."""
    collectives: str = "fp32"
    """`distributed.collectives`."""

    def sent(self, kind: str, ranks: int, node: int) -> float:
        """Bytes that leave a rank.

        An all-gather of what R ranks show each sends R - 1 times a rank's part, a reduce-scatter back as much. Of a
        candidate that is a vector, an id and two log-probabilities, and back the vector; of an item of the contrast
        two vectors half as wide and an id, and back the vectors.

        Args:
            node: ranks of a node.
        """
        vector, number = SENT_BYTES[self.collectives] * 2 * self.dim, 8
        others = (node if kind == "node" else ranks) - 1
        if kind == "local":
            return others * (self.negatives / ranks * (2 * vector + 2 * number) + number)
        own = 0 if self.every else self.items
        shown = self.shown or own + self.negatives / (others + 1)
        rows = shown * (2 * vector + 2 * number) + self.items * (2 * vector + number)
        return others * (rows + number) + (ranks - 1) * 3 * number

    def flop(self, kind: str, ranks: int, node: int) -> float:
        """Of the products: logits, and the gradients of queries and candidates, two for each number."""
        near = {"global": ranks, "node": node, "local": 1}[kind]
        items = near * self.items
        candidates = items + self.negatives
        if self.every:
            candidates, items = float(self.negatives), min(items, self.negatives)
        elif self.shown and kind != "local":
            candidates = near * self.shown
        softmax = self.targets * candidates * self.softmaxes + self.items * items * 2
        return 3 * 2 * self.dim * softmax
