"""Evaluation at full ranking beside a bare matmul and top-k of the same sizes, in turns in one run.

    python tools/benchmarks/eval.py --run runs/beauty

Ranks the test event of every user by every head, as `flm evaluate` does: scores of all items, the user's earlier ones
left out, the rank of the true one, and the best ten for coverage. The floor is `Q @ V.T` and `topk` alone, in the same
blocks, precision and threads, for the same heads. Encoding users and items, which both need, is timed apart, and so is
choosing the fusion's weights. Prints seconds of each, medians over the rounds, and the median of their paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.evaluation.evaluate import COVERAGE_AT, blocks_of
from flm_torchrec.evaluation.head_scorer import HeadScorer
from flm_torchrec.evaluation.protocol import Encoder, Of
from flm_torchrec.evaluation.ranking import RankingProblem, rank_targets
from flm_torchrec.training.fusion_weights import choose_fusion
from flm_torchrec.training.job import Job
from flm_torchrec.training.restore import restore


class Kept:
    """An encoder that has made all vectors in advance."""

    def __init__(self, encoder: Encoder, users: int, items: int, block: int) -> None:
        self.dim, self.growth, self.mixture = encoder.dim, 0, encoder.mixture
        blocks = [encoder.users(np.arange(s, min(s + block, users))) for s in range(0, users, block)]
        self.heads = {head: torch.cat([b[head] for b in blocks]) for head in REPRESENTATIONS}
        self.vectors = torch.cat([encoder.items(np.arange(s, min(s + block, items))) for s in range(0, items, block)])

    def users(self, rows: np.ndarray) -> dict[str, Tensor]:
        """[b] indices of examples → by head, [b, D]."""
        return {head: vectors[rows] for head, vectors in self.heads.items()}

    def items(self, ids: np.ndarray, of: Of = "all") -> Tensor:
        """[n] item ids → [n, D]."""
        return self.vectors[ids]

    def views(self, ids: np.ndarray) -> dict[Of, Tensor]:
        """The stored vectors; this benchmark asks for no other view."""
        return {"all": self.items(ids)}


def bare(kept: Kept, block: int, k: int) -> None:
    """The floor: for each head, the product with all items and the top k."""
    for vectors in kept.heads.values():
        for start in range(0, len(vectors), block):
            (vectors[start : start + block] @ kept.vectors.T).topk(k, 1)


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that the call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def main() -> None:
    """Measure the evaluation of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of flm train")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--user-block", type=int, help="eval.user_block (default: the run's)")
    parser.add_argument("--threads", type=int, help="(default: the run's)")
    args = parser.parse_args()
    with restore(args.run) as restored:
        job = restored.job
        examples, config = job.events.splits.test, job.config.eval
        if args.threads:
            torch.set_num_threads(args.threads)
        blocks = blocks_of(replace(config, user_block=args.user_block or config.user_block))
        problem = RankingProblem(job.data, examples, blocks)
        measure(problem, job.encoder(examples), job, args.rounds)


def measure(problem: RankingProblem, encoder: Encoder, job: Job, rounds: int) -> None:
    """Print the seconds of the evaluation, of its floor and of their ratio."""
    data, examples, blocks, comm = problem.data, problem.examples, problem.blocks, job.comm
    began = time.perf_counter()
    kept = Kept(encoder, len(examples), data.schema.items, blocks.users)
    print(f"{len(examples)} users, {data.schema.items} items, {encoder.dim} numbers, {torch.get_num_threads()} threads")
    encoding = time.perf_counter() - began
    print(f"encoding users and items: {encoding:.2f} s")
    scorer = HeadScorer(kept, data.schema.items, blocks.items, comm)
    ours = (rank_targets, problem, scorer, comm, COVERAGE_AT)
    ranks = (rank_targets, problem, scorer, comm)
    floor = (bare, kept, blocks.users, COVERAGE_AT)
    turns = [(seconds(*floor), seconds(*ours), seconds(*ranks)) for _ in range(rounds + 1)][1:]  # the first warms up
    names = ("matmul and top-k alone", "ranks and the best ten", "ranks alone, as in validation")
    for name, times in zip(names, zip(*turns, strict=True), strict=True):
        print(f"{name}: {statistics.median(times):.2f} s")
    for column, name in ((1, names[1]), (2, names[2])):
        print(f"{name} / {names[0]}: {statistics.median(t[column] / t[0] for t in turns):.2f}")
    print(f"with encoding: {statistics.median((encoding + t[1]) / t[0] for t in turns):.2f}")
    chosen = seconds(choose_fusion, problem, kept, job.model.module.temperatures(), comm, job.config)
    print(f"choosing the fusion on as many users: {chosen:.2f} s")


if __name__ == "__main__":
    main()
