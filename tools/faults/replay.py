"""Put a batch whose loss was not a number through the model again, and say where the first such number appears.

    python tools/faults/replay.py RUN/non-finite/step-000000123-rank-0.npz

A run under `train.non_finite: stop` leaves the state before that step beside the batch, and this state is used. Without
it, the newest state to resume from is used instead. One rank; dropout is off, so that it does not hide the cause.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from flm_torchrec.config import load_config
from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.training.checkpoint.manager import Checkpoints
from flm_torchrec.training.guard import from_arrays
from flm_torchrec.training.job import open_job


def replay(file: Path) -> list[str]:
    """Lines that say which weights, inputs, modules and losses hold values that are not numbers, in that order.

    Raises:
        RunError: the file is no batch, or lies in no run folder.
    """
    file = file.resolve()
    named = re.fullmatch(r"step-(\d{9})-rank-\d+\.npz", file.name)
    run = file.parents[1]
    if not named or not (run / "config.yaml").is_file():
        raise RunError(f"{file}: not RUN/non-finite/step-NNNNNNNNN-rank-N.npz of a run")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            batch = from_arrays(arrays)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{file}: not a batch ({error})") from error
    # Dropout would hide the cause, or be it.
    config = load_config(
        run / "config.yaml",
        ["model.dropout=0", "model.embedding_dropout=0", "model.id_dropout=0", "model.user_id_dropout=0"],
    )
    config = replace(config, distributed=replace(config.distributed, device="cpu"))
    with open_job(config) as job:
        checkpoints = Checkpoints(run, job.model, job.optimizer, job.comm, job.data.fingerprint)
        beside = file.parent / f"step-{int(named[1]) - 1:09d}"
        progress = checkpoints.load(beside) if beside.is_dir() else None
        if progress is None:
            restored = checkpoints.restore()
            if restored is None:
                raise RunError(f"{run}: no state to put the batch through")
            progress = restored[0]
        lines = [f"state after step {progress.step}, batch of step {int(named[1])}"]
        lines += [f"weight {name}" for name, value in job.model.state_dict().items() if _broken(value)]
        lines += [f"input {name}" for name in ("value", "user_dense", "item_dense") if _broken(getattr(batch, name))]
        hooks = [
            m.register_forward_hook(_note_broken(n, lines)) for n, m in job.model.module.dense.named_modules() if n
        ]
        job.model.train()
        with torch.no_grad():
            _, outputs = job.model(batch)
        for hook in hooks:
            hook.remove()
        lines += [f"loss {name} = {float(value)}" for name, value in outputs.losses.items()]
    return lines


def _note_broken(name: str, lines: list[str]):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor) and _broken(output):
            lines.append(f"output of {name}")

    return hook


def _broken(value: Tensor | ShardedTensor) -> bool:
    parts = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
    return any(part.is_floating_point() and not bool(part.isfinite().all()) for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the lines of `replay`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", type=Path, help="RUN/non-finite/step-NNNNNNNNN-rank-N.npz")
    args = parser.parse_args(argv)
    try:
        print("\n".join(replay(args.batch)))
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
