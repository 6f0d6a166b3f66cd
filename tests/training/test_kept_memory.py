"""Memory that a training keeps."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from flm_torchrec.training.kept_memory import keep_memory
from tests.processes import FORKS

MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


def flags_of(address: int) -> list[str]:
    """Of the mapping of this process that has the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping has {address}")


def flags_of_a_step() -> list[str]:
    """Of the middle of a tensor of 8 MiB, as a training allocates."""
    keep_memory()
    keep_memory()  # a follower has several trainings
    return flags_of(torch.ones(2**21).data_ptr() + 2**22)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="no glibc, or a system without large pages",
)
def test_the_tensors_of_a_step_are_in_large_pages() -> None:
    with FORKS.Pool(1) as pool:
        assert "hg" in pool.apply(flags_of_a_step)
