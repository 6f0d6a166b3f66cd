"""How often the sequences of each domain of joint data are learnt from (`data.domain_weights`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flm_torchrec.data.dataset import BLOCK_ROWS, PreparedData, spans
from flm_torchrec.data.weights import parse_weights
from flm_torchrec.data.windows import Windows
from flm_torchrec.errors import ConfigError, DataError

Weights = Literal["natural"] | tuple[str, ...]
"""`NAME=WEIGHT` for each domain; natural: each sequence once an epoch."""


@dataclass(frozen=True)
class DomainShares:
    """An epoch has as many windows as there are, with a fixed share of each domain: some twice, or not at all."""

    domain: np.ndarray  # [windows] number of the domain of the window's last event
    counts: np.ndarray  # [domains] windows of each domain in an epoch

    @classmethod
    def of(cls, data: PreparedData, windows: Windows, weights: Weights) -> DomainShares | None:
        """By the weights of the config; None where they are natural.

        Raises:
            ConfigError: the data are not joint, or the weights do not name each domain once, or name one without
                anything to learn from.
        """
        if weights == "natural":
            return None
        if data.item_domain is None:
            raise ConfigError(
                f"data.domain_weights: {data.path} has one domain; leave it out, or give several data.path"
            )
        parsed = parse_weights(weights, "data.domain_weights")
        if not sum(parsed.values()) > 0:
            raise ConfigError("data.domain_weights: all weights are 0; give one domain more")
        names = list(data.schema.domains)
        if sorted(parsed) != sorted(names):
            raise ConfigError(f"data.domain_weights: name each of {', '.join(names)} once, not {', '.join(parsed)}")
        domain = data.item_domain[data.item[windows.end - 1]]
        there = np.bincount(domain, minlength=len(names))
        wanted = np.array([parsed[name] for name in names])
        for name, weight, windows_of in zip(names, wanted, there, strict=True):
            if weight and not windows_of:
                raise ConfigError(f"data.domain_weights: domain '{name}' has no sequence to learn from; set it to 0")
        exact = len(windows) * wanted / wanted.sum()
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: len(windows) - counts.sum()]] += 1
        return cls(domain, counts)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """[windows] the windows of an epoch in order: each of a domain equally often, or once less."""
        chosen = []
        for number, count in enumerate(self.counts):
            own = np.flatnonzero(self.domain == number)
            while count > 0:
                chosen.append(rng.permutation(own)[:count])
                count -= len(chosen[-1])
        return rng.permutation(np.concatenate(chosen))

    def item_counts(self, data: PreparedData, windows: Windows, learnt: np.ndarray) -> np.ndarray:
        """[items] float64: how often an epoch is expected to learn each item.

        Args:
            learnt: [interactions] bool, the training events.
        """
        of_domain = np.bincount(self.domain, minlength=len(self.counts))
        often = (self.counts / np.maximum(of_domain, 1))[self.domain]
        counts, ends = np.zeros(data.schema.items), np.cumsum(windows.end - windows.start)
        cuts = np.searchsorted(ends, np.arange(BLOCK_ROWS, ends.max(initial=0), BLOCK_ROWS))
        for part in np.split(np.arange(len(windows)), cuts):
            lengths = windows.end[part] - windows.start[part]
            rows = spans(windows.start[part], lengths)
            np.add.at(counts, data.item[rows], np.repeat(often[part], lengths) * learnt[rows])
        return counts


def check_domains(data: PreparedData, counts: np.ndarray) -> None:
    """Raise DataError where a domain of joint data has nothing that a target could be told from.

    Args:
        counts: [items] training events of each item.
    """
    if data.item_domain is None:
        return
    items = np.bincount(data.item_domain, counts > 0, minlength=len(data.schema.domains)).astype(int)
    for name, known in zip(data.schema.domains, items, strict=True):
        if known < 2:
            raise DataError(
                f"{data.path}: domain '{name}' is left with {known} items that have training events, so a target has no"
                " other candidate; leave the domain out, or take another data.split"
            )
