"""The pipelined step that GPUs take gives the numbers of the plain step; TorchRec runs it on a CPU too."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import pytest
import torch

from flm_torchrec.config import load_config
from flm_torchrec.data.prepared import PreparedData
from flm_torchrec.distributed.comm import process_group
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import Job
from flm_torchrec.training.loop import pipelined_steps, plain_steps
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.scope import scope_of


def losses(data: PreparedData, pipelined: bool, folder: Path) -> list[float]:
    fixed = ["model.dropout=0", "model.id_dropout=0", "model.user_id_dropout=0", "model.dim=16", "train.batch_size=32"]
    config = load_config(None, fixed)
    with process_group(config.distributed) as comm:
        job = Job(config, data, scope_of(config, data), comm)
        job.model.train()
        schedule = Schedule(job.optimizer, 2, 8)
        batches = islice((batch for epoch in range(8) for batch in job.loader.epoch(epoch)), 8)
        steps = pipelined_steps if pipelined else plain_steps
        guard = Guard(comm, "stop", folder)
        found = list(steps(job.model, job.optimizer, schedule, batches, comm.device, guard))
        return [float(torch.stack(list(outputs.losses.values())).sum()) for outputs in found]


def test_pipelined_steps_are_plain_steps(small: PreparedData, tmp_path: Path) -> None:
    plain, pipelined = losses(small, False, tmp_path), losses(small, True, tmp_path)
    assert len(plain) == 8 and plain[-1] < plain[0]
    assert pipelined == pytest.approx(plain, rel=1e-5)


def test_without_item_features_the_model_still_trains(small: PreparedData, tmp_path: Path) -> None:
    bare = dataclasses.replace(small, schema=dataclasses.replace(small.schema, features=()))
    bare = dataclasses.replace(
        bare,
        items=dataclasses.replace(small.items, sparse={}, dense=small.items.dense[:, :0]),
        users=dataclasses.replace(small.users, sparse={}, dense=small.users.dense[:, :0]),
    )
    assert len(losses(bare, True, tmp_path)) == len(losses(bare, False, tmp_path)) == 8
