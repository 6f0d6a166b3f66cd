"""Targets that count more for the heads that are sure of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flm_torchrec.config.heads import HEADS
from flm_torchrec.model import softmax
from flm_torchrec.model.responsibility import weights_by_head
from flm_torchrec.model.softmax import CandidateVectors, Hidden, log_probability, sampled_softmax


@settings(max_examples=30)
@given(st.integers(0, 20), st.integers(2, 30), st.integers(0, 10_000), st.integers(40, 10_000))
def test_the_log_probability_of_a_target_is_that_of_cross_entropy(
    queries: int, items: int, seed: int, chunk_bytes: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    query, vectors = (torch.randn(n, 5, generator=g, dtype=torch.double) for n in (queries, items))
    log_q, scale = -torch.rand(items, generator=g, dtype=torch.double), torch.tensor(0.7, dtype=torch.double)
    target, domain = torch.randint(0, items, (queries,), generator=g), torch.randint(0, 2, (items,), generator=g)
    left_out = (torch.rand(queries, items, generator=g) < 0.4).scatter(1, target[:, None], False)
    lowered = scale * query @ vectors.T - log_q + F.one_hot(target, items) * log_q
    away = left_out | (domain[target][:, None] != domain)
    expected = -F.cross_entropy(lowered.masked_fill(away, -math.inf), target, reduction="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "CHUNK_BYTES", {"cpu": chunk_bytes})
        candidates = CandidateVectors(vectors, log_q, domain)
        found = log_probability(query, candidates, target, scale, Hidden(*torch.nonzero(left_out).T))
    torch.testing.assert_close(found, expected)


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(2, 30), st.integers(1, 3), st.integers(0, 10_000))
def test_the_gradients_are_those_of_a_mixture_of_softmaxes(queries: int, items: int, heads: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(items, 5, generator=g, dtype=torch.double, requires_grad=True)
    asked = {
        name: torch.randn(queries, 5, generator=g, dtype=torch.double, requires_grad=True) for name in HEADS[:heads]
    }
    target = torch.randint(0, items, (queries,), generator=g)
    leaves = [vectors, *asked.values()]
    by_head = torch.stack([-F.cross_entropy(q @ vectors.T, target, reduction="none") for q in asked.values()])
    mixed = -heads * torch.logsumexp(by_head, 0).sum()
    candidates = CandidateVectors(vectors, torch.zeros(items, dtype=torch.double))
    one = torch.ones((), dtype=torch.double)
    sure = {name: log_probability(q, candidates, target, one) for name, q in asked.items()}
    weights = weights_by_head(sure, 1.0)
    losses = [sampled_softmax(q, candidates, target, one, None, weights[name]) for name, q in asked.items()]
    total = torch.stack(losses).sum()
    for a, b in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(mixed, leaves), strict=True):
        torch.testing.assert_close(a, b)


@given(st.floats(0, 1), st.lists(st.tuples(*[st.floats(-1e4, 0)] * 3), min_size=1, max_size=9))
def test_weights_are_1_on_average_and_greater_for_a_head_that_is_surer(
    mixture: float, of_targets: list[tuple[float, float, float]]
) -> None:
    sure = torch.tensor(of_targets, dtype=torch.double).T
    weights = torch.stack(list(weights_by_head(dict(zip(HEADS, sure, strict=True)), mixture).values()))
    torch.testing.assert_close(weights.mean(0), torch.ones_like(weights[0]))
    assert (weights >= 1 - mixture).all()
    torch.testing.assert_close(weights.gather(0, sure.argmax(0)[None])[0], weights.amax(0))
