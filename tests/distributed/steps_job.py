"""Run by test_distributed as one rank or several: train some steps, print the global losses, then rank everyone.

Arguments: prepared data, file for the results, overrides of the config.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch

from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.evaluation.head_scorer import HeadScorer
from flm_torchrec.evaluation.ranking import Blocks, RankingProblem, rank_targets
from flm_torchrec.training.job import open_job
from tools.studies.scaling_job import Sent

STEPS = 20


def main(path: str, output: str, overrides: list[str]) -> None:
    # Dropout draws differ by rank, so equality of losses can be asked for only without it.
    fixed = ["model.dropout=0", "model.embedding_dropout=0", "model.id_dropout=0", "model.user_id_dropout=0"]
    fixed += ["loss.fused=1", "distributed.threads=1"]
    config = load_config(None, [*fixed, *overrides])
    data = load_prepared(path)
    with open_job(config, data) as job:
        comm, model, plan, optimizer, loader = job.comm, job.model, job.plan, job.optimizer, job.loader
        losses = []
        sent = Sent(comm.rank, comm.world_size)
        sent.watch(model.module.dense.gather)
        model.train()
        for step, batch in enumerate(islice(loader.after(0), STEPS)):
            with sent if step == STEPS - 1 else nullcontext():
                optimizer.zero_grad()
                loss, outputs = model(batch)
                loss.backward()
                optimizer.step()
            shares = torch.stack(list(outputs.losses.values()))
            losses.append(comm.all_reduce_sum(shares).tolist())
        test = job.events.splits.test
        encode = job.encoder(test)
        scorer = HeadScorer(encode, data.schema.items, 64, comm)
        ranked = rank_targets(RankingProblem(data, test, Blocks(16, 64)), scorer, comm)
        everyone = np.zeros(len(test), np.int64)
        everyone[ranked.rows] = ranked.ranks["fused"]
        total = comm.all_reduce_sum(torch.from_numpy(everyone))
        if comm.main:
            types = sorted({c.sharding_type for m in plan.plan.values() for c in m.values()})
            result: dict[str, Any] = {"losses": losses, "ranks": total.tolist(), "sharding": types}
            result |= {"collectives": dict(sent.calls), "bytes": dict(sent.bytes)}
            with open(output, "w", encoding="utf-8") as file:
                json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
