"""Admission by count and expiry by time: right for what counts, in fixed memory over ten million ids."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec.data.admission import DEPTH, NEVER, Admission, LastSeen
from flm_torchrec.data.hashing import mix


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 5), st.integers(1, 20))
def test_an_id_is_admitted_from_its_nth_sighting_on_however_the_sightings_are_cut(
    ids: list[int], after: int, piece: int
) -> None:
    admission, found = Admission(after, 2**12), []
    for start in range(0, len(ids), piece):
        found += admission.count(mix(np.array(ids[start : start + piece]))).tolist()
    seen: Counter[int] = Counter()
    for one, admitted in zip(ids, found, strict=True):
        seen[one] += 1
        assert admitted == (seen[one] >= after)


def test_counts_resume_from_their_state() -> None:
    first, second = Admission(3, 64), Admission(3, 64)
    hashes = mix(np.arange(5))
    assert not first.count(np.concatenate([hashes, hashes])).any()
    for name, values in first.state().items():
        second.state()[name][...] = values
    assert second.count(hashes).all()


def test_ten_million_ids_are_counted_in_fixed_memory() -> None:
    """Ids seen once, and among them a thousand that come again and again: these are admitted, those are not."""
    rng = np.random.default_rng(0)
    admission, wrong, admitted_again = Admission(3), 0, np.zeros(1000, bool)
    tracemalloc.start()
    for start in range(0, 10**7, 10**5):
        again = np.arange(1000)
        ids = np.concatenate([np.arange(start, start + 10**5) + 1000, again])
        order = rng.permutation(len(ids))
        admitted = np.zeros(len(ids), bool)
        admitted[order] = admission.count(mix(ids[order]))
        wrong += int(admitted[: 10**5].sum())
        admitted_again |= admitted[10**5 :]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert admission.counts.nbytes == DEPTH * 2**20
    assert peak < 40 * 2**20  # the sketch, and the arrays of one piece
    assert admitted_again.all() and wrong < 10**7 * 1e-4


def test_expiry_takes_eight_bytes_an_id_over_ten_million_ids() -> None:
    ids, day = 10**7, 86400
    tracemalloc.start()
    seen = LastSeen(ids)
    for start in range(0, ids, 10**6):
        seen.see(np.arange(start, start + 10**6), np.full(10**6, start // 10**6 * day))
    seen.see(np.array([5, 5, 5]), np.array([2 * day, 9 * day, day]))
    peak = tracemalloc.get_traced_memory()[1]
    expired = seen.expired(9 * day, 3 * day)
    tracemalloc.stop()
    assert peak < 8 * ids + 40 * 2**20
    assert expired.sum() == 6 * 10**6 - 1 and not expired[5] and expired[6] and not expired[6 * 10**6]


def test_an_id_that_was_never_seen_does_not_expire() -> None:
    seen = LastSeen(2)
    seen.see(np.array([0]), np.array([7]))
    seen.extend(4)
    assert seen.time.tolist() == [7, NEVER, NEVER, NEVER]
    assert seen.expired(10**9, 1).tolist() == [True, False, False, False]
