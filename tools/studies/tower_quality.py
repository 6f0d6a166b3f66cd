"""What int8 rows in the packaged user tower change: how far vectors move, and NDCG@10 beside the model's own.

    python tools/studies/tower_quality.py --run runs/synthetic --split test

Each example's history goes through the packages as `flm serve` would send it, and the true next item is ranked among
all items by the model's own item vectors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples
from flm_torchrec.evaluation.evaluate import evaluate_heads
from flm_torchrec.evaluation.protocol import Encoder, Of
from flm_torchrec.export.tower.reader import PackagedTower, TowerQuery
from flm_torchrec.export.tower.writer import Precision, write_tower
from flm_torchrec.training.gathered import GatheredModel
from flm_torchrec.training.restore import restore


class Packaged:
    """Users by the package, items by the model."""

    def __init__(self, tower: PackagedTower, data: PreparedData, examples: Examples, exact: Encoder) -> None:
        self.tower, self.data, self.examples, self.exact = tower, data, examples, exact
        self.dim, self.growth, self.mixture = tower.space, exact.growth, exact.mixture

    def users(self, rows: np.ndarray) -> dict[str, Tensor]:
        """As of `evaluation.protocol.Encoder`."""
        examples = self.examples.take(rows)
        queries = [self._query(int(u), int(e)) for u, e in zip(examples.user, examples.end, strict=True)]
        encoded = self.tower.represent(queries, np.zeros((0, self.tower.dim), np.float32)) if queries else []
        heads = np.array([e.heads for e in encoded], np.float32).reshape(-1, len(REPRESENTATIONS), self.dim)
        return {head: torch.from_numpy(heads[:, index].copy()) for index, head in enumerate(REPRESENTATIONS)}

    def items(self, ids: np.ndarray, of: Of = "all") -> Tensor:
        """As of `evaluation.protocol.Encoder`."""
        return self.exact.items(ids, of)

    def views(self, ids: np.ndarray) -> dict[Of, Tensor]:
        """Items by the model, of each kind."""
        return self.exact.views(ids)

    def _query(self, user: int, end: int) -> TowerQuery:
        data = self.data
        events = slice(max(data.offsets[user], end - self.tower.max_history - 1), end)
        return TowerQuery(data.events.take(events), user)


def main() -> None:
    """Print, for each precision, size, movement of vectors and NDCG@10."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of 'flm train'")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    args = parser.parse_args()
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    with restore(args.run) as restored, tempfile.TemporaryDirectory() as folder:
        job = restored.job
        examples: Examples = getattr(job.events.splits, args.split)
        model, exact = GatheredModel(job), job.encoder(examples)
        own = evaluate_heads(job.data, examples, exact, job.comm, job.config.eval)
        sample = np.arange(min(256, len(examples)))
        vectors = exact.users(sample)
        for precision in precisions:
            target = Path(folder) / precision
            target.mkdir()
            write_tower(job.data, model, True, precision, target)
            encoder = Packaged(PackagedTower(target), job.data, examples, exact)
            size = sum(f.stat().st_size for f in target.rglob("*.pt2")) / 1e6
            moved = max(float((encoder.users(sample)[h] - vectors[h]).abs().max()) for h in REPRESENTATIONS)
            print(f"{precision}: {size:.1f} MB; no number of a vector moves by more than {moved:.1e}")
            packaged = evaluate_heads(job.data, examples, encoder, job.comm, job.config.eval)
            for head in REPRESENTATIONS:
                before, after = own[f"{head}/ndcg@10"], packaged[f"{head}/ndcg@10"]
                print(f"  {head:13} ndcg@10 {before:.5f} → {after:.5f}  {after / before - 1:+.2%}", flush=True)


if __name__ == "__main__":
    main()
