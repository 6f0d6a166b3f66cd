"""Exports that can be served, of models with the weights they begin with: nothing here depends on learning."""

from __future__ import annotations

from pathlib import Path

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import everyone
from flm_torchrec.export.manifest import IndexKind
from flm_torchrec.export.tower.writer import write_tower
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from flm_torchrec.serve.access import read_keys
from flm_torchrec.training.gathered import GatheredModel
from flm_torchrec.training.job import open_job

ADMIN_KEY = "the-key-of-the-tests"
KEYS = read_keys(f"admin {ADMIN_KEY} tests", "tests")
AS_ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


def write_export(data: PreparedData, folder: Path, seed: int = 1, index: IndexKind = "flat") -> None:
    """An export with an int8 tower; its model's version is the folder's name."""
    settings = ["model.dim=16", "data.max_history=7", "distributed.device=cpu", f"train.seed={seed}"]
    config = load_config(None, settings)
    with open_job(config, data) as job:
        encoder, model = job.encoder(everyone(data)), GatheredModel(job)
        source = ExportSource(
            data,
            encoder,
            encoder.assembler.stats.items > 0,
            folder.name,
            beside=lambda fresh: write_tower(data, model, True, "int8", fresh),
        )
        export(source, job.comm, folder, ExportOptions(index=index))
