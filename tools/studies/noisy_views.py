"""Make and prepare logs of views and purchases whose views are mostly noise: data for configs/studies/event_kinds.yaml.

    python tools/studies/noisy_views.py --output data/noisy-views

A purchase follows from the one before it (printer → ink) or from the user's taste. NOISE of the views are of whatever
is promoted, and say nothing of the user; the others are of the category of the purchase that comes next. No user buys
what she has viewed. The last three events of each user are purchases: a leave-one-out split holds out the same events
whichever kinds are predicted, and validation asks what test asks, a purchase right after a purchase. `DIR/buys` has
the same purchases without the views.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

import flm_torchrec as flm

ITEMS, CATEGORIES = 240, 12
PURCHASES, VIEWS = 7, 3
"""Purchases of a user, and views before each of them but the last two."""
NOISE, FOLLOWS = 0.7, 0.7
"""Share of the views of promoted items; share of the purchases of the category that goes with the last one's."""
COLUMNS = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "event": "event"}


def make(users: int, seed: int) -> pl.DataFrame:
    """The log: user_id, item_id, timestamp, event."""
    rng = np.random.default_rng(seed)
    category = np.arange(ITEMS) % CATEGORIES
    liked, promoted = (rng.permutation(1 / np.arange(1, ITEMS + 1)) for _ in range(2))
    rows: list[tuple[str, str, int, str]] = []
    for user in range(users):
        taste = rng.dirichlet(np.full(CATEGORIES, 0.3))
        had = np.zeros(ITEMS, bool)
        wanted = int(rng.choice(CATEGORIES, p=taste))
        for purchase in range(PURCHASES):
            views = VIEWS if purchase < PURCHASES - 2 else 0
            kinds = ["view"] * views + ["buy"]
            for kind in kinds:
                noise = kind == "view" and rng.random() < NOISE
                weight = np.where(had, 0, promoted if noise else liked * (category == wanted))
                item = int(rng.choice(ITEMS, p=weight / weight.sum()))
                had[item] = True
                rows.append((f"u{user}", f"i{item}", len(rows), kind))
            # Categories 0 and 1 go together, 2 and 3, …
            wanted = wanted ^ 1 if rng.random() < FOLLOWS else int(rng.choice(CATEGORIES, p=taste))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "event"], orient="row")


def main() -> None:
    """Prepare the log, with the views and without them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of prepared data to write")
    parser.add_argument("--users", type=int, default=800, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args()
    log = make(args.users, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, events in (("all", log), ("buys", log.filter(pl.col("event") == "buy"))):
        flm.prepare(events, args.output / name, columns=COLUMNS)
        print(f"{args.output / name}: {len(events)} events of {args.users} users")


if __name__ == "__main__":
    main()
