"""Rolling windows: what is predicted in each, from what, by plain loops."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples, split
from flm_torchrec.evaluation.rolling import RollingWindows

Found = set[tuple[int, int, int, str]]
"""User, event that is predicted, end of what is held out with it, window."""


def found_in(data: PreparedData, held_out: Examples, count: int) -> tuple[RollingWindows, Found]:
    windows = RollingWindows.of(data, held_out, count)
    examples = windows.examples(data, held_out)
    assert examples.until is not None and examples.label is not None
    columns = (examples.user, examples.end, examples.until, examples.label)
    found = set(zip(*(column.tolist() for column in columns), strict=True))
    assert len(found) == len(examples)
    return windows, found


def by_loops(data: PreparedData, held_out: Examples, windows: RollingWindows) -> Found:
    events: dict[tuple[int, int], list[int]] = defaultdict(list)
    for user in set(held_out.user.tolist()):
        begin = held_out.end[held_out.user == user].min()
        for row in range(begin, data.offsets[user + 1]):
            window = sum(data.timestamp[row] >= edge for edge in windows.edges[1:-1])
            events[user, int(window)].append(row)
    found = set()
    for (user, window), rows in events.items():
        met = set()
        for row in rows:
            domain = None if data.item_domain is None else data.item_domain[data.item[row]]
            predicted = data.targets is None or data.targets[data.event[row]]
            if predicted and domain not in met:
                met.add(domain)
                found.add((user, row, rows[-1] + 1, str(windows.names[window])))
    return found


@settings(max_examples=60)
@given(
    times=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8), min_size=1, max_size=6),
    count=st.integers(1, 12),
    chosen=st.booleans(),
    seed=st.integers(0, 9),
)
def test_windows_are_those_of_plain_loops(
    small: PreparedData, times: list[list[int]], count: int, chosen: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths = [len(one) for one in times]
    total = sum(lengths)
    data = replace(
        small,
        offsets=np.cumsum([0, *lengths]),
        timestamp=np.array([t for one in times for t in sorted(one)]),
        event=rng.integers(0, 2, total),
        item=np.zeros(total, np.int64),
        targets=np.array([True, False]) if chosen else None,
    )
    begins = data.offsets[:-1] + rng.integers(0, np.array(lengths))
    held_out = Examples(np.arange(len(times)), begins, until=data.offsets[1:])
    windows, found = found_in(data, held_out, count)
    assert found == by_loops(data, held_out, windows)
    assert sorted(windows.names) == list(windows.names)


def test_each_domain_is_predicted_in_each_window(joint: PreparedData) -> None:
    held_out = split(joint, "time", 0.3).test
    windows, found = found_in(joint, held_out, 3)
    assert found == by_loops(joint, held_out, windows) and len({name for *_, name in found}) == 3


def test_one_window_is_the_time_split_itself(small: PreparedData) -> None:
    held_out = split(small, "time", 0.2).test
    _, found = found_in(small, held_out, 1)
    assert held_out.until is not None
    assert {one[:3] for one in found} == set(
        zip(held_out.user.tolist(), held_out.end.tolist(), held_out.until.tolist(), strict=True)
    )


def test_windows_have_their_dates_or_numbers(small: PreparedData) -> None:
    day = 86_400
    assert RollingWindows(np.array([0.0, 10 * day, 20 * day])).names.tolist() == [
        "window 1: 1970-01-01 to 1970-01-11",
        "window 2: 1970-01-11 to 1970-01-21",
    ]
    assert RollingWindows(np.array([0.0, 1e18])).names.tolist() == ["window 1: 1970-01-01 to 1e+18"]
