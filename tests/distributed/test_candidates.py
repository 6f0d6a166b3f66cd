"""Whose targets a loss runs over: real ranks against one process, and what does not grow with the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.candidates import CandidateRanks
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import ConfigError
from flm_torchrec.training.job import open_job
from flm_torchrec.training.loaders import make_loader
from flm_torchrec.training.run_events import events_of
from tests.conftest import ROOT
from tests.steps import losses_of_steps

JOB = str(ROOT / "tests" / "distributed" / "candidates_job.py")
SMALL = ["model.dim=16", "train.batch_size=32", "data.max_history=6", "loss.negatives=21"]


def test_losses_and_gradients_are_those_of_one_process(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """At 2 and 4 ranks, and on two nodes of two; of local, only the number of targets of each rank grows."""
    counted = {}
    for count, node in ((2, 1), (4, 2)):
        output = tmp_path / f"{count}.json"
        ranks(count, [JOB, str(node), str(output)])
        counted[count] = json.loads(output.read_text())
    for name, calls in (("global 21", 3), ("node 21", 3), ("local 21", 2), ("local 24", 2)):
        assert counted[2][name]["calls"] == counted[4][name]["calls"] == calls
    told = 8  # bytes of a rank's number of targets
    assert counted[4]["local 24"]["bytes"] - 4 * told == counted[2]["local 24"]["bytes"] - 2 * told
    assert counted[4]["global 21"]["bytes"] > 1.5 * counted[2]["global 21"]["bytes"]


def test_on_one_rank_all_settings_are_one(small: PreparedData) -> None:
    found = []
    for kind in ("global", "node", "local"):
        with open_job(load_config(None, [*SMALL, f"loss.candidates={kind}", "distributed.threads=1"]), small) as job:
            found.append(losses_of_steps(job, 2, seed=3))
    assert found[0] == found[1] == found[2] and len(found[0]) == 2 * 6


@pytest.mark.parametrize(("kind", "dealers"), [("global", 4), ("node", 2), ("local", 4)])
def test_negatives_are_dealt_to_the_ranks_that_share_them(small: PreparedData, kind: str, dealers: int) -> None:
    config = load_config(None, [*SMALL, f"loss.candidates={kind}"])
    batches = []
    for rank in range(4):
        comm = Comm(rank, 4, 2, torch.device("cpu"))
        batches.append(next(iter(make_loader(small, events_of(config, small), config, comm).epoch(0))))
    whole = next(iter(make_loader(small, events_of(config, small), config, Comm(0, 1, 1, comm.device)).epoch(0)))
    assert sum(len(b.targets) for b in batches) == len(whole.targets)
    own = [set(b.items[b.targets].tolist()) for b in batches]
    for start in range(0, 4, dealers):
        together = {item for b in batches[start : start + dealers] for item in b.items[b.candidates].tolist()}
        drawn = set(whole.items[whole.candidates].tolist()) - set(whole.items[whole.targets].tolist())
        assert together >= drawn
    if kind == "local":
        for rank, batch in enumerate(batches):
            dealt = 21 // 4 + (rank < 21 % 4)
            assert len(batch.candidates) == len(own[rank]) + dealt
            assert set(batch.items[batch.candidates[: len(own[rank])]].tolist()) == own[rank]
            np.testing.assert_array_equal(len(batch.log_not_sampled), len(batch.candidates))


@pytest.mark.parametrize(("world", "local"), [(5, 2), (3, 2)])
def test_nodes_must_have_equally_many_ranks(world: int, local: int) -> None:
    class Alike(Comm):
        def gather(self, value):  # type: ignore[no-untyped-def]
            return [value] * self.world_size

    with pytest.raises(ConfigError, match=r"loss\.candidates: 'node' needs nodes of equally many ranks"):
        CandidateRanks(Alike(0, world, local, torch.device("cpu")), "node").check()
    CandidateRanks(Alike(0, 4, 2, torch.device("cpu")), "node").check()
    CandidateRanks(Alike(0, world, local, torch.device("cpu")), "local").check()
