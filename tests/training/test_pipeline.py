"""The pipelined step that GPUs take gives the numbers of the plain step; TorchRec runs it on a CPU too."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.training.build import set_precision
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import open_job
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS


def losses(data: PreparedData, kind: str, folder: Path) -> list[float]:
    """Of eight steps, between which the model encodes users, as validation does."""
    fixed = [
        "model.dropout=0",
        "model.embedding_dropout=0",
        "model.id_dropout=0",
        "model.user_id_dropout=0",
        "model.dim=16",
        "train.batch_size=32",
    ]
    config = load_config(None, fixed)
    with open_job(config, data) as job:
        job.model.train()
        encode = job.encoder(job.events.splits.valid)
        steps = STEPS[kind](
            job.model, job.optimizer, Schedule(job.optimizer, 2, 8), job.comm.device, Guard(job.comm, "stop", folder)
        )
        batches = islice(job.loader.after(0), 8)
        found = []
        for step in range(8):
            outputs = steps.take(batches, step)
            assert outputs is not None
            found.append(float(torch.stack(list(outputs.losses.values())).sum()))
            if step % 3 == 0:
                steps.release()
                found.append(float(encode.users(np.arange(5))["fused"].sum()))
        return found


def test_pipelined_steps_are_plain_steps(small: PreparedData, tmp_path: Path) -> None:
    plain, pipelined = losses(small, "cpu", tmp_path), losses(small, "cuda", tmp_path)
    assert len(plain) == 8 + 3 and plain[-1] < plain[0]
    assert pipelined == pytest.approx(plain, rel=1e-5)


def test_without_item_features_the_model_still_trains(small: PreparedData, tmp_path: Path) -> None:
    bare = dataclasses.replace(small, schema=dataclasses.replace(small.schema, features=()))
    bare = dataclasses.replace(
        bare,
        items=dataclasses.replace(small.items, sparse={}, dense=small.items.dense[:, :0]),
        users=dataclasses.replace(small.users, sparse={}, dense=small.users.dense[:, :0]),
    )
    assert len(losses(bare, "cuda", tmp_path)) == len(losses(bare, "cpu", tmp_path)) == 8 + 3


def test_users_without_events_before_are_represented_alone_too(small: PreparedData) -> None:
    with open_job(load_config(None, ["model.dim=16"]), small) as job:
        users = np.array([0, 3])
        firsts = job.encoder(Examples(users, small.offsets[users]))
        mixed = job.encoder(Examples(np.array([0, 3, 4]), small.offsets[[0, 3, 5]]))
        alone, among = firsts.users(np.arange(2)), mixed.users(np.arange(3))
    for name in alone:
        torch.testing.assert_close(alone[name], among[name][:2])


def test_tf32_products_are_for_gpus_alone() -> None:
    config = load_config(None, ["loss.precision=tf32"])
    set_precision(config, torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        set_precision(config, torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        set_precision(load_config(None, []), torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "highest"
