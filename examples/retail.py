"""Retail: views and purchases. A purchase is often followed by one of the category that goes with it (printer → ink).

Look at: the sequential head, which alone knows what goes with the last purchase; items near an item; and what is left
when the shop wants one category only.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from simulation import Example, drawn, main, popularity, times

import flm_torchrec as flm

CATEGORIES = ["printers", "ink", "cameras", "lenses", "tents", "stoves", "shoes", "socks"]
ITEMS = 400


def make(users: int, seed: int) -> Example:
    """Made-up logs of so many users."""
    rng = np.random.default_rng(seed)
    category = rng.integers(0, len(CATEGORIES), ITEMS)
    shares = popularity(rng, ITEMS)
    rows = []
    for user in range(users):
        taste = rng.dirichlet(np.full(len(CATEGORIES), 0.4))
        wanted = drawn(rng, taste)
        for at in times(rng, int(rng.integers(5, 25)), 3 * 86_400):
            item = drawn(rng, shares * (category == wanted))
            bought = rng.random() < 0.3
            rows.append((f"u{user}", f"p{item}", int(at), "buy" if bought else "view"))
            # Categories 0 and 1 go together, 2 and 3, …
            wanted = wanted ^ 1 if bought and rng.random() < 0.7 else drawn(rng, taste)
    items = pl.DataFrame(
        {
            "item_id": [f"p{i}" for i in range(ITEMS)],
            "name": [f"{CATEGORIES[c]} {i}" for i, c in enumerate(category)],
            "category": [CATEGORIES[c] for c in category],
            "price": np.round(np.exp(rng.normal(3, 1, ITEMS)), 2),
        }
    )
    features = {"name": "text", "category": "categorical", "price": "numeric"}
    columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "event": "event"}
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "event"], orient="row")
    return Example(events, items, {"columns": columns, "item_features": features, "title": "name"})


def look_at(run: flm.Run, recommender: flm.Recommender) -> None:
    """Print what the head of the page says."""
    print(run.evaluate(ks=[10]))
    print(recommender.recommend(["u1"], k=5))
    print(recommender.recommend(["u1"], k=5, filter={"category": ["ink"]}))
    print(recommender.similar_items(["p1"], k=5))


if __name__ == "__main__":
    main(make, look_at)
