"""The best model of a run on disk, readable at any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import RunError

META = "meta.json"
DENSE = "dense."


def save_checkpoint(folder: Path, model: nn.Module, meta: dict[str, Any], comm: Comm) -> None:
    """Write the model's shards and `meta`; collective. An older checkpoint stays until the new one is whole."""
    fresh = folder.with_name(folder.name + ".tmp")
    if comm.main:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    comm.barrier()
    dcp.save({"model": model.state_dict()}, checkpoint_id=fresh)
    if comm.main:
        (fresh / META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    comm.barrier()


def load_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Fill the model from a checkpoint and return its `meta`; collective.

    Raises:
        RunError: there is none, or it does not fit the model.
    """
    meta = read_meta(folder)
    state = {"model": model.state_dict()}
    try:
        dcp.load(state, checkpoint_id=folder)
    except (dcp.api.CheckpointException, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{folder}: the checkpoint does not load ({reason}); train again") from error
    model.load_state_dict(state["model"])
    return meta


def load_matching(folder: Path, model: nn.Module, tables: bool) -> str:
    """Fill what the model shares with a checkpoint, by name and shape, and say what that was; collective.

    Args:
        tables: also the embedding tables; False where ids mean something else.

    Raises:
        RunError: the checkpoint does not load, or shares nothing.
    """
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = model.state_dict()
    shared = {
        name: tensor
        for name, tensor in state.items()
        if isinstance(found := stored.get(f"model.{name}"), TensorStorageMetadata)
        and found.size == tensor.size()
        and (tables or name.startswith(DENSE))
    }
    if not shared:
        raise RunError(f"{folder}: nothing in it fits this model; fine-tune with the model settings of the source")
    dcp.load({"model": shared}, checkpoint_id=folder)
    model.load_state_dict({**state, **shared})
    fresh = sorted(state.keys() - shared.keys())
    return f"{len(shared)} of {len(state)} tensors from {folder}; new: {', '.join(fresh) or 'none'}"


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta` of a checkpoint, without its weights.

    Raises:
        RunError: there is no whole checkpoint.
    """
    file = folder / META
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: not readable ({error}); is this a run folder whose training ended?") from error
