"""How well several runs of one data set rank together: the sum of their fused scores is ranked as one model's.

    python tools/studies/ensemble.py runs/heads-beauty/three-heads-0 runs/heads-beauty/three-heads-1 --split test

A report beside the runs' own: an ensemble costs as many models as it has runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.evaluation.evaluate import blocks_of
from flm_torchrec.evaluation.head_scorer import HeadScorer
from flm_torchrec.evaluation.ranking import RankingProblem, count_ranks, rank_targets
from flm_torchrec.training.restore import restore


class Member:
    """A run's fused vectors: of the examples' users [E, D] and of all items [items, D]."""

    def __init__(self, run: Path, split: str) -> None:
        with restore(run) as restored:
            job = restored.job
            self.data: PreparedData = job.data
            self.examples: Examples = getattr(job.events.splits, split)
            self.eval = job.config.eval
            scorer = HeadScorer(job.encoder(self.examples), self.data.schema.items, self.eval.item_block, job.comm)
            rows = np.array_split(np.arange(len(self.examples)), -(-len(self.examples) // self.eval.user_block))
            self.users = torch.cat([scorer.blocks(part, [part])[0]["fused"] for part in rows])
            self.items = scorer.vectors


class Summed:
    """Scores by the sum of the members' scores."""

    names: tuple[str, ...] = ("ensemble",)
    alike = False

    def __init__(self, members: list[Member]) -> None:
        self.members = members

    def blocks(self, own: np.ndarray, scored: list[np.ndarray]) -> list[Tensor]:
        """Indices of examples, as they are."""
        return [torch.from_numpy(rows) for rows in scored]

    def scores(self, users: Tensor, name: str, start: int, stop: int) -> Tensor:
        """[b, stop - start] sum over the members."""
        return torch.stack([m.users[users] @ m.items[start:stop].T for m in self.members]).sum(0)

    def scores_of(self, users: Tensor, name: str, items: Tensor) -> Tensor:
        """[b] ids → [b], the score of one item for each user."""
        return torch.stack([(m.users[users] @ m.items[items].T).diagonal() for m in self.members]).sum(0)


def members_of(runs: list[Path], split: str) -> list[Member]:
    """Every run's vectors.

    Raises:
        RunError: a run is of other data or of other examples than the first.
    """
    members = [Member(run, split) for run in runs]
    for run, member in zip(runs, members, strict=True):
        same = member.data.fingerprint == members[0].data.fingerprint
        if not same or not np.array_equal(member.examples.end, members[0].examples.end):
            raise RunError(f"{run}: predicts other events than {runs[0]}; name runs of one data set and one split")
    return members


def main() -> int:
    """Print metrics of each run and of all together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="(default: valid)")
    args = parser.parse_args()
    try:
        members = members_of(args.runs, args.split)
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first, comm = members[0], Comm(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
    print("| scorer | " + " | ".join(f"HR@{k} | NDCG@{k}" for k in first.eval.ks) + " |")
    print("|---" * (1 + 2 * len(first.eval.ks)) + "|")
    for name, group in [*((str(r), [m]) for r, m in zip(args.runs, members, strict=True)), ("together", members)]:
        problem = RankingProblem(first.data, first.examples, blocks_of(first.eval))
        ranked = rank_targets(problem, Summed(group), comm)
        counts = count_ranks(ranked, "ensemble", first.data.schema.items, comm)
        cells = " | ".join(f"{counts.hit_rate(k):.4f} | {counts.ndcg(k):.4f}" for k in first.eval.ks)
        print(f"| {name} | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
