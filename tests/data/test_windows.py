"""Each training event is the target of one window, wherever its user's events are cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec.data.windows import Windows, cut


def spans(windows: Windows) -> list[tuple[int, int, int]]:
    return list(zip(windows.user.tolist(), windows.start.tolist(), windows.end.tolist(), strict=True))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 2**62 - 1))
def test_each_event_is_the_target_of_one_window(events: list[int], history: int, seed: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(events)])
    fixed = cut(np.arange(len(events)), offsets[:-1], offsets[1:], history)
    for windows in (fixed, fixed.moved(seed, 0), fixed.moved(seed, 1)):
        assert windows.user.tolist() == fixed.user.tolist()
        assert sorted(e for _, start, end in spans(windows) for e in range(start, end)) == list(range(sum(events)))
        for user, start, end in spans(windows):
            assert offsets[user] <= start < end <= offsets[user + 1] and end - start <= history + 1


def test_a_user_is_cut_elsewhere_in_each_epoch_and_alike_among_any_others() -> None:
    start = np.array([0, 25, 50])
    all_users = cut(np.arange(3), start, start + 25, 9)  # 5 of the oldest window, so its cut has 6 places
    one = cut(np.array([1]), start[1:2], start[1:2] + 25, 9)
    assert [span for span in spans(all_users.moved(7, 2)) if span[0] == 1] == spans(one.moved(7, 2))
    cuts = [all_users.moved(seed, epoch).start[0] for seed in range(10) for epoch in range(10)]
    assert set(cuts) == set(range(15, 21))


def test_a_user_whose_events_fit_into_one_window_keeps_it() -> None:
    short = cut(np.arange(2), np.array([0, 10]), np.array([10, 14]), 9)
    assert spans(short.moved(0, 5)) == spans(short) == [(0, 0, 10), (1, 10, 14)]
