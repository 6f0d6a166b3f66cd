"""A finished run, brought back for evaluation and export at any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchrec.distributed.model_parallel import DistributedModelParallel

from flm_torchrec.config import Config, load_config
from flm_torchrec.data.prepared import PreparedData, load_prepared
from flm_torchrec.data.splits import Examples, Splits, split
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.errors import RunError
from flm_torchrec.training.checkpoint import load_checkpoint, read_meta
from flm_torchrec.training.encode import ModelEncoder
from flm_torchrec.training.job import BEST, build, encoder


@dataclass(frozen=True)
class Restored:
    """A run's best model with the data it was trained on."""

    config: Config
    data: PreparedData
    splits: Splits
    fit: np.ndarray  # [interactions] bool: the events it was trained on
    comm: Comm
    model: DistributedModelParallel
    version: str
    """Run name, step and a digest of its config: which model made an export."""

    def encoder_for(self, examples: Examples) -> ModelEncoder:
        return encoder(self.model, self.data, self.fit, examples, self.config, self.comm)


@contextmanager
def restore(run: str | Path, overrides: Sequence[str] = ()) -> Iterator[Restored]:
    """Load a run's best checkpoint onto the ranks of this job; collective.

    Args:
        run: run folder.
        overrides: of the run's config, such as `distributed.device=cpu`; none that changes what was trained.

    Raises:
        RunError: no run, no checkpoint, or data that changed since.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise RunError(f"{run}: no config.yaml, so no run folder; make one with 'flm train --train.run {run}'")
    read_meta(run / BEST)
    config = load_config(run / "config.yaml", overrides)
    data = load_prepared(config.data.path, config.data.features)
    splits = split(data, config.data.split, config.data.holdout)
    with process_group(config.distributed) as comm:
        model, _ = build(data.schema, config, comm)
        meta = load_checkpoint(run / BEST, model)
        digest = hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()[:8]
        yield Restored(
            config=config,
            data=data,
            splits=splits,
            fit=splits.fit(data),
            comm=comm,
            model=model,
            version=f"{run.name}-{meta['step']}-{digest}",
        )
