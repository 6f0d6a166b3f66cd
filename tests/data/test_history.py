"""The coding of history events: right values, and the same in batches as for one history alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.history import GAP_ROWS, NO_EVENTS, Events, HistoryCoding, previous_times, table_rows


def events_at(*times: int) -> Events:
    """Events of item 0, 1 … at these times, of kind 0, 1, 0, 1 …, of value 0, 1 …"""
    n = np.arange(len(times))
    return Events(n, np.array(times, np.int64), n % 2, n.astype(np.float32))


def test_a_history_is_coded_by_hand() -> None:
    history = events_at(100, 100, 101, 104, 104 + 2**20, 2**40)
    shown = history.take(slice(1, None))
    coded = HistoryCoding(2.0, 0.5, timestamps=True).code(shown, previous_times(history.timestamp)[1:], np.array([100]))
    assert coded.event.tolist() == [2, 1, 2, 1, 2]
    assert coded.gap.tolist() == [1, 2, 3, 21, 31]  # the longest gaps share a row
    assert coded.value.tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5] and coded.value.dtype == np.float32
    assert coded.time.tolist() == [0, 1, 4, 4 + 2**20, 2**40 - 100]


def test_without_times_an_event_has_no_gap() -> None:
    coded = HistoryCoding(0.0, 0.0, timestamps=False).code(events_at(3, 9), np.array([3, 3]), np.array([3]))
    assert coded.gap.tolist() == coded.time.tolist() == [0, 0]
    assert coded.event.tolist() == [1, 2] and coded.value.tolist() == [0.0, 0.0]


@given(st.lists(st.integers(-(2**40), 2**40), max_size=20), st.integers(3, 60))
def test_codes_are_rows_of_their_tables(seconds: list[int], gap_rows: int) -> None:
    rows = HistoryCoding(0.0, 1.0, True, gap_rows).gap_of(np.array(seconds, np.int64))
    assert ((rows >= 1) & (rows < gap_rows)).all()
    assert table_rows(7) == {"event": 8, "gap": GAP_ROWS}


@pytest.mark.parametrize("timestamps", [True, False])
@settings(max_examples=30)
@given(spans=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=6))
def test_a_batch_codes_each_history_as_if_it_were_alone(
    small: PreparedData, timestamps: bool, spans: list[tuple[int, int, int]]
) -> None:
    """Spans: a user, how many of the user's events have happened, how many of these the model may see."""
    data = replace(small, schema=replace(small.schema, timestamps=timestamps))
    user = np.array([u for u, _, _ in spans])
    end = np.minimum(data.offsets[user] + [happened for _, happened, _ in spans], data.offsets[user + 1] - 1)
    start = np.maximum(data.offsets[user], end - [most for _, _, most in spans])
    assembler = Assembler(data, np.ones(len(data.item), bool))
    batch = assembler.encoding(user, start, end)
    sequences = np.split(np.arange(len(batch.time)), np.cumsum(batch.lengths)[:-1])
    for one, own in enumerate(sequences):
        history = data.events.take(slice(data.offsets[user[one]], end[one]))
        shown = history.take(slice(len(history) - (end[one] - start[one]), None))
        previous = previous_times(history.timestamp)[len(history) - len(shown) :]
        alone = assembler.coding.code(shown, previous, shown.timestamp[:1])
        tokens = {
            "event": batch.history["event"].values()[own],
            "gap": batch.history["gap"].values()[own],
            "value": batch.value[own],
            "time": batch.time[own],
        }
        for name, values in tokens.items():
            assert values[0] == 0  # the prefix
            np.testing.assert_array_equal(values[1:], getattr(alone, name), name)


def test_columns_stay_together() -> None:
    @dataclass(frozen=True)
    class Owned(Events):
        user: np.ndarray

    owned = Owned(**vars(events_at(5, 7, 9)), user=np.array([1, 2, 3]))
    assert len(owned) == 3 and owned.take(np.array([2, 0])).user.tolist() == [3, 1]
    both = owned + owned.take(slice(1))
    assert both.user.tolist() == [1, 2, 3, 1] and both.timestamp.tolist() == [5, 7, 9, 5]
    plain = NO_EVENTS + owned  # the columns of the first
    assert vars(plain).keys() == vars(NO_EVENTS).keys() and plain.item.tolist() == [0, 1, 2]
