"""Social media: posts live for two days, and a new one has no likes yet, only an author, a topic and words.

Look at: a split by time, where most of what is to be found is new; the content head beside "ids alone"; and the row of
cold items in the table.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from simulation import DAY, START, Example, drawn, main, popularity

import flm_torchrec as flm

TOPICS = ["football", "cooking", "politics", "music", "science", "travel"]
AUTHORS, POSTS, DAYS = 60, 1200, 40


def make(users: int, seed: int) -> Example:
    """Made-up logs of so many users."""
    rng = np.random.default_rng(seed)
    author = rng.choice(AUTHORS, POSTS, p=popularity(rng, AUTHORS))
    topic = (author + (rng.random(POSTS) < 0.2)) % len(TOPICS)
    posted = np.sort(rng.uniform(0, DAYS * DAY, POSTS))
    rows = []
    for user in range(users):
        taste = rng.dirichlet(np.full(len(TOPICS), 0.3))
        followed = rng.random(AUTHORS) < 0.1
        for at in np.sort(rng.uniform(2 * DAY, DAYS * DAY, int(rng.integers(6, 25)))):
            alive = (posted < at) & (posted > at - 2 * DAY)
            weights = alive * (taste[topic] + 0.5 * followed[author] + 1e-6)
            if weights.any():
                event = "like" if rng.random() < 0.3 else "view"
                rows.append((f"u{user}", f"post{drawn(rng, weights)}", int(START + at), event))
    items = pl.DataFrame(
        {
            "item_id": [f"post{i}" for i in range(POSTS)],
            "author": [f"a{a}" for a in author],
            "topic": [TOPICS[t] for t in topic],
            "words": [f"{TOPICS[t]} news by author {a}" for t, a in zip(topic, author, strict=True)],
        }
    )
    features = {"author": "categorical", "topic": "categorical", "words": "text"}
    columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "event": "event"}
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "event"], orient="row")
    return Example(events, items, {"columns": columns, "item_features": features}, {"data": {"split": "time"}})


def look_at(run: flm.Run, recommender: flm.Recommender) -> None:
    """Print what the head of the page says."""
    print(run.evaluate(ks=[10]))
    newest = pl.DataFrame({"user": ["guest"] * 2, "item": [f"post{POSTS - 40}", f"post{POSTS - 60}"]})
    print(recommender.recommend(newest, k=5, head="content"))


if __name__ == "__main__":
    main(make, look_at)
