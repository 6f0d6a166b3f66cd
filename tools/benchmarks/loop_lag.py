"""The lag of the loop log → follow → delta → serving: an event is written; when does another user's answer change?

    python tools/benchmarks/loop_lag.py --rounds 10

Small synthetic data are prepared, trained on for a few steps, exported and served, all in this process. Each round
writes one event of a user to the log, and then does what a team would do over and over: `flm follow --once`,
`flm export --since`, `flm apply-delta`, and the swap of the server. The answer that is watched is that of another user,
who has the same item in the history. Odd rounds bring a new user and a new item too. The last line is the lag over all
rounds. The loop of a team also waits for its timer, and starts a process for each command: both come on top.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.cli import main as flm
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.serve.messages import Recommend
from flm_torchrec.serve.service import Service

STAGES = ("follow", "export --since", "apply-delta", "swap")
FIRST = 1_900_000_000
"""Seconds of the first event: after all events of the data."""


class Loop:
    """The run that is followed, its exports and the server.

    Args:
        folder: empty folder for everything.
        users: users of the synthetic data; there are half as many items.
    """

    def __init__(self, folder: Path, users: int) -> None:
        self.folder = folder
        data, exports = folder / "data", folder / "exports"
        (folder / "log").mkdir()
        exports.mkdir()
        size = ["--synthetic-users", str(users), "--synthetic-items", str(users // 2), "--synthetic-events", "12"]
        self.command("prepare", "--source", "synthetic", *size, "--output", str(data))
        settings = ["--train.max_steps", "20", "--train.batch_size", "64", "--model.dim", "16"]
        self.command("train", "--data.path", str(data), "--train.run", str(folder / "run"), *settings)
        self.command("export", "--run", str(folder / "run"), "--output", str(exports / "0"))
        self.data: PreparedData = load_prepared(data)
        self.service = Service(exports / "0")

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

    def stages(self, number: int) -> Iterator[None]:
        """The steps of STAGES for one round, one after the other."""
        run, old, new = self.folder / "live", *(self.folder / f"exports/{n}" for n in (number, number + 1))
        delta, source = self.folder / f"deltas-{number}", self.folder / "log"
        base = str(self.folder / "run")
        self.command("follow", "--run", base, "--source", str(source), "--output", str(run), "--once")
        yield
        self.command("export", "--run", str(run), "--since", str(old), "--output", str(delta))
        yield
        self.command("apply-delta", "--base", str(old), "--delta", str(delta), "--output", str(new))
        yield
        self.service.swap(new)
        yield

    def round(self, number: int, rng: np.random.Generator) -> tuple[list[float], bool]:
        """Write an event and run the loop once → seconds of each stage, and whether another user's answer changed."""
        user, other = rng.choice(np.flatnonzero(np.diff(self.data.offsets) > 2), 2, replace=False)
        item = int(self.data.item[self.data.offsets[other]])
        event = {"user": self.data.user_keys[user], "item": self.data.item_keys[item], "timestamp": FIRST + number}
        lines = [event]
        if number % 2:
            lines += [{**event, "user": f"new-{number}"}, {**event, "item": f"new-{number}", "title": "a new one"}]
        watched = self.data.user_keys[other]
        before = self.answer(watched)
        started = time.perf_counter()
        (self.folder / f"log/{number:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        seconds = []
        for _ in self.stages(number):
            seconds.append(time.perf_counter() - started)
        return np.diff([0.0, *seconds]).tolist(), self.answer(watched) != before


def main() -> None:
    """Print the lag of each round, and p50 and p95 over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--users", type=int, default=200)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(Path(folder), args.users)
        lags, changed = [], 0
        for number in range(args.rounds):
            seconds, differs = loop.round(number, rng)
            lags.append(sum(seconds))
            changed += differs
            parts = ", ".join(f"{name} {part:.2f}" for name, part in zip(STAGES, seconds, strict=True))
            print(f"round {number}: {lags[-1]:.2f} s ({parts}); answer {'changed' if differs else 'is the same'}")
        p50, p95 = np.quantile(lags, [0.5, 0.95])
        print(f"lag of {args.rounds} events: p50 {p50:.2f} s, p95 {p95:.2f} s; {changed} answers changed")


if __name__ == "__main__":
    main()
