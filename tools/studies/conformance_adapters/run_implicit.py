"""implicit: matrix factorisation by alternating least squares (ALS) and by Bayesian personalised ranking (BPR)."""

from __future__ import annotations

import numpy as np

from tools.studies.conformance_adapters.protocol import K, Task, histories, task_of


def main(task: Task) -> None:
    """Fit both to all known events, and write their lists."""
    # Imported here: implicit is in an environment of its own.
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    items = np.array(task.table("items")["item"].to_pylist())
    known = histories(task)
    users = list(known)
    place = {item: row for row, item in enumerate(items)}
    columns = [place[item] for history in known.values() for item in history]
    offsets = np.cumsum([0, *map(len, known.values())])
    seen = csr_matrix((np.ones(len(columns), np.float32), columns, offsets), shape=(len(users), len(items)))
    models = {
        "ALS": AlternatingLeastSquares(
            factors=64, regularization=0.05, alpha=10, iterations=20, num_threads=1, random_state=task.seed
        ),
        "BPR": BayesianPersonalizedRanking(
            factors=64, learning_rate=0.05, iterations=200, num_threads=1, random_state=task.seed
        ),
    }
    for name, model in models.items():
        model.fit(seen, show_progress=False)
        found, _ = model.recommend(np.arange(len(users)), seen, N=K, filter_already_liked_items=True)
        task.write(name, users, items[found].tolist())


if __name__ == "__main__":
    main(task_of())
