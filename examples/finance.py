"""Finance: few products, many clients. What fits a client depends on age, income and appetite for risk.

Look at: clients nobody knows, who have features alone (split cold-start); and how little of a client leaves the house:
`flm prepare --hash-users KEYFILE` replaces ids, `--min-users 20` hides what few clients have (docs/privacy.md).
"""

from __future__ import annotations

import numpy as np
import polars as pl
from simulation import DAY, Example, drawn, main, times

import flm_torchrec as flm

KINDS = ["account", "card", "savings", "bond fund", "share fund", "mortgage", "insurance", "pension"]
RISKS = [0, 1, 0, 1, 3, 2, 1, 2]
PER_KIND = 8


def make(users: int, seed: int) -> Example:
    """Made-up logs of so many users, whom a table describes."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(len(KINDS)), PER_KIND)
    age, income = rng.integers(18, 80, users), np.exp(rng.normal(10.3, 0.5, users)).round(-2)
    appetite = rng.integers(0, 4, users)
    rows = []
    for user in range(users):
        fits = np.exp(-np.abs(np.array(RISKS) - appetite[user]))
        fits[5] *= 25 < age[user] < 50  # a mortgage
        fits[7] *= 2.0 if age[user] > 40 else 0.3  # a pension
        left = np.ones(len(kind))
        for at in times(rng, int(rng.integers(4, 9)), 200 * DAY):
            product = drawn(rng, left * fits[kind])
            left[product] = 0
            rows.append((f"u{user}", f"product{product}", int(at)))
    items = pl.DataFrame(
        {
            "item_id": [f"product{i}" for i in range(len(kind))],
            "kind": [KINDS[k] for k in kind],
            "risk": [str(RISKS[k]) for k in kind],
        }
    )
    clients = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in range(users)],
            "age": age,
            "income": income,
            "appetite": [str(a) for a in appetite],
        }
    )
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    options = {
        "users": clients,
        "user_features": {"age": "quantile", "income": "numeric", "appetite": "categorical"},
        "item_features": {"kind": "categorical", "risk": "categorical"},
        "min_users": 5,
        "quantiles": 10,
    }
    return Example(events, items, options, {"data": {"split": "cold-start"}})


def look_at(run: flm.Run, recommender: flm.Recommender) -> None:
    """Print what the head of the page says."""
    print(run.evaluate(ks=[5]))
    print(recommender.recommend(["u1"], k=5))
    print(recommender.similar_items(["product33"], k=3))


if __name__ == "__main__":
    main(make, look_at)
