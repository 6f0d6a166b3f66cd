"""True items that the user had before: which they are, and how an evaluation tells them."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.config.schema import EvalConfig
from flm_torchrec.data.splits import split
from flm_torchrec.evaluation import known_items
from flm_torchrec.evaluation.evaluate import Evaluation, EvaluationTask, evaluate
from flm_torchrec.evaluation.known_items import had_before
from tests.evaluation.test_ranking import HISTORIES, Alone, RandomEncoder, make_data


@settings(max_examples=30)
@given(HISTORIES, st.booleans(), st.integers(1, 4))
def test_an_item_was_had_before_where_a_known_event_that_counts_has_it(
    histories: list[list[int]], of_kinds: bool, block: int
) -> None:
    data = make_data(histories, 12)
    kinds = np.arange(len(data.item)) % 2
    if of_kinds:
        data = dataclasses.replace(data, event=kinds.astype(np.int32), targets=np.array([False, True]))
    test = split(make_data(histories, 12), "leave-one-out", 0.1).test
    expected = []
    for history, end in zip(histories, test.end.tolist(), strict=True):
        known = range(end - len(history) + 1, end)
        expected.append(any(data.item[e] == history[-1] and (kinds[e] or not of_kinds) for e in known))
    with patch.object(known_items, "EXAMPLES", block):
        assert had_before(data, test).tolist() == expected


def evaluated(histories: list[list[int]], *by: str) -> Evaluation:
    data = make_data(histories, 12)
    parts = split(data, "leave-one-out", 0.1)
    task = EvaluationTask(data, parts.test, "test", parts.train_mask(data), by=by)
    return evaluate(task, RandomEncoder(len(histories), 12), Alone(), EvalConfig(ks=(5,), baselines=("popularity",)))


def test_many_items_had_before_are_told_with_a_table_of_their_own() -> None:
    few, many = [[0, 1, 2, 3]] * 4 + [[0, 1, 2, 0]], [[0, 1, 2, 3]] * 3 + [[0, 1, 2, 0]]
    assert evaluated(few).segments == {} and evaluated(few).notes == []
    assert set(evaluated(few, "repeats").segments) == {"had before", "new to the user"}
    found = evaluated(many)
    assert set(found.segments) == set(evaluated(many, "repeats").segments) == {"had before", "new to the user"}
    (note,) = found.notes
    assert note.startswith("25% of the true items are ones that the user had before")
    assert found.segments["had before"]["popularity"]["hr@5"] == 1.0  # item 0 is among the most popular
