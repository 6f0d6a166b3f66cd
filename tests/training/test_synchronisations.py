"""How often a step of training would wait for a GPU: each read of a value, and each size that depends on values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.model import fused_softmax, token_passes
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import open_job

SIZED_BY_VALUES = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount"}
READ = {"_local_scalar_dense", "is_nonzero", "equal"}


class Waits(TorchDispatchMode):
    """Counts the operators for whose result or size the host waits on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.found[name] += name in SIZED_BY_VALUES | READ
        if name == "repeat_interleave":
            self.found[name] += (kwargs or {}).get("output_size") is None
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.found["mask"] += sum(x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def waits(data: PreparedData, folder: Path, patch: pytest.MonkeyPatch, negatives: str) -> Counter[str]:
    """Of one step after the look-ups: losses, guard and gradients."""
    settings = ["model.dim=16", "train.batch_size=32", f"loss.negatives={negatives}", "distributed.device=cpu"]
    settings += ["model.dropout=0", "model.embedding_dropout=0"]  # draws a seed on a CPU alone
    listed = Tensor.tolist
    for code in (fused_softmax, token_passes):
        patch.setattr(code, "_library", lambda: "none on a GPU")
    with open_job(load_config(None, settings), data) as job:
        job.model.train()
        dense, given = job.model.module.dense, []
        hook = dense.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
        batch = next(iter(job.loader.after(0)))
        job.model(batch)
        hook.remove()
        guard = Guard(job.comm, "stop", folder)
        with Waits() as counted:

            def tolist(of: Tensor) -> Any:
                counted.found["tolist"] += 1
                return listed(of)

            patch.setattr(Tensor, "tolist", tolist)
            loss, outputs = dense(*given[0])
            assert guard.passes(1, batch, loss, outputs)
            loss.backward()
            patch.undo()
    return +counted.found


@pytest.mark.parametrize("negatives", ["all", "20"])
def test_a_step_waits_nine_times(
    negatives: str, small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waits(small, tmp_path, monkeypatch, negatives) == {
        "repeat_interleave": 2,  # pairs of a target and an item that its user has had, before it and at all
        "nonzero": 3,  # those pairs but the target itself; items of the contrast
        "_unique2": 1,  # items of the contrast
        "tolist": 1,  # lengths of sequences, for their buckets
        "_local_scalar_dense": 2,  # whether the loss is a number, and the sequences that learn
    }
