"""Steps of several ranks with look-ups in turn and together, in turn in one run: processor time of all ranks.

    torchrun --nproc_per_node 2 tools/benchmarks/lookups.py --rounds 8 --fill 7552 -- data.path=data/beauty

With `--fill N`, item features are filled up to N items with empty bags in two of the three ways, as they once were.
What stands after `--` are settings.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import islice

import torch

from flm_torchrec.config import load_config
from flm_torchrec.data.batch import Batch
from flm_torchrec.distributed.lookups import JointLookup, with_empty_bags
from flm_torchrec.training.job import Job, open_job

WAYS = ("in turn, filled up", "together, filled up", "together")


def seconds(job: Job, batch: Batch) -> float:
    """Processor time of this rank's step."""
    job.comm.barrier()
    began = time.process_time()
    job.optimizer.zero_grad()
    loss, _ = job.model(batch)
    loss.backward()
    job.optimizer.step()
    return time.process_time() - began


def measure(job: Job, rounds: int, fill: int) -> list[float]:
    """By way, the sum over rounds and ranks."""
    look_up = job.model.module.look_up
    assert isinstance(look_up, JointLookup), "one rank has no look-ups to send; start two or more"
    spent = torch.zeros(len(WAYS), dtype=torch.float64)
    job.model.train()
    for number, batch in enumerate(islice(job.loader.after(0), rounds + 1)):
        filled = replace(batch, item_features=with_empty_bags(batch.item_features, fill))
        for way, name in enumerate(WAYS):
            look_up.begun = name.startswith("together") and number > 0
            taken = seconds(job, batch if name == "together" else filled)
            spent[way] += taken if number else 0.0  # the first is to warm up
    return job.comm.all_reduce_sum(spent).tolist()


def main() -> None:
    """Measure and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each way (default: %(default)s)")
    parser.add_argument(
        "--fill", type=int, default=0, help="least number of items with features (default: %(default)s)"
    )
    parser.add_argument("settings", nargs="*", help="after --: settings as section.field=value")
    args = parser.parse_args()
    config = load_config(None, ["distributed.threads=1", "distributed.device=cpu", *args.settings])
    with open_job(config) as job:
        spent = measure(job, args.rounds, args.fill)
        for name, taken in zip(WAYS, spent, strict=True) if job.comm.main else ():
            each = 1e3 * taken / args.rounds
            print(f"{name}: {each:.1f} ms a step, all ranks together, {taken / spent[0]:.3f} of the first")


if __name__ == "__main__":
    main()
