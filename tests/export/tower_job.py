"""Run on ranks: package the tower of a sharded model, and print how far it is from the model's own vectors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from flm_torchrec.config import load_config
from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.splits import everyone
from flm_torchrec.export.tower.reader import PackagedTower, TowerQuery
from flm_torchrec.export.tower.writer import write_tower
from flm_torchrec.training.gathered import GatheredModel
from flm_torchrec.training.job import open_job

folder, target, *overrides = sys.argv[1:]
fixed = ["model.dim=16", "model.layers=1", "data.max_history=7", "distributed.device=cpu"]
config = load_config(None, [*fixed, *overrides])
data = load_prepared(folder)
with open_job(config, data) as job:
    users = np.arange(40)
    found = job.encoder(everyone(data)).users(users)
    model = GatheredModel(job)
    write_tower(data, model, job.comm.rank == 0, "fp32", Path(target))
    if job.comm.rank == 0:
        tower = PackagedTower(Path(target))
        queries = [TowerQuery(tower.known_history(int(user)), int(user)) for user in users]
        made = tower.represent(queries, np.zeros((0, 16), np.float32))
        own = torch.stack([found[head] for head in REPRESENTATIONS], 1).numpy()
        print("moved", np.abs(np.stack([m.heads for m in made]) - own).max())
    job.comm.all_reduce_sum(torch.zeros(1))  # none leaves while another is at work
