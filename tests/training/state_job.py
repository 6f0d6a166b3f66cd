"""Run by test_checkpoint as one rank or several: for each case make or load a full state, and save it elsewhere.

Arguments: prepared data, folder to load from ("-": train some steps instead), folder to save to, and cases
NAME:SHARDING:OPTIMIZER:PRECISION. After each, a number of one rank's part of a table is spoilt, which all ranks must
refuse.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import islice
from pathlib import Path

from torch.distributed._shard.sharded_tensor import ShardedTensor

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.distributed.comm import process_group
from flm_torchrec.planner.plan_file import describe
from flm_torchrec.training.checkpoint.manager import Checkpoints, Progress
from flm_torchrec.training.job import Job, JobInputs

STEPS = 4


def main(path: str, source: str, target: str, cases: list[str]) -> None:
    data = load_prepared(path)
    shared = ["distributed.threads=1", "model.layers=1", "train.batch_size=32"]
    with process_group(load_config(None, shared).distributed) as comm:
        for case in cases:
            name, sharding, optimizer, precision = case.split(":")
            # Adagrad's tables are cut by columns; the planner cuts none narrower than 128.
            dim = 256 if optimizer == "adagrad" else 32
            overrides = [f"distributed.sharding={sharding}", f"train.sparse_optimizer={optimizer}", f"model.dim={dim}"]
            config = load_config(None, [*shared, *overrides, f"train.sparse_precision={precision}"])
            job = Job(JobInputs.of(config, data, comm), learns=precision == "fp32")  # no CPU learns well in fp16

            def checkpoints(folder: str, job: Job = job, name: str = name) -> Checkpoints:
                return Checkpoints(Path(folder) / name, job.model, job.optimizer, comm, data.fingerprint)

            if source == "-":
                for batch in islice(job.loader.after(0), STEPS):
                    job.optimizer.zero_grad()
                    job.model(batch)[0].backward()
                    job.optimizer.step()
                progress = Progress(STEPS)
            else:
                found = checkpoints(source).restore()
                assert found is not None and found[1] == []
                progress = found[0]
            saving = checkpoints(target)
            saving.save(progress)
            saving.finish()
            if comm.main:
                tables = describe(job.plan, comm.world_size)["tables"]
                shards = {table: len(entry["shards"]) for table, entry in tables.items()}
                (Path(target) / name / "shards.json").write_text(json.dumps(shards))
            spoil(job)
            assert "are not all numbers" in saving.save(progress)


def spoil(job: Job) -> None:
    """Put a NaN into the last rank's part of a table: the last of the ranks that hold any."""
    tables = [tensor for tensor in job.model.state_dict().values() if isinstance(tensor, ShardedTensor)]
    held = [shard.tensor.detach() for table in tables for shard in table.local_shards() if shard.tensor.numel()]
    holders = [rank for rank, holds in enumerate(job.comm.gather(bool(held))) if holds]
    if job.comm.rank == holders[-1]:
        held[-1][-1] = math.nan


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
