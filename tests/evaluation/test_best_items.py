"""What native code finds in scores, beside the same by PyTorch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flm_torchrec.evaluation import best_items as module
from flm_torchrec.evaluation.best_items import best_items

native = pytest.mark.skipif(isinstance(module._library(), str), reason="no native code here")


@native
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 400), st.integers(0, 60), st.integers(1, 3), st.integers(1, 1000))
@example(3, 1, 1, 2, 1)
@example(5, 300, 60, 2, 2)
def test_native_code_counts_and_finds_as_pytorch_does(users: int, items: int, k: int, threads: int, kinds: int) -> None:
    """Scores are few whole numbers, so that many are equal, and -inf; of equal ones the first are kept."""
    g = torch.Generator().manual_seed(users * items)
    scores = torch.randint(0, kinds, (users, items + 2), generator=g).float()[:, :items]
    scores[scores == 0] = -torch.inf
    truth = torch.randint(0, kinds, (users,), generator=g).float()
    k, before = min(k, items), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        above, best, places = best_items(scores, truth, k)
    finally:
        torch.set_num_threads(before)
    with mock.patch.object(module, "_library", lambda: "none"):
        counted, values, _ = best_items(scores, truth, k)
    assert torch.equal(above, counted) and torch.equal(best, values)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(places, order) and torch.equal(scores.gather(1, places), best)


@native
def test_a_score_that_is_not_a_number_is_not_among_the_best() -> None:
    scores = torch.tensor([[torch.nan, 1.0, torch.nan, 2.0]])
    above, best, places = best_items(scores, torch.tensor([1.0]), 2)
    assert above.tolist() == [2] and best.tolist() == [[2.0, 1.0]] and places.tolist() == [[3, 1]]
