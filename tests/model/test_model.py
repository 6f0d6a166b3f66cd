"""The tower, its heads, the softmax and the loader: behaviour that must hold whatever the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.config.schema import ModelConfig
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData, Ragged
from flm_torchrec.data.loader import Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.prefetch import Prefetch
from flm_torchrec.data.splits import split
from flm_torchrec.data.windows import windows
from flm_torchrec.errors import DataError
from flm_torchrec.model import softmax, token_passes
from flm_torchrec.model.dropout import Dropout
from flm_torchrec.model.elapsed import BUCKETS
from flm_torchrec.model.fusion import FUSIONS
from flm_torchrec.model.last_token import Padded
from flm_torchrec.model.layout import Jagged
from flm_torchrec.model.softmax import CandidateVectors, Hidden, inclusion_log_probability, sampled_softmax
from flm_torchrec.model.space import used_by_each
from flm_torchrec.model.targets import columns_of, hidden_of
from flm_torchrec.model.tower import EmbeddingOutputs, Encoded, Tower, Widths
from flm_torchrec.model.transformer import BLOCKS, CausalTransformer

DIM = 8


class MadeTower(Tower):
    """Takes the inputs of a batch by name."""

    def forward(self, looked: EmbeddingOutputs, **batch: Tensor) -> Encoded:  # type: ignore[override]
        return super().forward(looked, SimpleNamespace(**batch))


def make_tower(
    fusion: str = "gated", block: str = "transformer", relative: bool = False, cosine: bool = False
) -> MadeTower:
    torch.manual_seed(0)
    widths = Widths(item_features=2, item_dense=1, user_features=1, user_dense=2, history=2, max_tokens=6)
    similarity = "cosine" if cosine else "dot"
    chosen: dict[str, Any] = {
        "fusion": fusion,
        "block": block,
        "relative_bias": relative,
        "similarity": similarity,
    }
    tower = MadeTower(widths, ModelConfig(dim=DIM, user_id_dropout=0.1, **chosen)).eval()
    for layers in (tower.item_content.mlp, tower.content_head.learned.layers):
        weight, _ = layers[-1].parameters()
        torch.nn.init.normal_(weight, std=0.3)  # as after training
    return tower


def let_times_count(tower: MadeTower) -> None:
    """The numbers of times and distances, which begin as those that change nothing."""
    for name, number in tower.named_parameters():
        if "elapsed" in name or "biases" in name:
            torch.nn.init.normal_(number)


def inputs(items: int = 7, lengths: tuple[int, ...] = (3, 1, 4), seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    count, users = sum(lengths), len(lengths)
    tokens = torch.randint(0, items, (count,), generator=g)
    tokens[[sum(lengths[:b]) for b in range(users) if lengths[b]]] = items
    looked = EmbeddingOutputs(
        item_id=torch.randn(items, DIM, generator=g),
        item_source=torch.randn(items, DIM, generator=g),
        item_target=torch.randn(items, DIM, generator=g),
        item_context=torch.randn(items, DIM, generator=g),
        item_features=torch.randn(items, 2 * DIM, generator=g),
        user=torch.randn(users, 2 * DIM, generator=g),
        history=torch.randn(count, 2 * DIM, generator=g),
    )
    return {
        "looked": looked, "item_dense": torch.randn(items, 1, generator=g), "item_known": torch.ones(items),
        "item_sketch": torch.nn.functional.normalize(torch.randn(items, DIM, generator=g)),
        "user_dense": torch.randn(users, 2, generator=g), "user_known": torch.ones(users),
        "value": torch.zeros(count), "time": torch.arange(count), "lengths": torch.tensor(lengths), "tokens": tokens,
        "targets": torch.zeros(count, dtype=torch.int64),
    }  # fmt: skip


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_head_gives_a_vector_in_the_one_space(fusion: str) -> None:
    out = make_tower(fusion)(**inputs())
    assert out.items.shape == out.content_items.shape == (7, 2 * DIM)
    assert tuple(out.representations) == REPRESENTATIONS
    assert all(h.shape == (8, 2 * DIM) for h in out.representations.values())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fusion_that_no_loss_learns_from_costs_nothing_in_training(fusion: str) -> None:
    """Its parameters have a gradient of zero, for which other ranks wait; evaluation makes it."""
    tower, batch = make_tower(fusion), inputs()
    tower.learns_fused = False
    assert len(tower(**batch).representations["fused"]) == 8
    unlearned = tower.train()(**batch).representations
    assert [len(unlearned[name]) for name in REPRESENTATIONS] == [8, 8, 8, 0]
    torch.cat(list(unlearned.values())).sum().backward()
    assert all(not p.grad.any() for p in tower.fusion.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in tower.parameters())


@settings(max_examples=20)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.sampled_from(sorted(BLOCKS)), st.booleans())
@example([0, 0], "transformer", True)
@example([0], "hstu", True)
def test_the_last_tokens_alone_are_as_among_all(lengths: list[int], block: str, relative: bool) -> None:
    """Where nothing is to be predicted. Also of one sequence alone. Bits differ on processors with AVX-512."""
    batch = inputs(lengths=tuple(lengths))
    tower = make_tower(block=block, relative=relative)
    let_times_count(tower)
    every = tower(**batch).representations
    last = (batch["lengths"].cumsum(0) - 1)[batch["lengths"] > 0]
    batch["targets"] = batch["targets"][:0]
    for name, found in tower(**batch).representations.items():
        assert len(found) == max(len(last), min(4, len(batch["time"])))
        torch.testing.assert_close(found[: len(last)], every[name][last], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_pointwise_attention_has_the_gradients_of_its_formula(relative: bool) -> None:
    """By finite differences; where nothing learns, the formula itself gives the same."""
    torch.manual_seed(0)
    lengths, time = torch.tensor([3, 0, 1, 6]), torch.tensor([0, 0, 5, 0, 0, 0, 1, 9, 70, 70])
    config = ModelConfig(dim=DIM, block="hstu", layers=1, relative_bias=relative)
    model = CausalTransformer(config, 6).double().eval()
    for number in model.biases.parameters():
        torch.nn.init.normal_(number)
    names, values = zip(*model.named_parameters(), strict=True)

    def out(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x, Jagged(lengths, time)))

    x = torch.randn(10, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(out, (x, *values))
    with torch.no_grad():
        torch.testing.assert_close(model(x, Jagged(lengths, time)), out(x, *values))


@pytest.mark.parametrize(("block", "relative"), [(b, r) for b in BLOCKS for r in (False, True)])
def test_no_head_sees_a_later_token(block: str, relative: bool) -> None:
    tower, batch = make_tower(block=block, relative=relative), inputs()
    before = tower(**batch).representations
    changed = {**batch, "tokens": batch["tokens"].clone(), "value": batch["value"].clone()}
    changed["tokens"][7] = (batch["tokens"][7] + 1) % 7  # the last token of the third sequence
    changed["value"][7] = 3.0
    after = tower(**changed).representations
    for name in REPRESENTATIONS:
        torch.testing.assert_close(before[name][:7], after[name][:7])
        assert not torch.allclose(before[name][7], after[name][7]), name


def test_sequences_of_a_batch_do_not_touch_each_other() -> None:
    tower, batch = make_tower(), inputs()
    alone = {**batch, **{name: batch[name][4:] for name in ("time", "tokens", "value")}}
    alone["lengths"] = batch["lengths"][2:]
    looked: EmbeddingOutputs = batch["looked"]
    alone["looked"] = replace(looked, user=looked.user[2:], history=looked.history[4:])
    alone["user_dense"], alone["user_known"] = batch["user_dense"][2:], batch["user_known"][2:]
    together, single = tower(**batch), tower(**alone)
    for name in REPRESENTATIONS:
        torch.testing.assert_close(together.representations[name][4:], single.representations[name])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.sampled_from(sorted(BLOCKS)), st.booleans())
@example([0], "transformer", True)
@example([5] * 40 + [3, 7], "hstu", False)
def test_attention_in_buckets_is_attention_of_each_sequence_alone(
    lengths: list[int], block: Any, relative: bool
) -> None:
    torch.manual_seed(sum(lengths))
    model = CausalTransformer(ModelConfig(dim=DIM, block=block, relative_bias=relative), 40).eval()
    for bias in model.biases.parameters():
        torch.nn.init.normal_(bias)
    x, time = torch.randn(sum(lengths), DIM, requires_grad=True), torch.arange(sum(lengths)) * 7
    found = model(x, Jagged(torch.tensor(lengths), time))
    parts = zip(x.split(lengths), time.split(lengths), strict=True)
    # Each token of each sequence is in turn the last one: padding behind it changes nothing.
    alone = torch.cat(
        [
            model(part.expand(len(part), -1, -1), Padded(torch.arange(len(part)), seconds.expand(len(part), -1)))
            for part, seconds in parts
            if len(part)
        ]
        + [x[:0]]
    )
    torch.testing.assert_close(found, alone)
    leaves = [x, *model.parameters()]  # with no token at all, each must have a gradient all the same
    assert all(g is not None for g in torch.autograd.grad(found.sum(), leaves, allow_unused=True))


@given(st.floats(0.01, 0.9), st.integers(0, 10_000))
def test_dropout_drops_its_share_and_keeps_the_mean(p: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.ones(2001, 10, requires_grad=True)
    found = Dropout(p)(x)
    kept = found > 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.025)  # seven standard deviations
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - p)))
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], found)
    columns = kept.flatten()[:20000].view(-1, 4).float().T.corrcoef()  # elements of one draw
    assert p > 0.8 or float((columns - torch.eye(4)).abs().max()) < 0.1
    assert Dropout(p).eval()(x) is x


def changes(field: str) -> set[str]:
    """Which representations change when one of the looked-up inputs does."""
    tower, batch = make_tower(), inputs()
    before = tower(**batch)
    other = EmbeddingOutputs(**vars(batch["looked"]))
    value = getattr(other, field).clone()
    if field == "user":
        value[:, :DIM] += 1.0  # the id alone
    else:
        value += torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    setattr(other, field, value)
    after = tower(**{**batch, "looked": other})
    return {n for n in REPRESENTATIONS if not torch.allclose(before.representations[n], after.representations[n])}


def test_the_content_head_knows_no_ids_and_the_collaborative_head_nothing_else() -> None:
    assert changes("item_id") == {"collaborative", "sequential", "fused"}
    assert changes("user") == {"collaborative", "fused"}
    assert changes("item_features") == {"content", "sequential", "fused"}
    assert changes("history") == {"sequential", "fused"}
    assert changes("item_source") == {"collaborative", "fused"}
    assert changes("item_context") == {"sequential", "fused"}
    assert changes("item_target") == set()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.05, 0.95), st.booleans())
def test_recent_items_count_more(lengths: list[int], keep: float, timed: bool) -> None:
    """Token by token, in each layout; by their place and, where events have times, by how long ago they were."""
    items, rate = torch.randn(sum(lengths), 3, dtype=torch.float64), torch.tensor([keep], dtype=torch.float64)
    time, old = torch.randint(0, 1000, (sum(lengths),)), torch.rand(1, BUCKETS, dtype=torch.float64)
    wanted, begin = list[Tensor](), 0
    for length in lengths:
        items[begin : begin + min(1, length)] = 0  # the prefix
        time[begin : begin + length] = time[begin : begin + length].sort().values
        rows, clock = items[begin : begin + length], time[begin : begin + length]
        for n in range(length):
            counts = rate ** torch.arange(n, -1, -1)
            if timed:
                counts = counts * old[0, [int(math.log2(clock[n] - then + 1)) for then in clock[: n + 1]]]
            wanted.append(counts @ rows[: n + 1])
        begin += length
    found = Jagged(torch.tensor(lengths), time).recent(items, rate, old if timed else None)
    torch.testing.assert_close(found, torch.stack(wanted) if wanted else items)
    alone = [items.new_zeros(len(lengths), 12, 3), torch.zeros(len(lengths), 13, dtype=torch.int64)]
    for row, (part, clock) in enumerate(zip(items.split(lengths), time.split(lengths), strict=True)):
        alone[0][row, : max(0, len(part) - 1)] = part[1:]
        alone[1][row, : len(part)] = clock
    last = torch.tensor(lengths).cumsum(0) - 1
    padded = Padded(torch.tensor(lengths).sub(1).clamp(min=0), alone[1]).recent(alone[0], rate, old if timed else None)
    there = torch.tensor(lengths) > 0
    torch.testing.assert_close(padded[there], found[last[there]])


@pytest.mark.parametrize("timed", [False, True])
def test_times_count_where_events_have_them(timed: bool) -> None:
    """In the content and the sequential head, never in the collaborative one."""
    torch.manual_seed(0)
    widths = Widths(item_features=2, item_dense=1, user_features=1, user_dense=2, history=2, max_tokens=6, timed=timed)
    tower, batch = MadeTower(widths, ModelConfig(dim=DIM)).eval(), inputs()
    let_times_count(tower)
    before = tower(**batch).representations
    after = tower(**{**batch, "time": batch["time"] * 1000}).representations
    changed = {name for name in before if not torch.allclose(before[name], after[name])}
    assert changed == ({"content", "sequential", "fused"} if timed else set())


def test_an_untrained_content_head_compares_features_with_those_of_the_history() -> None:
    """The last item counts most. A token without history has a direction, and a bounded gradient."""
    torch.manual_seed(0)
    widths = Widths(item_features=2, item_dense=1, user_features=1, user_dense=2, history=2, max_tokens=6)
    tower, batch = MadeTower(widths, ModelConfig(dim=DIM)).eval(), inputs()
    batch["looked"].item_id *= DIM**-0.5  # rows of length 1, as tables begin
    out = tower(**batch)
    sketches, head = batch["item_sketch"], used_by_each(out.representations["content"])["content"]
    torch.testing.assert_close(head.norm(dim=1), torch.ones(8))
    tokens = batch["tokens"]
    recent = sketches[tokens[7]] + 0.7 * sketches[tokens[6]] + 0.49 * sketches[tokens[5]]
    assert torch.cosine_similarity(head[7], recent, 0) > 0.97
    cosines = torch.cosine_similarity(used_by_each(out.content_items)["content"], sketches)
    assert (cosines > 0.97).all() and (
        torch.cosine_similarity(used_by_each(out.items)["content"], sketches) > 0.9
    ).all()
    _, bias = tower.content_head.learned.layers[-1].parameters()
    gradient = torch.autograd.grad(head[0].sum(), bias)[0]
    assert 0 < gradient.norm() < 100


def test_the_collaborative_head_does_not_see_order() -> None:
    tower, batch = make_tower(), inputs()
    turned = {**batch, "tokens": batch["tokens"].clone()}
    turned["tokens"][[5, 6, 7]] = batch["tokens"][[7, 5, 6]]  # of the third sequence, all but the prefix
    before, after = tower(**batch).representations, tower(**turned).representations
    torch.testing.assert_close(before["collaborative"][7], after["collaborative"][7])
    assert not torch.allclose(before["sequential"][7], after["sequential"][7])


def test_the_collaborative_head_scores_by_vectors_of_its_own() -> None:
    out = make_tower()(**inputs())
    assert not used_by_each(out.representations["collaborative"])["content"].any()
    assert not used_by_each(out.representations["sequential"])["collaborative"].any()
    target = inputs()["looked"].item_target
    torch.testing.assert_close(used_by_each(out.items)["collaborative"], target)


def test_a_target_is_left_out_of_what_predicts_it() -> None:
    """Each query of the leave-one-out loss depends on all items of its sequence but its target."""
    tower, batch = make_tower().train(), inputs()
    tower.config = replace(tower.config, user_id_dropout=0.0)
    for part in tower.modules():
        if isinstance(part, Dropout):
            part.p = 0.0
    batch["targets"] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])  # sequences of 3, 1 and 4 targets

    def queries(source: Tensor) -> Tensor:
        out = tower(**{**batch, "looked": replace(batch["looked"], item_source=source)})
        assert out.left_out is not None
        return out.left_out

    before = queries(batch["looked"].item_source)
    for changed, affected in ((1, {0, 2}), (3, set()), (5, {4, 6, 7})):
        source = batch["looked"].item_source.clone()
        source[changed] += 1.0
        moved = (queries(source) - before).abs().sum(1) > 1e-6
        assert set(torch.nonzero(moved).flatten().tolist()) == affected


def test_an_item_that_no_training_event_has_is_its_content_alone() -> None:
    batch = inputs()
    batch["item_known"] = torch.zeros(7)
    out = make_tower()(**batch)
    assert not used_by_each(out.items)["collaborative"].any()
    torch.testing.assert_close(out.items, out.content_items)


def test_an_item_without_a_known_id_is_its_content() -> None:
    batch = inputs()
    batch["item_known"][3] = 0.0
    out: Encoded = make_tower()(**batch)
    torch.testing.assert_close(out.items[3], out.content_items[3])
    assert not torch.allclose(out.items[2], out.content_items[2])


def in_parts(patch: pytest.MonkeyPatch, tiled: bool) -> None:
    """A softmax of several chunks or of several tiles, which divide neither queries nor candidates."""
    patch.setattr(softmax, "tile_shape", lambda *_: (3, 7) if tiled else None)
    patch.setattr(softmax, "chunk_rows", lambda *_: 3)


@settings(max_examples=30)
@given(st.integers(0, 20), st.integers(2, 30), st.integers(0, 10_000), st.booleans())
def test_softmax_and_its_gradients_are_those_of_cross_entropy(queries: int, items: int, seed: int, tiled: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    query, vectors = (torch.randn(n, 5, generator=g, dtype=torch.double) for n in (queries, items))
    log_q, scale = -torch.rand(items, generator=g, dtype=torch.double), torch.tensor(0.7, dtype=torch.double)
    target = torch.randint(0, items, (queries,), generator=g)
    leaves = [x.requires_grad_() for x in (query, vectors, scale)]
    logits = scale * query @ vectors.T - log_q + F.one_hot(target, items) * log_q
    expected = F.cross_entropy(logits, target, reduction="sum")
    with pytest.MonkeyPatch.context() as patch:
        if tiled:
            in_parts(patch, tiled)
        found = sampled_softmax(query, CandidateVectors(vectors, log_q), target, scale)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_softmax_is_the_same_in_chunks_and_leaves_out_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    query, vectors, target = torch.randn(50, 4, generator=g), torch.randn(20, 4, generator=g), torch.arange(50) % 10
    log_q = torch.zeros(20)
    log_q[10:] = math.inf
    candidates = CandidateVectors(vectors, log_q)
    whole = sampled_softmax(query, candidates, target, torch.tensor(1.0))
    monkeypatch.setattr(softmax, "chunk_rows", lambda *_: 3)
    torch.testing.assert_close(sampled_softmax(query, candidates, target, torch.tensor(1.0)), whole)
    torch.testing.assert_close(whole, F.cross_entropy(query @ vectors[:10].T, target, reduction="sum"))


@pytest.mark.parametrize(("precision", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_softmax_over_many_candidates_is_that_of_chunks_and_holds_no_block_of_them(
    monkeypatch: pytest.MonkeyPatch, precision: torch.dtype, close: float
) -> None:
    """Vectors, scale and corrections as in training; the bounds are lower."""
    g = torch.Generator().manual_seed(1)
    query, vectors = (F.normalize(torch.randn(n, 32, generator=g), dim=1) for n in (300, 4_000))
    log_q, weight = -8 * torch.rand(4_000, generator=g), 2 * torch.rand(300, generator=g)
    candidates = CandidateVectors(vectors.requires_grad_(), log_q, precision=precision)
    leaves = [query.requires_grad_(), vectors, torch.tensor(14.0, requires_grad=True)]
    target = torch.randint(0, 4_000, (300,), generator=g)
    found = []
    monkeypatch.setattr(softmax, "CHUNK_BYTES", {"cpu": 2**19})
    for most in (softmax.MOST_BYTES["cpu"], 2**19):
        monkeypatch.setattr(softmax, "MOST_BYTES", {"cpu": most})
        loss = sampled_softmax(query, candidates, target, leaves[2], weight=weight)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    rows, columns = softmax.tile_shape(300, 4_000, precision, query.device) or (0, 0)
    assert rows >= 128 and rows * columns * precision.itemsize <= 2**19
    for chunked, tiled in zip(*found, strict=True):
        assert (chunked - tiled).abs().max() <= close * chunked.abs().max()


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(2, 30), st.integers(0, 10_000), st.booleans())
def test_weighted_softmax_with_hidden_candidates_is_cross_entropy_without_them(
    queries: int, items: int, seed: int, tiled: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    query, vectors = (torch.randn(n, 5, generator=g, dtype=torch.double) for n in (queries, items))
    target = torch.randint(0, items, (queries,), generator=g)
    left_out = (torch.rand(queries, items, generator=g) < 0.4).scatter(1, target[:, None], False)
    leaves = [x.requires_grad_() for x in (query, vectors)]
    weight = 3 * torch.rand(queries, generator=g, dtype=torch.double)
    by_query = F.cross_entropy((query @ vectors.T).masked_fill(left_out, -math.inf), target, reduction="none")
    expected = (weight * by_query).sum()
    hidden = Hidden(*torch.nonzero(left_out).T)
    with pytest.MonkeyPatch.context() as patch:
        in_parts(patch, tiled)
        candidates = CandidateVectors(vectors, torch.zeros(items, dtype=torch.double))
        found = sampled_softmax(query, candidates, target, torch.tensor(1.0, dtype=torch.double), hidden, weight)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=20)
@given(st.integers(1, 12), st.lists(st.integers(0, 2), min_size=2, max_size=20), st.integers(0, 10_000), st.booleans())
def test_softmax_by_domain_is_cross_entropy_among_the_targets_own(
    queries: int, domains: list[int], seed: int, tiled: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    query, vectors = (torch.randn(n, 5, generator=g, dtype=torch.double) for n in (queries, len(domains)))
    target, domain = torch.randint(0, len(domains), (queries,), generator=g), torch.tensor(domains)
    leaves = [x.requires_grad_() for x in (query, vectors)]
    foreign = domain[target][:, None] != domain
    expected = F.cross_entropy((query @ vectors.T).masked_fill(foreign, -math.inf), target, reduction="sum")
    with pytest.MonkeyPatch.context() as patch:
        in_parts(patch, tiled)
        candidates = CandidateVectors(vectors, torch.zeros(len(domains), dtype=torch.double), domain)
        found = sampled_softmax(query, candidates, target, torch.tensor(1.0, dtype=torch.double))
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("native", [True, False])
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=5), st.booleans(), st.booleans(), st.data())
def test_hidden_are_the_items_of_the_same_sequence_but_never_the_target(
    native: bool, columns: list[list[int]], whole: bool, some: bool, data: st.DataObject
) -> None:
    lengths = torch.tensor([len(c) for c in columns], dtype=torch.int64)
    flat = [c for sequence in columns for c in sequence]
    had = data.draw(st.lists(st.booleans(), min_size=len(flat), max_size=len(flat))) if some else [True] * len(flat)
    given_had = torch.tensor(had, dtype=torch.bool) if some else None
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(token_passes, "_library", lambda: "none")
        hidden = hidden_of(lengths, torch.tensor(flat, dtype=torch.int64), whole, given_had)
    found = [set[int]() for _ in flat]
    for row, column in zip(hidden.rows.tolist(), hidden.columns.tolist(), strict=True):
        found[row].add(column)
    marked = iter(zip(flat, had, strict=True))
    sequences = [[next(marked) for _ in sequence] for sequence in columns]
    expected = [
        {item for item, counts in (sequence if whole else sequence[:position]) if counts} - {target}
        for sequence in sequences
        for position, (target, _) in enumerate(sequence)
    ]
    assert found == expected and hidden.rows.tolist() == sorted(hidden.rows.tolist())


def test_the_corrected_partition_function_is_unbiased() -> None:
    """Mean over many draws of sum exp(s) / pi, candidates drawn as the loader does, is the full sum."""
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.ones(30))
    drawn, in_batch = 12, 5
    negatives = Negatives((popularity * 10_000).astype(int) + 1, drawn, 0.5)
    counts = (popularity * 10_000).astype(int) + 1
    scores = torch.from_numpy(rng.normal(size=30))
    log_pi = inclusion_log_probability(torch.from_numpy(negatives.log_not_sampled), in_batch, drawn).double()
    estimates = []
    for _ in range(4000):
        targets = rng.choice(30, size=in_batch, p=counts / counts.sum())
        found = np.unique(np.concatenate([targets, negatives.draw(rng, 0, 1).items]))
        estimates.append(float((scores[found] - log_pi[found]).exp().sum()))
    assert np.mean(estimates) == pytest.approx(float(scores.exp().sum()), rel=0.03)


def test_targets_are_found_among_the_candidates_of_all_ranks() -> None:
    candidates, real = torch.tensor([4, 9, 0, 2, 9, 4]), torch.tensor([True, True, False, True, True, True])
    place, repeated = columns_of(candidates, real, torch.tensor([9, 2, 4]))
    assert place.tolist() == [1, 3, 0]
    assert repeated.tolist() == [False, False, False, False, True, True]
    place, repeated = columns_of(candidates[:0], real[:0], torch.tensor([9]))  # a rank alone with nothing to learn
    assert len(place) == 1 and not len(repeated)


def loader(data: PreparedData, rank: int = 0, world_size: int = 1) -> TrainLoader:
    splits = split(data, "leave-one-out", 0.1)
    fit = splits.train_mask(data)
    negatives = Negatives(np.bincount(data.item[fit], minlength=data.schema.items), 20, 0.5)
    spans = windows(data, splits, 5)
    return TrainLoader(spans, Assembler(data, fit), negatives, Sharing(64, 3, rank, world_size))


def targets(batch) -> list[int]:  # type: ignore[no-untyped-def]
    return batch.item_ids.values()[batch.targets].tolist()


def test_ranks_share_each_global_batch_with_nothing_lost_or_repeated(small: PreparedData) -> None:
    whole, parts = loader(small), [loader(small, r, 3) for r in range(3)]
    for one, *shares in zip(whole.epoch(1), *(p.epoch(1) for p in parts), strict=True):
        assert sorted(targets(one)) == sorted(t for s in shares for t in targets(s))
        assert len({len(s.lengths) for s in shares}) == 1
        together = {i for s in shares for i in s.item_ids.values()[s.candidates].tolist()}
        assert set(one.item_ids.values()[one.candidates].tolist()) == together


def test_a_token_holds_the_item_before_its_target(small: PreparedData) -> None:
    batch = next(iter(loader(small).epoch(0)))
    ids = batch.item_ids.values()
    ends = torch.cumsum(batch.lengths, 0).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        assert batch.tokens[start] == len(ids)
        assert batch.tokens[start + 1 : end].tolist() == batch.targets[start : end - 1].tolist()


def test_epochs_differ_and_repeat_with_the_seed(small: PreparedData) -> None:
    first, again, second = (targets(next(iter(loader(small).epoch(e)))) for e in (0, 0, 1))
    assert first == again != second


def test_features_follow_their_items(small: PreparedData) -> None:
    batch = next(iter(loader(small).epoch(0)))
    genre = batch.item_features["genre"]
    for row in (0, 5, len(batch.item_known) - 1):
        item = int(batch.item_ids.values()[row])
        found = genre.values()[genre.offsets()[row] : genre.offsets()[row + 1]].tolist()
        assert found == small.items.sparse["genre"].row(item).tolist()
        np.testing.assert_array_equal(batch.item_dense[row].numpy(), small.items.dense[item])


def test_an_error_while_prefetching_reaches_the_caller() -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield 1
        raise DataError("bad shard")

    with pytest.raises(DataError, match="bad shard"):
        list(Prefetch(broken()))


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6), st.data())
def test_ragged_rows_are_taken_as_lists_would_be(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged(np.cumsum([0, *map(len, rows)]), np.array([x for r in rows for x in r], np.int64))
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    taken = ragged.take(np.array(wanted, np.int64))
    assert [taken.row(i).tolist() for i in range(len(taken))] == [rows[w] for w in wanted]
