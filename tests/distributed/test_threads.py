"""Threads of a rank: those of the config, of OMP_NUM_THREADS, or this rank's share of the processors."""

from __future__ import annotations

import os

import pytest
import torch

from flm_torchrec.config.schema import DistributedConfig
from flm_torchrec.distributed.comm import _asked_threads, process_group


@pytest.mark.parametrize(("threads", "variable", "wanted"), [(0, "3", 3), (2, "3", 2), (0, "1", 1), (0, None, None)])
def test_a_process_alone_has_the_threads_that_are_asked_for(
    threads: int, variable: str | None, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    try:
        with process_group(DistributedConfig(device="cpu", threads=threads)):
            assert torch.get_num_threads() == (wanted or len(os.sched_getaffinity(0)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variable", "ranks", "wanted"), [("1", 2, 0), ("4", 2, 4), ("1", 1, 1), ("6,2", 1, 6), ("", 1, 0), ("all", 1, 0)]
)
def test_one_thread_of_several_ranks_is_the_default_of_torchrun(
    variable: str, ranks: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert _asked_threads(ranks) == wanted
