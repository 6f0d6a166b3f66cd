"""Education: learners go from easy courses to hard ones, subject by subject; the value of an event is the mark.

Look at: the sequential head, which knows the next level; the marks, which say whether a learner is ready for it; and a
learner nobody knows, by the courses that she has taken.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from simulation import DAY, Example, drawn, main, times

import flm_torchrec as flm

SUBJECTS = ["algebra", "biology", "history", "programming", "statistics"]
LEVELS, VARIANTS = 6, 6
"""Levels of a subject, and courses of one level."""


def course(subject: int, level: int, variant: int) -> str:
    """The id of a course."""
    return f"{SUBJECTS[subject]}-{level}-{variant}"


def make(users: int, seed: int) -> Example:
    """Made-up logs of so many users."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        level = rng.integers(0, 3, len(SUBJECTS))
        taste = rng.dirichlet(np.full(len(SUBJECTS), 0.5))
        for at in times(rng, int(rng.integers(5, 16)), 20 * DAY):
            subject = drawn(rng, taste)
            mark = float(np.clip(rng.normal(75, 15), 0, 100).round())
            variant = int(rng.integers(VARIANTS))
            rows.append((f"u{user}", course(subject, level[subject], variant), int(at), mark))
            level[subject] = min(
                LEVELS - 1, level[subject] + (mark >= 60)
            )  # who fails takes a course of the same level
    shape = [(s, n, v) for s in range(len(SUBJECTS)) for n in range(LEVELS) for v in range(VARIANTS)]
    items = pl.DataFrame(
        {
            "item_id": [course(*one) for one in shape],
            "subject": [SUBJECTS[s] for s, _, _ in shape],
            "level": [n for _, n, _ in shape],
        }
    )
    columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "value": "mark"}
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "mark"], orient="row")
    return Example(
        events, items, {"columns": columns, "item_features": {"subject": "categorical", "level": "quantile"}}
    )


def look_at(run: flm.Run, recommender: flm.Recommender) -> None:
    """Print what the head of the page says."""
    print(run.evaluate(ks=[10]))
    for mark in (40.0, 95.0):
        taken = pl.DataFrame({"user": ["new"] * 2, "item": ["algebra-0-1", "algebra-1-2"], "value": [90.0, mark]})
        print(f"after algebra of level 1 with {mark:.0f} marks:", recommender.recommend(taken, k=4, head="sequential"))


if __name__ == "__main__":
    main(make, look_at)
