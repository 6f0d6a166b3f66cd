"""Ranks, metrics and baselines against brute force, by hand, and against an independent library."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.config.schema import EvalConfig
from flm_torchrec.data.dataset import EntityFeatures, PreparedData, Ragged
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.splits import COLD_ITEM, Examples, split
from flm_torchrec.errors import ConfigError, RunError
from flm_torchrec.evaluation.baselines import (
    EASE,
    ContentKNN,
    ItemKNN,
    Markov,
    Popularity,
    Random,
    _blocks,
    _nearest,
    _seen,
)
from flm_torchrec.evaluation.evaluate import EvaluationTask, evaluate
from flm_torchrec.evaluation.head_scorer import HeadScorer, log_sum_exp
from flm_torchrec.evaluation.lists import ItemFacts, list_metrics
from flm_torchrec.evaluation.memory import check_events, check_vectors, left_out
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.protocol import Of, Scorer
from flm_torchrec.evaluation.ranking import Blocks, RankingProblem, count_ranks, rank_targets
from flm_torchrec.mixture import Mixture

CPU = torch.device("cpu")


@dataclasses.dataclass
class Alone:
    """A single process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def exchange(self, parts: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        return parts


@dataclasses.dataclass
class Together(Alone):
    """One of several processes, which are threads here; each waits for the others in each collective."""

    shown: dict[int, Any] = dataclasses.field(default_factory=dict)
    barrier: threading.Barrier = dataclasses.field(default_factory=lambda: threading.Barrier(1))

    def _of_all(self, mine: Any) -> list[Any]:
        self.barrier.wait(10)
        self.shown[self.rank] = mine
        self.barrier.wait(10)
        return [self.shown[rank] for rank in range(self.world_size)]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = self._of_all(tensor.clone())
        assert len({part.shape for part in found}) == 1
        return found

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_gather(tensor)).sum(0)

    def exchange(self, parts: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        found = [sent[self.rank] for sent in self._of_all(parts)]
        assert [len(part) for part in found] == sizes
        return found


def together(processes: int, work: Callable[[Together], Any]) -> list[Any]:
    """What each of several processes finds."""
    shown, barrier = dict[int, Any](), threading.Barrier(processes)
    comms = [Together(rank, processes, CPU, shown, barrier) for rank in range(processes)]

    def of_one(comm: Together) -> Any:
        try:
            return work(comm)
        except Exception:
            barrier.abort()  # so that no other waits
            raise

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(of_one, comms))


class RandomEncoder:
    """Fixed random vectors, small integers so that ties happen."""

    dim = 4
    growth = 0
    mixture = None

    def __init__(self, users: int, items: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.user = {h: torch.randint(-2, 3, (users, 4), generator=g).float() for h in REPRESENTATIONS}
        self.item = torch.randint(-2, 3, (items, 4), generator=g).float()

    def users(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {h: v[rows] for h, v in self.user.items()}

    def items(self, ids: np.ndarray, of: Of = "all") -> torch.Tensor:
        return self.views(ids)[of]

    def views(self, ids: np.ndarray) -> dict[Of, torch.Tensor]:
        return {"all": self.item[ids], "content": self.item[ids] * 0.5, "id": self.item[ids] * 0.25}


def make_data(histories: list[list[int]], items: int) -> PreparedData:
    lengths = [len(h) for h in histories]
    count, nothing = sum(lengths), EntityFeatures({}, np.zeros((0, 0), np.float32))
    return PreparedData(
        path=Path("none"), schema=Schema("t", "t", len(histories), items, count),
        offsets=np.concatenate([[0], np.cumsum(lengths)]), item=np.array([i for h in histories for i in h], np.int64),
        timestamp=np.arange(count), event=np.zeros(count, np.int32), value=np.ones(count, np.float32),
        segment=None, items=nothing, users=nothing,
    )  # fmt: skip


HISTORIES = st.lists(st.lists(st.integers(0, 11), min_size=3, max_size=8), min_size=1, max_size=9)


@settings(max_examples=30)
@given(HISTORIES, st.integers(1, 5), st.integers(1, 15), st.integers(0, 99))
def test_ranks_are_those_of_brute_force(histories: list[list[int]], users: int, items: int, seed: int) -> None:
    data = make_data(histories, 12)
    examples = split(data, "leave-one-out", 0.1).test
    encoder = RandomEncoder(len(histories), 12, seed)
    scorer = HeadScorer(encoder, 12, items, Alone())
    ranked = rank_targets(RankingProblem(data, examples, Blocks(users, items)), scorer, Alone(), top_k=3)
    for row, history in enumerate(histories):
        for head in REPRESENTATIONS:
            scores = (encoder.user[head][row] @ encoder.item.T).numpy()
            *seen, target = history
            others = [i for i in range(12) if i not in seen and i != target]
            assert ranked.ranks[head][row] == 1 + sum(scores[i] >= scores[target] for i in others)
            allowed = sorted((scores[i] for i in [*others, target]), reverse=True)[:3]
            assert scores[ranked.top[head][row][: len(allowed)]].tolist() == allowed
            assert (ranked.top[head][row][len(allowed) :] == -1).all()


@settings(max_examples=12)
@given(HISTORIES, st.integers(1, 5), st.integers(1, 13), st.integers(2, 4), st.booleans())
def test_processes_that_share_the_items_find_what_one_finds(
    histories: list[list[int]], users: int, block: int, processes: int, mixes: bool
) -> None:
    """Blocks of items for each process, or too few for that; ties; a process without users. Every scorer."""
    data = make_data(histories, 12)
    splits = split(data, "leave-one-out", 0.1)
    encoder, mask = RandomEncoder(len(histories), 12), splits.train_mask(data)
    if mixes:
        encoder.mixture = Mixture((1.0, 0.5, 2.0), (0.0, 1.0, 0.0))  # type: ignore[assignment]
    problem = RankingProblem(data, splits.test, Blocks(users, block))

    def found(comm: Alone) -> list[Any]:
        heads = HeadScorer(encoder, 12, block, comm)
        scorers: list[Scorer] = [heads, Popularity(data, mask), ItemKNN(data, mask, splits.test, 3)]
        scorers += [Markov(data, mask, splits.test), EASE(data, mask, splits.test), Random()]
        ranked = [rank_targets(problem, scorer, comm, 3) for scorer in scorers]
        facts = ItemFacts(data.item_counts(mask), heads.fetch)
        counts = [count_ranks(one, name, 12, comm, (3,)) for one in ranked for name in one.ranks]
        lists = [list_metrics(one.top[name], facts, comm) for one in ranked for name in one.ranks]
        return [ranked, [(count.histogram.tolist(), count.covered) for count in counts], lists]

    alone, several = found(Alone()), together(processes, found)
    for ranked, counts, lists in several:
        assert counts == alone[1] and lists == alone[2]
        for one, whole in zip(ranked, alone[0], strict=True):
            for name in one.ranks:
                np.testing.assert_array_equal(one.ranks[name], whole.ranks[name][one.rows])
                np.testing.assert_array_equal(one.top[name], whole.top[name][one.rows])
    rows = np.concatenate([ranked[0].rows for ranked, _, _ in several])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(histories)))


@settings(max_examples=20)
@given(HISTORIES, st.integers(1, 5), st.integers(1, 13))
def test_scores_that_all_users_share_rank_as_scores_of_each(histories: list[list[int]], users: int, block: int) -> None:
    class OfEach(Popularity):
        alike = False

    data = make_data(histories, 12)
    splits = split(data, "leave-one-out", 0.1)
    problem = RankingProblem(data, splits.test, Blocks(users, block))
    mask = splits.train_mask(data)
    one, each = (rank_targets(problem, kind(data, mask), Alone(), 5) for kind in (Popularity, OfEach))
    np.testing.assert_array_equal(one.ranks["popularity"], each.ranks["popularity"])
    np.testing.assert_array_equal(one.top["popularity"], each.top["popularity"])


def test_a_mixture_is_summed_in_parts_to_the_last_bit() -> None:
    parts = [torch.randn(3, 2500, generator=torch.Generator().manual_seed(seed)) * 30 for seed in range(3)]
    parts[0][0, 0] = parts[1][1, 1200] = torch.inf
    for part in parts:
        part[2, 7] = -torch.inf
    whole = torch.logsumexp(torch.stack(parts), 0)
    assert torch.equal(log_sum_exp(parts), whole)


def test_no_process_has_the_vectors_of_all_items() -> None:
    """Ten blocks of items on four processes, each of which encodes and keeps its own."""
    encoder = RandomEncoder(1, 100)

    def kept(comm: Together) -> tuple[int, torch.Tensor]:
        scorer = HeadScorer(encoder, 100, 10, comm)
        return len(scorer.vectors), scorer.fetch(torch.tensor([[99, 0], [comm.rank * 7, 50]]))

    for rank, (items, fetched) in enumerate(together(4, kept)):
        assert items in (20, 30)
        assert torch.equal(fetched, encoder.item[torch.tensor([[99, 0], [rank * 7, 50]])])


def test_a_score_that_is_rounded_in_another_way_is_counted_again() -> None:
    """The smaller product that tells the true items' scores may be off in the last bit; a tie is a tie all the same."""

    class Rounded(HeadScorer):
        def scores_of(self, users: Any, name: str, items: torch.Tensor) -> torch.Tensor:
            return super().scores_of(users, name, items) * 1.001

    data = make_data([[0, 1, 2], [3, 4, 5]], 10)
    encoder = RandomEncoder(2, 10)
    encoder.item[:] = 1.0
    problem = RankingProblem(data, Examples(np.array([0, 1]), np.array([2, 5])))
    found = [rank_targets(problem, kind(encoder, 10, 4, Alone()), Alone()) for kind in (HeadScorer, Rounded)]
    assert found[0].ranks["fused"].tolist() == found[1].ranks["fused"].tolist() == [8, 8]


def test_a_scorer_that_knows_nothing_ranks_last() -> None:
    data = make_data([[0, 1, 2]], 10)
    encoder = RandomEncoder(1, 10)
    encoder.item.zero_()
    problem = RankingProblem(data, Examples(np.array([0]), np.array([2])))
    ranked = rank_targets(problem, HeadScorer(encoder, 10, 4, Alone()), Alone())
    assert ranked.ranks["fused"].tolist() == [8]  # ten items less the two seen


def test_a_model_that_diverged_is_refused() -> None:
    encoder = RandomEncoder(1, 10)
    encoder.item[3] = float("nan")
    with pytest.raises(RunError, match="item vectors: not a number"):
        HeadScorer(encoder, 10, 4, Alone())
    encoder = RandomEncoder(1, 10)
    encoder.user["content"][:] = float("inf")
    with pytest.raises(RunError, match="content head"):
        HeadScorer(encoder, 10, 4, Alone()).blocks(np.array([0]), [np.array([0])])


def test_metrics_of_a_hand_worked_case() -> None:
    """Ranks 1, 2, 4 and 11 of 20 items: 1/log2(2) = 1, 1/log2(3) = 0.6309, 1/log2(5) = 0.4307."""
    counts = RankCounts(np.bincount([0, 1, 3, 10], minlength=20), {10: 5})
    assert counts.hit_rate(1) == 0.25 and counts.hit_rate(10) == 0.75 and counts.hit_rate(20) == 1.0
    assert counts.ndcg(10) == pytest.approx((1 + 0.63093 + 0.43068) / 4, abs=1e-5)
    assert counts.mrr() == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 11) / 4)
    assert counts.coverage(10) == 0.25


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 30))
def test_metrics_agree_with_torchmetrics(ranks: list[int], k: int) -> None:
    counts = RankCounts(np.bincount(np.array(ranks) - 1, minlength=30), {})
    scores = torch.arange(30, 0, -1).float()
    relevant = [torch.arange(1, 31) == r for r in ranks]
    assert counts.hit_rate(k) == pytest.approx(np.mean([retrieval_hit_rate(scores, t, k) for t in relevant]))
    assert counts.ndcg(k) == pytest.approx(
        np.mean([retrieval_normalized_dcg(scores, t, k) for t in relevant]), abs=1e-6
    )
    assert counts.mrr() == pytest.approx(np.mean([retrieval_reciprocal_rank(scores, t) for t in relevant]), abs=1e-6)


@settings(max_examples=30)
@given(HISTORIES, st.integers(1, 12))
def test_item_knn_is_that_of_dense_numpy(histories: list[list[int]], neighbours: int) -> None:
    data = make_data(histories, 12)
    splits = split(data, "leave-one-out", 0.1)
    scorer = ItemKNN(data, splits.train_mask(data), splits.test, neighbours)
    seen = np.zeros((len(histories), 12))
    for row, history in enumerate(histories):
        seen[row, history[:-2]] = 1
    norms = np.linalg.norm(seen, axis=0)
    cosine = seen.T @ seen / np.maximum(np.outer(norms, norms), 1e-12)
    np.fill_diagonal(cosine, 0)
    for row in cosine:
        row[row < np.sort(row)[::-1][neighbours - 1]] = 0
    expected = np.stack([sum(cosine[i] for i in set(h[:-1])) for h in histories])
    known = scorer.block(np.arange(len(histories)))
    found = torch.cat([scorer.scores(known, "item-kNN", 0, 5), scorer.scores(known, "item-kNN", 5, 12)], 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@settings(max_examples=30)
@given(HISTORIES, st.integers(1, 12), st.integers(1, 40))
def test_item_knn_keeps_the_same_neighbours_in_blocks_of_any_size(
    histories: list[list[int]], neighbours: int, entries: int
) -> None:
    """Also where many items are equally near, and where one item alone is more than a block may hold."""
    data = make_data(histories, 12)
    seen, every = _seen(data, np.ones(len(data.item), bool)), np.ones(12, bool)
    blocks = list(_blocks(seen, every, entries))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])] and blocks[-1][1] == 12
    dense = (seen.T @ seen).toarray()
    held = (dense > 0).sum(1)
    assert all(held[start:stop].sum() <= entries or stop == start + 1 for start, stop in blocks)
    found = _nearest(seen, neighbours, every, entries)
    np.testing.assert_array_equal(found.toarray(), _nearest(seen, neighbours, every).toarray())
    some = np.arange(12) % 3 == 0
    only = _nearest(seen, neighbours, some, entries).toarray()
    np.testing.assert_array_equal(only, found.toarray() * some[:, None])
    assert found.nnz <= np.count_nonzero(dense)


@settings(max_examples=30)
@given(HISTORIES, st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=12, max_size=12), st.booleans())
def test_content_knn_is_the_cosine_of_features(histories: list[list[int]], words: list[list[int]], dense: bool) -> None:
    """Rare words count more and a word twice counts once; recent events count more; without features all are alike."""
    codes = np.array([word for w in words for word in w], np.int64)
    rows = Ragged(np.concatenate([[0], np.cumsum([len(w) for w in words])]), codes)
    vectors = np.random.default_rng(0).normal(size=(12, 3 * dense)).astype(np.float32)
    data = dataclasses.replace(make_data(histories, 12), items=EntityFeatures({"words": rows}, vectors))
    examples = split(data, "leave-one-out", 0.1).test
    count = np.array([sum(word in w for w in words) for word in range(7)])
    held = np.array([[word in w for word in range(7)] for w in words]) * np.log(1 + 12 / np.maximum(count, 1))

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

    content = unit(np.concatenate([unit(held), unit(vectors)], 1))
    known = [sum(0.7**age * content[item] for age, item in enumerate(h[-2::-1])) for h in histories]
    scorer = ContentKNN(data, examples)
    users = scorer.block(np.arange(len(histories)))
    found = torch.cat([scorer.scores(users, "content-kNN", 0, 5), scorer.scores(users, "content-kNN", 5, 12)], 1)
    np.testing.assert_allclose(found.numpy(), unit(np.stack(known)) @ content.T, atol=1e-5)
    last = torch.tensor([h[-1] for h in histories])
    assert torch.equal(scorer.scores_of(users, "content-kNN", last), found[torch.arange(len(last)), last])


def test_item_knn_of_a_large_catalogue_holds_no_square_of_it() -> None:
    """200,000 items would take 160 GB; what is kept is what users saw together."""
    rng = np.random.default_rng(0)
    items, users = 200_000, 2_000
    seen = sp.csr_matrix(
        (np.ones(users * 20, np.float32), rng.integers(0, items, users * 20), np.arange(0, users * 20 + 1, 20)),
        shape=(users, items),
    )
    seen.sum_duplicates()
    seen.data[:] = 1.0
    every = np.ones(items, bool)
    assert len(list(_blocks(seen, every, 100_000))) > 3
    found = _nearest(seen, 5, every, 100_000)
    assert found.shape == (items, items) and 0 < found.nnz < 20 * 20 * users
    item = int(seen.indices[0])
    others = set(seen[seen[:, item].nonzero()[0]].indices.tolist()) - {item}
    assert set(found[item].indices.tolist()) <= others


@settings(max_examples=30)
@given(HISTORIES, st.floats(0.5, 50))
def test_ease_solves_its_regression(histories: list[list[int]], l2: float) -> None:
    """Column j of the weights is the ridge regression of item j on the others: its gradient there is zero."""
    data = make_data(histories, 12)
    splits = split(data, "leave-one-out", 0.1)
    scorer = EASE(data, splits.train_mask(data), splits.test, l2)
    seen = np.zeros((len(histories), 12))
    for row, history in enumerate(histories):
        seen[row, history[:-2]] = 1
    assert np.all(np.diag(scorer.weights) == 0)
    gradient = seen.T @ (seen @ scorer.weights - seen) + l2 * scorer.weights
    np.fill_diagonal(gradient, 0)
    np.testing.assert_allclose(gradient, 0, atol=1e-4 * max(1, l2))
    known = scorer.block(np.arange(len(histories)))
    found = torch.cat([scorer.scores(known, "EASE-R", 0, 5), scorer.scores(known, "EASE-R", 5, 12)], 1)
    expected = np.stack([sum(scorer.weights[i] for i in set(h[:-1])) for h in histories])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_popularity_counts_training_events_alone() -> None:
    data = make_data([[0, 0, 1, 2], [1, 1, 0, 2]], 3)
    scorer = Popularity(data, split(data, "leave-one-out", 0.1).train_mask(data))
    assert scorer.scores(2, "popularity", 0, 3).tolist() == [[2.0, 2.0, 0.0]] * 2


def test_held_out_items_are_ranked_among_all_and_among_themselves(small: PreparedData) -> None:
    splits = split(small, "cold-start", 0.2)
    encoder = RandomEncoder(len(splits.test), small.schema.items)
    config, cold = EvalConfig(ks=(5,), ease_items=0), splits.cold_items
    assert cold is not None
    task = EvaluationTask(small, splits.test, "test", splits.train_mask(small), cold)
    found = evaluate(task, encoder, Alone(), config)
    assert list(found.table) == [
        "popularity", "item-kNN", "Markov", *REPRESENTATIONS, "random", "content alone", "ids alone"
    ]  # fmt: skip
    users = len(set(splits.test.user.tolist()))
    assert found.users == users < len(splits.test)
    assert found.ranked == f"{len(splits.test)} events ({users} users), every item ranked"
    none = dataclasses.replace(config, baselines=())
    bare = evaluate(task, encoder, Alone(), none)
    assert list(bare.table) == [*REPRESENTATIONS, "content alone", "ids alone"]
    assert set(found.segments) == {"warm", "cold user", "cold item", "cold item, among those alone"}
    assert found.segments["cold item, among those alone"]["popularity"]["hr@5"] == 0.0  # all tie, ties count against
    ranked = rank_targets(RankingProblem(small, splits.test, among=cold), Random(), Alone())
    assert ranked.rows.tolist() == np.flatnonzero(cold[small.item[splits.test.end]]).tolist()
    assert ranked.ranks["random"].max() <= cold.sum()
    chosen = splits.test.label[ranked.rows] == COLD_ITEM  # type: ignore[index]
    assert found.segments["cold item, among those alone"]["random"]["hr@5"] == np.mean(
        ranked.ranks["random"][chosen] <= 5
    )


def test_a_split_without_a_cold_item_to_predict_has_no_table_of_them(small: PreparedData) -> None:
    splits = split(small, "cold-start", 0.2)
    warm = splits.test.take(np.flatnonzero(splits.test.label != COLD_ITEM))  # type: ignore[arg-type]
    encoder = RandomEncoder(len(warm), small.schema.items)
    task = EvaluationTask(small, warm, "test", splits.train_mask(small), splits.cold_items)
    found = evaluate(task, encoder, Alone(), EvalConfig(ks=(5,), baselines=("popularity",)))
    assert set(found.segments) == {"warm", "cold user"}
    json.dumps(found.to_json(), allow_nan=False)
    assert found.notes == ["no event of a cold item to predict, so there is no table of cold items"]


def test_all_rows_of_the_table_rank_the_same_users(small: PreparedData) -> None:
    splits = split(small, "leave-one-out", 0.1)
    encoder = RandomEncoder(len(splits.test), small.schema.items)
    task = EvaluationTask(small, splits.test, "test", splits.train_mask(small))
    found = evaluate(task, encoder, Alone(), EvalConfig(ks=(5,)))
    assert list(found.table) == ["popularity", "item-kNN", "Markov", "EASE-R", *REPRESENTATIONS]
    assert all(set(m) == {"hr@5", "ndcg@5", "mrr", "coverage@10"} for m in found.table.values())
    few = EvalConfig(ks=(5,), baselines=("EASE-R",))
    found_few = evaluate(task, encoder, Alone(), few)
    assert list(found_few.table) == ["EASE-R", *REPRESENTATIONS] and found_few.table["EASE-R"] == found.table["EASE-R"]
    assert small.segment is not None
    shares = {s: np.mean(small.segment[splits.test.end] == s) for s in found.segments}
    for name, metrics in found.table.items():
        weighted = sum(shares[s] * found.segments[s][name]["hr@5"] for s in found.segments)
        assert weighted == pytest.approx(metrics["hr@5"])


def test_counts_of_parts_add_up(small: PreparedData) -> None:
    examples = split(small, "leave-one-out", 0.1).test
    encoder = RandomEncoder(len(examples), small.schema.items)
    scorer = HeadScorer(encoder, small.schema.items, 64, Alone())
    ranked = rank_targets(RankingProblem(small, examples, Blocks(16, 64)), scorer, Alone(), 10)
    counts = count_ranks(ranked, "fused", small.schema.items, Alone(), (10,))
    assert counts.users == len(examples)
    assert counts.covered[10] == len(np.unique(ranked.top["fused"]))


def test_limits_are_told_with_their_numbers_and_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = EvalConfig(ease_items=1000)
    assert left_out(asked, 1000) == left_out(EvalConfig(baselines=("popularity",)), 10**6) == []
    assert left_out(dataclasses.replace(asked, ease_items=0), 10**6) == []
    (note,) = left_out(asked, 200_000)
    assert "200,000 items would need 298.0 GiB (8 items^2 bytes), and eval.ease_items is 1,000; raise" in note
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    assert left_out(asked, 353) == []
    with pytest.raises(ConfigError, match=r"ease_items: 354 items .* set eval\.ease_items below 354"):
        left_out(asked, 354)
    check_events(EvalConfig(), 41_666)
    check_events(EvalConfig(baselines=("popularity", "EASE-R")), 10**9)
    with pytest.raises(ConfigError, match=r"item-kNN needs 22\.4 GiB for 1,000,000,000 training events \(24 bytes"):
        check_events(EvalConfig(), 10**9)
    with pytest.raises(ConfigError, match=r"Markov needs .*leave it out of eval\.baselines"):
        check_events(EvalConfig(baselines=("Markov",)), 41_667)
    encoder = RandomEncoder(1, 1)
    check_vectors(62_500, encoder, Alone().device)
    with pytest.raises(
        RunError, match=r"ranking by 90,000,000 vectors of items of 4 numbers needs 1\.3 GiB on each rank"
    ):
        check_vectors(90_000_000, encoder, Alone().device)
    encoder.growth = 1
    with pytest.raises(RunError, match="ranking by 62,500 vectors"):
        check_vectors(62_500, encoder, Alone().device)
