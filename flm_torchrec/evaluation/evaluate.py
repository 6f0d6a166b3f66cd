"""Every head, their fusion and the baselines on the same examples, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from flm_torchrec.config.heads import FUSED, REPRESENTATIONS
from flm_torchrec.config.schema import BASELINES, EvalConfig
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import COLD_ITEM, Examples
from flm_torchrec.evaluation.baselines import EASE, ContentKNN, ItemKNN, Markov, Popularity, Random
from flm_torchrec.evaluation.head_scorer import ONE_VECTOR, HeadScorer, ItemShares
from flm_torchrec.evaluation.known_items import had_before
from flm_torchrec.evaluation.lists import ItemFacts, Targets, list_metrics, target_metrics
from flm_torchrec.evaluation.memory import check_events, check_vectors, left_out
from flm_torchrec.evaluation.protocol import Collectives, Encoder, Of, Scorer
from flm_torchrec.evaluation.ranking import Blocks, Ranked, RankingProblem, count_ranks, rank_targets
from flm_torchrec.evaluation.segments import NO_EVENTS, labels_by

COVERAGE_AT = 10
OFTEN = 0.2
"""Share of true items that the user had before above which these and the others have tables of their own."""
CONTENT_ALONE, IDS_ALONE = "content alone", "ids alone"
ROWS = (*BASELINES, *REPRESENTATIONS, ONE_VECTOR, CONTENT_ALONE, IDS_ALONE)
"""Rows that a table can have."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics by scorer: over all examples, and by segment of the example's next event."""

    split: str
    users: int
    table: dict[str, dict[str, float]]
    segments: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    lists: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of the lists by scorer; see `evaluation.lists`."""
    notes: list[str] = field(default_factory=list)
    """What the reader of the table should know of it, a line each."""
    ranked: str = ""
    """What the examples are, with their number, and what is ranked for them."""
    examples: str = ""
    """`Examples.digest` of what was ranked: evaluations of which it differs cannot be averaged."""
    ranks: dict[str, np.ndarray] = field(default_factory=dict)
    """[examples] by scorer: the rank of each true item, where the task keeps them."""
    chosen: dict[str, np.ndarray] = field(default_factory=dict)
    """[examples] bool by segment of all items: which examples are of it, where the task keeps the ranks."""

    def to_json(self) -> dict[str, Any]:
        """The content of `evaluation-SPLIT.json`."""
        tables = {"table": self.table, "segments": self.segments, "lists": self.lists}
        whom = {"users": self.users, "ranked": self.ranked, "examples": self.examples}
        return {"split": self.split, **whom, **tables}


@dataclass(frozen=True)
class EvaluationTask:
    """Which examples are ranked, and what baselines may learn from."""

    data: PreparedData
    examples: Examples
    split: str
    """Name of the examples in the report."""
    train_mask: np.ndarray  # [interactions] bool: events that the baselines learn from
    cold_items: np.ndarray | None = None  # [items] bool: items held out of training
    keep_ranks: bool = False
    """Give every example's rank too, 8 bytes for each example and scorer."""
    by: tuple[str, ...] = ()
    """Of `segments.BY`: what else results are broken down by."""
    unit: str = "events"
    """What the examples are called where a user has several."""
    drawn_of: int = 0
    """Users of whom those of the examples were drawn; 0: these are all."""


def evaluate_heads(
    data: PreparedData, examples: Examples, encoder: Encoder, comm: Collectives, config: EvalConfig
) -> dict[str, float]:
    """Metrics of the heads alone, named such as `fused/ndcg@10`, for validation during training; collective.

    Raises:
        RunError: a vector or a score is not a number.
    """
    shares = ItemShares(data.schema.items, config.item_block, comm)
    check_vectors(shares.count, encoder, comm.device)
    scorer = HeadScorer(encoder, data.schema.items, config.item_block, comm)
    ranked = rank_targets(RankingProblem(data, examples, blocks_of(config)), scorer, comm)
    return {
        f"{name}/{metric}": value
        for name in REPRESENTATIONS
        for metric, value in count_ranks(ranked, name, data.schema.items, comm).metrics(config.ks).items()
    }


def evaluate(task: EvaluationTask, encoder: Encoder, comm: Collectives, config: EvalConfig) -> Evaluation:
    """Rank the true item of every example by every head and baseline; collective.

    Where the task has cold items, there are three more scorers: content alone, ids alone and chance. Examples of a cold
    item are ranked among all items, and once more among the cold items alone.

    Raises:
        RunError: a vector or a score is not a number.
        ConfigError: a baseline needs more memory than there is.
    """
    data, examples = task.data, task.examples
    items = data.schema.items
    problem = RankingProblem(data, examples, blocks_of(config))
    among_cold = replace(problem, among=task.cold_items)
    repeated = float(had_before(data, examples).mean())
    by = (*task.by, "repeats") if repeated > OFTEN and "repeats" not in task.by else task.by
    segments = list(_segments(labels_by(by, data, examples, task.train_mask)))
    targets = Targets.of(data, examples)
    cold = np.zeros(len(examples), bool) if examples.label is None else examples.label == COLD_ITEM
    notes = [*left_out(config, items), *_untested(data, examples)]
    if task.cold_items is not None and not cold.any():
        notes.append("no event of a cold item to predict, so there is no table of cold items")
    if repeated > OFTEN:
        notes.append(
            f"{repeated:.0%} of the true items are ones that the user had before, which lists of flm recommend and"
            " flm serve leave out: read the tables 'new to the user' and 'had before', or prepare with --dedup first"
        )
    check_events(config, data.count(task.train_mask))
    shares = ItemShares(items, config.item_block, comm)
    check_vectors(len(_heads(task)) * shares.count, encoder, comm.device)
    users = examples.users
    result = Evaluation(task.split, users, {}, notes=notes, ranked=_ranked(task, users))
    if task.keep_ranks:
        result.chosen.update(segments)
    scorers = _scorers(task, encoder, comm, config)
    facts = _item_facts(task, scorers)
    longest = max(COVERAGE_AT, *config.ks) if targets else COVERAGE_AT
    for scorer in scorers:
        ranked = rank_targets(problem, scorer, comm, longest)
        ranked_cold = rank_targets(among_cold, scorer, comm) if cold.any() else None
        for name in scorer.names:
            result.table[name] = count_ranks(ranked, name, items, comm, (COVERAGE_AT,)).metrics(config.ks)
            result.lists[name] = list_metrics(ranked.top[name][:, :COVERAGE_AT], facts, comm)
            if targets:
                result.lists[name] |= target_metrics(ranked.top[name], ranked.rows, targets, config.ks, comm)
            if task.keep_ranks:
                result.ranks[name] = _ranks_of_all(ranked, name, len(examples), comm)
            for label, chosen in segments:
                part = count_ranks(_only(ranked, chosen), name, items, comm)
                result.segments.setdefault(label, {})[name] = part.metrics(config.ks)
            if ranked_cold is not None:
                part = count_ranks(_only(ranked_cold, cold), name, items, comm)
                result.segments.setdefault(f"{COLD_ITEM}, among those alone", {})[name] = part.metrics(config.ks)
    result.notes.extend(_unshown(result, max(config.ks)))
    return result


def _unshown(found: Evaluation, k: int) -> Iterator[str]:
    """A line for each segment of new items of which fused lists have none, and those of the content head have some."""
    for label in (COLD_ITEM, NO_EVENTS):
        fused, content = (
            found.segments.get(label, {}).get(head, {}).get(f"hr@{k}", 0.0) for head in (FUSED, "content")
        )
        if content > 0 and not fused:
            yield (
                f"of '{label}' none is among the first {k} of the fused lists, and the content head finds some (hr@{k}"
                f" {content:.4f}): give them a slot of their own, with 'head': 'content' (docs/serving.md, 'New items')"
            )


def _ranked(task: EvaluationTask, users: int) -> str:
    """What is ranked for how many examples, and of how many users these are."""
    examples = len(task.examples)
    drawn = f"{users} of {task.drawn_of} users, drawn once" if users < task.drawn_of else f"{users} users"
    whom = drawn if examples == users else f"{examples} {task.unit} ({drawn})"
    what = "every item" if task.data.item_domain is None else "every item of the event's domain"
    return f"{whom}, {what} ranked"


def _untested(data: PreparedData, examples: Examples) -> list[str]:
    """A line for each domain of joint data that no example is of."""
    if data.item_domain is None:
        return []
    there = np.bincount(data.item_domain[data.item[examples.end]], minlength=len(data.schema.domains))
    empty = (name for name, count in zip(data.schema.domains, there, strict=True) if not count)
    return [f"domain '{name}' has no event to predict in this split, so it has no table" for name in empty]


def _segments(labels: Iterable[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Each label, and the examples [E] bool that have it."""
    for kind in labels:
        for label in np.unique(kind):
            yield str(label), kind == label


def _item_facts(task: EvaluationTask, scorers: list[Scorer]) -> ItemFacts:
    """Items are alike or not by the vectors of the model, whichever scorer made the list."""
    popularity = task.data.item_counts(task.train_mask)
    return ItemFacts(popularity, next(s.fetch for s in scorers if isinstance(s, HeadScorer)))


def _scorers(task: EvaluationTask, encoder: Encoder, comm: Collectives, config: EvalConfig) -> list[Scorer]:
    """Baselines, heads, and chance where items are held out, in the order of the table."""
    baselines = _baselines(task, config)
    items, block = task.data.schema.items, config.item_block
    heads = [HeadScorer(encoder, items, block, comm, *of) for of in _heads(task)]
    chance = [Random()] if task.cold_items is not None and "random" in config.baselines else []
    return [*baselines, *heads[:1], *chance, *heads[1:]]


def _heads(task: EvaluationTask) -> list[tuple[Of, dict[str, str] | None]]:
    """Which vectors of the items are scored, and by which heads, as of `HeadScorer`; more where items are held out."""
    if task.cold_items is None:
        return [("all", None)]
    return [("all", None), ("content", {CONTENT_ALONE: "content"}), ("id", {IDS_ALONE: "collaborative"})]


def _baselines(task: EvaluationTask, config: EvalConfig) -> list[Scorer]:
    """The configured baselines; EASE-R only where there are few enough items."""
    data, examples = task.data, task.examples
    baselines: list[Scorer] = []
    if "popularity" in config.baselines:
        baselines.append(Popularity(data, data.of_targets(task.train_mask)))
    if "item-kNN" in config.baselines:
        baselines.append(ItemKNN(data, task.train_mask, examples, config.neighbours))
    if "content-kNN" in config.baselines:
        baselines.append(ContentKNN(data, examples))
    if "Markov" in config.baselines:
        baselines.append(Markov(data, task.train_mask, examples))
    if "EASE-R" in config.baselines and data.schema.items <= config.ease_items:
        baselines.append(EASE(data, task.train_mask, examples))
    return baselines


def _ranks_of_all(ranked: Ranked, name: str, examples: int, comm: Collectives) -> np.ndarray:
    """[examples] ranks from all processes, each of which has ranked some of the examples."""
    ranks = torch.zeros(examples, dtype=torch.int64)
    ranks[torch.from_numpy(ranked.rows)] = torch.from_numpy(ranked.ranks[name])
    return comm.all_reduce_sum(ranks).numpy()


def _only(ranked: Ranked, wanted: np.ndarray) -> Ranked:
    """The examples where `wanted` [examples] is true, without their top items."""
    kept = wanted[ranked.rows]
    return Ranked(ranked.rows[kept], {n: r[kept] for n, r in ranked.ranks.items()}, {})


def blocks_of(config: EvalConfig) -> Blocks:
    """How much is scored at once, by the configuration."""
    return Blocks(config.user_block, config.item_block)
