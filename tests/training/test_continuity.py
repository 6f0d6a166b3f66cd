"""Continuity: what a run knows depends on what it learned from, not on what happened to it in between.

A story is an order of things that happen to a run. Three of them decide what it learns: more data are prepared, the run
goes on by a warm start on the newest data, it follows new events. Others must not change a bit: a kill at any write and
a start after it, a start with nothing new, a move to other numbers of ranks and back (each loads the state and saves
it, and takes no step), data that are prepared and not yet used. Each story is compared with the one without these, told
by one process on one thread.

Not claimed: that a step at two ranks gives the bits of a step at one. There sums have another order;
tests/distributed/test_sharding.py says how near they are. Nor that dropout is the same after a move: each rank draws
for itself. So the runs here have none.

`FLM_CONTINUITY=200 pytest tests/training/test_continuity.py` tells so many more stories, drawn by hypothesis.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.sources.source_data import SourceData
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.manager import BEST, states_of
from tests.conftest import NO_DROPOUT, ROOT
from tests.processes import launch_ranks
from tests.training.test_follow import put
from tests.training.test_follow_ids import die_at, one
from tests.training.test_warm_start import SMALL, part_of

STORIES = int(os.environ.get("FLM_CONTINUITY", "0"))
"""Stories that are drawn, beside one that is always told; of none, that one is short."""
JOB = str(ROOT / "tests" / "training" / "continuity_job.py")
MORE = 3
"""How often more data come; the first have no key that ends in 1, 2 or 3."""


@dataclass(frozen=True)
class Event:
    """Something that happens to a run."""

    what: str
    """prepare, warm, follow; again: it is started again with nothing new; or reshard."""
    killed_at: int = 0
    """The number of the write at which it is killed first; 0: it is not."""
    ranks: tuple[int, ...] = ()
    """For reshard."""

    @property
    def learns(self) -> bool:
        return self.what in ("prepare", "warm", "follow")


@dataclass
class Story:
    """A run, and what has happened to it."""

    folder: Path
    raw: SourceData
    run: Path
    day: int = 0
    live: bool = False
    """The run is one of 'flm follow'."""
    chunks: int = 0
    runs: int = 0
    command: tuple[str, ...] = ()
    """That the run is started again with."""

    def tell(self, event: Event) -> None:
        happen: Callable[[], int] = getattr(self, event.what)
        if event.what == "reshard":
            for count in event.ranks:
                launch_ranks(count, [JOB, *self.where_it_is()])
                assert storage.read_meta(states_of(self.run)[0])["ranks"] == count
            return
        with pytest.MonkeyPatch.context() as patch:
            self.begin(event.what)
            if event.killed_at:
                die_at(patch, event.killed_at, happen)
        assert happen() == 0, event

    def begin(self, what: str) -> None:
        """What the world does before the run does anything."""
        if what == "prepare":
            self.day = min(self.day + 1, MORE)
        if what == "warm":
            source, self.run, self.live = self.run, self.folder / f"run{self.runs}", False
            self.runs += 1
            self.command = ("train", "--train.warm_start", str(source), "--data.path", str(self.data))
            self.command += ("--train.run", str(self.run), "--train.max_steps", "2", "--train.checkpoint_every", "1")
            self.command += ("--train.existing", "resume")
        if what == "follow":
            if not self.live:
                source, self.run, self.live = self.run, self.folder / f"live{self.runs}", True
                self.runs += 1
                arriving = Path(f"{self.run}-source")
                arriving.mkdir()
                self.command = ("follow", "--run", str(source), "--source", str(arriving), "--output", str(self.run))
                self.command += ("--once",)
            put(Path(f"{self.run}-source") / f"{self.chunks:03d}.jsonl", new_events(self.chunks))
            self.chunks += 1

    @property
    def data(self) -> Path:
        return self.folder / f"day{self.day}"

    def where_it_is(self) -> tuple[str, ...]:
        return self.command if self.live else ("state", str(self.run))

    def prepare(self) -> int:
        gone = "0123"[self.day + 1 :]
        prepare(part_of(self.raw, lambda key: key[-1] in gone), self.data, PrepareOptions(), overwrite=True)
        return 0

    def warm(self) -> int:
        return main(list(self.command))

    follow = warm

    def again(self) -> int:
        return main(list(self.command)) if self.command else 0

    def reshard(self) -> int:
        raise NotImplementedError

    def knows(self) -> dict[str, Any]:
        """All that the run has learned, and from how much."""
        tensors = {f"state {n}": t for n, t in storage.read_all(states_of(self.run)[0]).items()}
        tensors |= {f"best {n}": t for n, t in storage.read_all(self.run / BEST).items()}
        found: dict[str, Any] = {n: t for n, t in tensors.items() if not n.startswith("state rng.")}
        for entity in ("user", "item"):
            found[entity] = pq.read_table(self.run / f"vocabulary/{entity}s.parquet").to_pylist()
        if self.live:
            report = json.loads((self.run / "follow.json").read_text())
            found["report"] = {name: report[name] for name in ("events", "parts", "growths", "refused")}
            lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
            found["losses"] = [{n: v for n, v in line.items() if n == "step" or "loss" in n} for line in lines]
        return found


def new_events(number: int) -> list[dict[str, Any]]:
    """Events of known users and items, and of a user and an item whom nobody has seen."""
    known = [one(f"u{n}", f"i{n + number}", 1000 * number + n) for n in (4, 5, 14, 15)]
    fresh = [one(f"ann{number}", "i4", 1000 * number + 50), one("u4", f"fresh{number}", 1000 * number + 51)]
    return [*known, *fresh, one(f"ann{number}", f"fresh{number}", 1000 * number + 52)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A run on the first data."""
    folder = tmp_path_factory.mktemp("world")
    raw = synthetic.read(synthetic.Recipe(users=60, items=100, events=8, seed=5))
    story = Story(folder, raw, folder / "run")
    story.prepare()
    data = ["--data.path", str(story.data), "--train.run", str(story.run), "--distributed.sharding", "row_wise"]
    assert main(["train", *data, *SMALL, *NO_DROPOUT, "--train.max_steps", "2"]) == 0
    return story


def told(world: Story, folder: Path, events: list[Event]) -> dict[str, Any]:
    folder.mkdir()
    for name in ("day0", "run"):
        shutil.copytree(world.folder / name, folder / name)
    story = Story(folder, world.raw, folder / "run")
    for event in events:
        story.tell(event)
    return story.knows()


def undisturbed(events: list[Event]) -> list[Event]:
    """What decides what the run learns. Data are prepared only before a warm start reads them."""
    plain: list[Event] = []
    waiting: list[Event] = []
    for event in (Event(event.what) for event in events if event.learns):
        if event.what == "prepare":
            waiting.append(event)
            continue
        if event.what == "warm":
            plain += waiting
            waiting = []
        plain.append(event)
    return plain


LEARNED = st.builds(Event, st.sampled_from(["prepare", "warm", "follow"]), st.integers(0, 40))
MOVED = st.builds(Event, st.just("reshard"), st.just(0), st.sampled_from([(2, 1), (2,), (4, 1), (2, 4, 1)]))
BEGUN = st.builds(Event, st.just("again"), st.integers(0, 40))
SHORT = [Event("follow", 9), Event("prepare"), Event("reshard", 0, (2, 1)), Event("warm", 14)]
LONG = [
    *(Event("follow", 9), Event("prepare", 3), Event("follow"), Event("reshard", 0, (2, 4, 1)), Event("follow", 17)),
    *(Event("warm", 14), Event("again", 5), Event("follow", 26)),
]


@settings(max_examples=max(1, STORIES), phases=[Phase.explicit] + [Phase.generate] * bool(STORIES))
@given(st.lists(LEARNED | MOVED | BEGUN, min_size=2, max_size=8))
@example(LONG if STORIES else SHORT)
def test_a_run_ends_in_the_same_bits_whatever_happens_to_it(
    world: Story, tmp_path_factory: pytest.TempPathFactory, events: list[Event]
) -> None:
    folder = tmp_path_factory.mktemp("stories")
    disturbed, plain = told(world, folder / "a", events), told(world, folder / "b", undisturbed(events))
    assert disturbed.keys() == plain.keys()
    for name, value in plain.items():
        same = torch.equal(value, disturbed[name]) if isinstance(value, torch.Tensor) else value == disturbed[name]
        assert same, name
    shutil.rmtree(folder)
