"""Every head, their fusion and the baselines on the same examples, in one table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flm_torchrec.config.schema import EvalConfig
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import COLD_ITEM, Examples
from flm_torchrec.evaluation.baselines import EASE, ItemKNN, Popularity, Random
from flm_torchrec.evaluation.protocol import Comm, Encoder, Scorer
from flm_torchrec.evaluation.ranking import Blocks, HeadScorer, Ranked, count_ranks, rank_targets

COVERAGE_AT = 10


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name of scorer: over all examples, and by segment of the example's next event."""

    split: str
    users: int
    table: dict[str, dict[str, float]]
    segments: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_heads(
    data: PreparedData, examples: Examples, encoder: Encoder, comm: Comm, config: EvalConfig
) -> dict[str, float]:
    """Metrics of the heads alone, named such as `fused/ndcg@10`: for validation while training; collective."""
    scorer = HeadScorer(encoder, data.schema.items, config.item_block, comm)
    ranked = rank_targets(data, examples, scorer, comm, blocks_of(config))
    return {
        f"{name}/{metric}": value
        for name in scorer.names
        for metric, value in count_ranks(ranked, name, data.schema.items, comm).metrics(config.ks).items()
    }


def evaluate(
    data: PreparedData, examples: Examples, fit: np.ndarray, encoder: Encoder, comm: Comm,
    config: EvalConfig, split: str, cold_items: np.ndarray | None = None,
) -> Evaluation:  # fmt: skip
    """Rank the true item of every example by every head and baseline; collective.

    Args:
        fit: [interactions] bool, the events that the baselines may learn from.
        split: name of the examples, for the report.
        cold_items: [items] bool, those held out of training: examples of one are ranked among all items and once
            more among these alone, also by content and by ids alone and by chance.
    """
    items, block = data.schema.items, config.item_block
    scorers = [*_baselines(data, examples, fit, config), HeadScorer(encoder, items, block, comm)]
    if cold_items is not None:
        scorers += [
            *([Random()] if "random" in config.baselines else []),
            HeadScorer(encoder, items, block, comm, "content", {"content alone": "content"}),
            HeadScorer(encoder, items, block, comm, "id", {"ids alone": "collaborative"}),
        ]
    labels = examples.label
    if labels is None and data.segment is not None:
        labels = data.segment[examples.end]
    found = Evaluation(split, len(examples), {})
    for scorer in scorers:
        ranked = rank_targets(data, examples, scorer, comm, blocks_of(config), COVERAGE_AT)
        among = None
        if cold_items is not None:
            among = rank_targets(data, examples, scorer, comm, blocks_of(config), among=cold_items)
        for name in scorer.names:
            found.table[name] = count_ranks(ranked, name, items, comm, (COVERAGE_AT,)).metrics(config.ks)
            for label in [] if labels is None else np.unique(labels):
                part = count_ranks(_only(ranked, labels == label), name, items, comm)
                found.segments.setdefault(str(label), {})[name] = part.metrics(config.ks)
            if among is not None and labels is not None:
                part = count_ranks(_only(among, labels == COLD_ITEM), name, items, comm)
                found.segments.setdefault(f"{COLD_ITEM}, among those alone", {})[name] = part.metrics(config.ks)
    return found


def _baselines(data: PreparedData, examples: Examples, fit: np.ndarray, config: EvalConfig) -> list[Scorer]:
    """Those asked for that learn from events; EASE-R only where the catalogue is small enough."""
    found: list[Scorer] = []
    if "popularity" in config.baselines:
        found.append(Popularity(data, fit))
    if "item-kNN" in config.baselines:
        found.append(ItemKNN(data, fit, examples, config.neighbours))
    if "EASE-R" in config.baselines and data.schema.items <= config.ease_items:
        found.append(EASE(data, fit, examples))
    return found


def _only(ranked: Ranked, wanted: np.ndarray) -> Ranked:
    kept = wanted[ranked.rows]
    return Ranked(ranked.rows[kept], {n: r[kept] for n, r in ranked.ranks.items()}, {})


def blocks_of(config: EvalConfig) -> Blocks:
    """How much is scored at once."""
    return Blocks(config.user_block, config.item_block)
