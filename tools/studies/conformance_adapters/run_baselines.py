"""The baselines of `flm evaluate`: popularity, chance, item-kNN, Markov, EASE-R, fitted to all known events."""

from __future__ import annotations

import numpy as np
import polars as pl

from flm_torchrec.config.schema import EvalConfig
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.splits import everyone
from flm_torchrec.evaluation.baselines import EASE, ItemKNN, Markov, Popularity, Random
from flm_torchrec.evaluation.protocol import Scorer
from tools.studies.conformance_adapters.prepared import prepared
from tools.studies.conformance_adapters.protocol import K, Task, blocks, histories, task_of


def main(task: Task) -> None:
    """Fit each, and write its lists."""
    data = load_prepared(prepared(task).path)
    learnt, examples = np.ones(len(data.item), bool), everyone(data)
    scorers: dict[str, Scorer] = {
        "popularity": Popularity(data, learnt),
        "random": Random(),
        "item-kNN": ItemKNN(data, learnt, examples, EvalConfig().neighbours),
        "Markov": Markov(data, learnt, examples),
        "EASE-R": EASE(data, learnt, examples),
    }
    user_row, item_row = (
        {key: row for row, key in enumerate(pl.read_parquet(data.path / f"{kind}s.parquet")[f"{kind}_key"])}
        for kind in ("user", "item")
    )
    known, items = histories(task), list(item_row)
    for name, scorer in scorers.items():
        lists = []
        for users in blocks(list(known)):
            rows = np.array([user_row[user] for user in users])
            scores = scorer.scores(scorer.blocks(rows, [rows])[0], name, 0, len(items))  # [b, items]
            for row, user in enumerate(users):
                scores[row, [item_row[item] for item in known[user]]] = -np.inf
            lists += [[items[i] for i in best] for best in scores.topk(K, 1).indices.tolist()]
        task.write(name, list(known), lists)


if __name__ == "__main__":
    main(task_of())
