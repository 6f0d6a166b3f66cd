"""Entertainment: ratings of films from 1 to 5. Taste is by genre, and by circles of people who like the same.

Look at: content and collaborative head beside each other, and what their fusion gains; a filter by genre; and
fine-tuning on "is the rating 4 or more": flm finetune --finetune.source FOLDER/run --train.run FOLDER/labels
--finetune.task label --finetune.threshold 4
"""

from __future__ import annotations

import numpy as np
import polars as pl
from simulation import DAY, Example, drawn, main, popularity, times

import flm_torchrec as flm

GENRES = ["comedy", "crime", "drama", "horror", "romance", "western"]
FILMS, CIRCLES = 500, 12


def make(users: int, seed: int) -> Example:
    """Made-up logs of so many users."""
    rng = np.random.default_rng(seed)
    has = rng.random((FILMS, len(GENRES))) < 0.25
    has[np.arange(FILMS), rng.integers(0, len(GENRES), FILMS)] = True
    loved = rng.random((CIRCLES, FILMS)) < 0.06
    shares = popularity(rng, FILMS)
    rows = []
    for user in range(users):
        taste = rng.dirichlet(np.full(len(GENRES), 0.4))
        circle = int(rng.integers(CIRCLES))
        liking = has @ taste / has.sum(1) + loved[circle]
        left = np.ones(FILMS)
        for at in times(rng, int(rng.integers(8, 30)), 5 * DAY):
            film = drawn(rng, left * shares * liking)
            left[film] = 0
            rating = int(np.clip(round(2.5 + 2 * liking[film] + rng.normal(0, 0.8)), 1, 5))
            rows.append((f"u{user}", f"f{film}", int(at), rating))
    items = pl.DataFrame(
        {
            "item_id": [f"f{i}" for i in range(FILMS)],
            "title": [f"Film {i} ({', '.join(np.array(GENRES)[one])})" for i, one in enumerate(has)],
            "genres": [np.array(GENRES)[one].tolist() for one in has],
        }
    )
    columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "value": "rating"}
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    features = {"title": "text", "genres": "multi_categorical"}
    options = {"columns": columns, "item_features": features, "title": "title"}
    return Example(events, items, options, {"data": {"values": False}})


def look_at(run: flm.Run, recommender: flm.Recommender) -> None:
    """Print what the head of the page says."""
    print(run.evaluate(ks=[10]))
    for head in ("content", "collaborative", "fused"):
        print(head, recommender.recommend(["u1"], k=3, head=head))
    print(recommender.recommend(["u1"], k=3, filter={"genres": ["western"]}))


if __name__ == "__main__":
    main(make, look_at)
