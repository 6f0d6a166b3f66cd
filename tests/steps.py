"""Training steps of a job, for tests that compare losses."""

from __future__ import annotations

from itertools import islice

import torch

from flm_torchrec.training.job import Job


def losses_of_steps(job: Job, count: int, seed: int) -> list[float]:
    """The loss of each step and its parts, in order.

    Args:
        seed: of dropout.
    """
    job.model.train()
    torch.manual_seed(seed)
    found = []
    for batch in islice(job.loader.after(0), count):
        job.optimizer.zero_grad()
        loss, outputs = job.model(batch)
        loss.backward()
        job.optimizer.step()
        found += [float(loss), *map(float, outputs.losses.values())]
    return found
