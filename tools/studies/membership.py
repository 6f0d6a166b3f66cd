"""The trace that forgotten users leave: can an outsider tell them from users whom the model has never seen?

    python tools/studies/membership.py --data data/ml-100k --work work/membership model.dim=32 train.epochs=5

Of a copy of the data, some users are taken out before the training (never seen), and as many others are forgotten after
it, by `flm forget`, from data, run and export. The test is a membership inference: whoever has a user's events asks the
service to rank each of them after the events before it. A user's score is the mean of -ln(rank); the model has learnt
from her if she scores higher than users whom it never saw. AUC is the probability that it does so for a random pair:
0.5 where nothing can be told. The interval is that of 95 % of 2,000 bootstrap samples of users.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flm_torchrec.cli import main as flm
from flm_torchrec.config.heads import FUSED
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.export.tower.reader import TowerQuery
from flm_torchrec.privacy.forget_in_data import forget_rows
from flm_torchrec.serve.loaded_export import LoadedExport, load_export

HELD_OUT = 2
"""Last events of a user, which a leave-one-out split does not train on."""
EVENTS = 20
"""Events of a user that are asked for, the last that were trained on."""
LEAST = 5
"""Events of a user who takes part."""
BATCH = 128
SAMPLES = 2_000


def main() -> None:
    """Train, forget, and print the table of AUCs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data; it stays as it is")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--users", type=int, default=150, help="in each of the two groups (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the drawing of users (default: %(default)s)")
    parser.add_argument("--head", default=FUSED, help="that ranks (default: %(default)s)")
    parser.add_argument("--retrain", action="store_true", help="also train again without the users: the floor")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the training")
    args = parser.parse_args()
    if args.work.exists():
        parser.error(f"{args.work}: exists; give another --work")
    data = load_prepared(args.data)
    forgotten, unseen = drawn(data, args.users, args.seed)
    shutil.copytree(args.data, args.work / "data")
    forget_rows(args.work / "data", [data.user_keys[user] for user in unseen])
    named = args.work / "forgotten.txt"
    named.write_text("".join(f"{data.user_keys[user]}\n" for user in forgotten), encoding="utf-8")
    place = f"{args.work / 'data'}"
    run, export = args.work / "run", args.work / "export"

    print(f"| {len(forgotten)} forgotten and {len(unseen)} never seen users | AUC (95 % interval) |\n|---|---|")

    def measure(what: str, export: Path, *, known: bool = False) -> None:
        loaded = load_export(export, 1)
        members = scores(loaded, data, Probe(forgotten, args.head, known))
        others = scores(loaded, data, Probe(unseen, args.head, False))
        print("| {} | {:.3f} ({:.3f} … {:.3f}) |".format(what, *auc(members, others)), flush=True)

    trained(place, run, export, args.settings)
    measure("before, asked for as known users", export, known=True)
    measure("before, asked for by their events alone", export)
    _flm("forget", "--data", place, "--users", f"{named}", "--run", f"{run}", "--export", f"{export}")
    measure("after flm forget, by their events alone", export)
    if args.retrain:
        trained(place, args.work / "again", args.work / "export-again", args.settings)
        measure("trained again without them", args.work / "export-again")


def trained(data: str, run: Path, export: Path, settings: Sequence[str]) -> None:
    """Train a run and export it."""
    options = [word for setting in settings for word in (f"--{setting.partition('=')[0]}", setting.partition("=")[2])]
    _flm("train", "--data.path", data, "--train.run", f"{run}", *options)
    _flm("export", "--run", f"{run}", "--output", f"{export}", "--index", "none")


def _flm(*command: str) -> None:
    if code := flm(command):
        raise SystemExit(code)


def drawn(data: PreparedData, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two groups of `count` users each, [count] ids, of those with enough events."""
    able = np.flatnonzero(np.diff(data.offsets) >= LEAST + HELD_OUT)
    if len(able) < 3 * count:
        raise SystemExit(f"--users {count}: only {len(able)} users have enough events; give at most {len(able) // 3}")
    chosen = np.random.default_rng(seed).permutation(able)[: 2 * count]
    return np.sort(chosen[:count]), np.sort(chosen[count:])


@dataclass(frozen=True)
class Probe:
    """What an outsider asks for."""

    users: np.ndarray
    """[n] ids."""
    head: str
    known: bool
    """As the users that the export knows; otherwise for the events of somebody unknown."""


def scores(loaded: LoadedExport, data: PreparedData, probe: Probe) -> np.ndarray:
    """[n] users → [n] mean of -ln(rank) over their last trained events, each ranked after the events before it."""
    users, known = probe.users, probe.known
    last = data.offsets[users + 1] - HELD_OUT
    first = np.maximum(data.offsets[users] + 1, last - EVENTS)
    asked = [(u, e) for u, start, stop in zip(users, first, last, strict=True) for e in range(start, stop)]
    rows = [loaded.user_of[data.user_keys[user]] if known else -1 for user, _ in asked]
    items = loaded.vectors(np.arange(loaded.size))
    ranks: list[int] = []
    for start in range(0, len(asked), BATCH):
        batch = list(zip(asked, rows, strict=True))[start : start + BATCH]
        queries = [
            TowerQuery(data.events.take(slice(max(data.offsets[u], e - loaded.tower.max_history - 1), e)), row)
            for (u, e), row in batch
        ]
        for ((user, end), _), found in zip(batch, loaded.represent(queries), strict=True):
            score = loaded.query(found, probe.head).score(items)
            true = score[data.item[end]]
            score[data.item[data.offsets[user] : end]] = -np.inf  # as the service leaves out what was seen
            ranks.append(1 + int((score > true).sum()))
    of = np.repeat(np.arange(len(users)), last - first)
    return -np.bincount(of, np.log(ranks)) / np.bincount(of)


def auc(members: np.ndarray, others: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The probability that a member [n] scores higher than one of the others [m], and its 95 % bootstrap interval."""
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)  # [n, m]
    rng = np.random.default_rng(seed)
    n, m = wins.shape
    drawn = [wins[np.ix_(rng.integers(n, size=n), rng.integers(m, size=m))].mean() for _ in range(SAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(wins.mean()), float(low), float(high)


if __name__ == "__main__":
    main()
