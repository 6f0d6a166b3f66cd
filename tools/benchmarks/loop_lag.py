"""The lag of the loop log → follow → delta → serving: an event is posted; when does another user's answer change?

    python tools/benchmarks/loop_lag.py --rounds 20 --tolerance 0.02

Small synthetic data are prepared, trained on for a few steps, exported and served, all in this process. Each round
posts one event of a user to the service, and then does what docs/streaming.md does over and over: `flm export-events`,
`flm follow --once`, `flm export --since`, `flm apply-delta`, and the swap of the service. The answer that is watched is
that of another user, who has the same item in the history. Odd rounds bring a new user and a new item too. The last
line is the lag over all rounds. The loop of a team also waits for its timer, and starts a process for each command:
both come on top. Of each delta the tool says which share of the rows of items and users it has; in the end, how many
of the ten best items of all users are those of a whole export.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.cli import main as flm
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.export.delta import load_delta
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.messages import NewEvent, NewItem, Recommend
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service

STAGES = ("export-events", "follow", "export --since", "apply-delta", "swap")


class Loop:
    """The run that is followed, its exports and the server.

    Args:
        folder: empty folder for everything.
        users: users of the synthetic data; there are half as many items.
        tolerance: of each delta.
    """

    def __init__(self, folder: Path, users: int, tolerance: float) -> None:
        self.folder = folder
        self.tolerance = str(tolerance)
        data, exports = folder / "data", folder / "exports"
        exports.mkdir()
        size = ["--synthetic-users", str(users), "--synthetic-items", str(users // 2), "--synthetic-events", "12"]
        self.command("prepare", "--source", "synthetic", *size, "--output", str(data))
        settings = ["--train.max_steps", "20", "--train.batch_size", "64", "--model.dim", "16"]
        self.command("train", "--data.path", str(data), "--train.run", str(folder / "run"), *settings)
        self.command("export", "--run", str(folder / "run"), "--output", str(exports / "0"))
        self.data: PreparedData = load_prepared(data)
        self.service = Service(exports / "0", EventStore(folder / "events.db"))

    def command(self, *arguments: str) -> None:
        """Run a command of `flm`, without its output.

        Raises:
            SystemExit: it failed.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            if flm(list(arguments)):
                raise SystemExit(f"flm {arguments[0]} failed")

    def answer(self, user: str) -> Any:
        """Items and scores for a user."""
        (found,) = self.service.recommend([Recommend(user=user, k=10)])
        if isinstance(found, Exception):
            raise found
        return [(item["item"], item["score"]) for item in found["items"]]

    def post(self, user: str, item: str, number: int) -> None:
        """Post an event; in odd rounds also a new item, and events of a new user.

        Raises:
            Refused: the service does not take it.
        """
        events = [NewEvent(user=user, item=item)]
        if number % 2:
            self.service.add_item(NewItem(item=f"new-item-{number}", title="a new one"))
            events += [NewEvent(user=f"new-{number}", item=key) for key in (item, f"new-item-{number}")]
        for answer in self.service.add_events(events):
            if isinstance(answer, Refused):
                raise answer

    def stages(self, number: int) -> Iterator[None]:
        """The steps of STAGES for one round, one after the other."""
        run, old, new = self.folder / "live", *(self.folder / f"exports/{n}" for n in (number, number + 1))
        delta = self.folder / f"deltas-{number}"
        base, log, cold = (str(self.folder / name) for name in ("run", "log", "cold.jsonl"))
        self.command("export-events", "--events", str(self.folder / "events.db"), "--output", log, "--items", cold)
        yield
        self.command("follow", "--run", base, "--source", log, "--items", cold, "--output", str(run), "--once")
        yield
        since = ["--since", str(old), "--tolerance", self.tolerance]
        self.command("export", "--run", str(run), *since, "--output", str(delta))
        yield
        self.command("apply-delta", "--base", str(old), "--delta", str(delta), "--output", str(new))
        yield
        self.service.swap(new)
        yield

    def sent(self, number: int) -> float:
        """The share of the items, and of the users, that the delta of a round has: the mean of the two."""
        delta = load_delta(self.folder / f"deltas-{number}")
        return (delta.changed["items"] / delta.whole.items + delta.changed["users"] / delta.whole.users) / 2

    def overlap(self) -> float:
        """How many of the ten best items of all users are those of a whole export of the newest model, as a share."""
        exact = self.folder / "exports/exact"
        self.command("export", "--run", str(self.folder / "live"), "--output", str(exact))
        served = self.best_items()
        self.service.swap(exact)
        shared = [len(a & b) / len(b) for a, b in zip(served, self.best_items(), strict=True)]
        return float(np.mean(shared))

    def best_items(self) -> list[set[str]]:
        """Of each user of the data, the items of the answer."""
        return [{item for item, _ in self.answer(user)} for user in self.data.user_keys]

    def round(self, number: int, rng: np.random.Generator) -> tuple[list[float], bool]:
        """Post an event and run the loop once → seconds of each stage, and whether another user's answer changed."""
        user, other = rng.choice(np.flatnonzero(np.diff(self.data.offsets) > 2), 2, replace=False)
        item = int(self.data.item[self.data.offsets[other]])
        watched = self.data.user_keys[other]
        before = self.answer(watched)
        started = time.perf_counter()
        self.post(self.data.user_keys[user], self.data.item_keys[item], number)
        seconds = []
        for _ in self.stages(number):
            seconds.append(time.perf_counter() - started)
        return np.diff([0.0, *seconds]).tolist(), self.answer(watched) != before


def main() -> None:
    """Print the lag of each round, and p50 and p95 over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="events (default: 10)")
    parser.add_argument("--users", type=int, default=200, metavar="N", help="of the data (default: 200)")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="PART", help="of the deltas (default: 0)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(Path(folder), args.users, args.tolerance)
        lags, sent, changed = [], [], 0
        for number in range(args.rounds):
            seconds, differs = loop.round(number, rng)
            lags.append(sum(seconds))
            changed += differs
            sent.append(loop.sent(number))
            parts = ", ".join(f"{name} {part:.2f}" for name, part in zip(STAGES, seconds, strict=True))
            told = f"{sent[-1]:.0%} of the rows sent; answer {'changed' if differs else 'is the same'}"
            print(f"round {number}: {lags[-1]:.2f} s ({parts}); {told}", flush=True)
        p50, p95 = np.quantile(lags, [0.5, 0.95])
        print(f"lag of {args.rounds} events: p50 {p50:.2f} s, p95 {p95:.2f} s; {changed} answers changed")
        print(f"deltas: {np.mean(sent):.0%} of the rows on average; then {loop.overlap():.1%} of all top 10 are right")


if __name__ == "__main__":
    main()
