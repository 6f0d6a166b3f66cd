"""Incremental training: new events as they come, each learned from once, whatever happens in between."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.config import Config
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.loader import Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.errors import Interrupted, RunError
from flm_torchrec.files import ANOTHER, mend_inside, replacing_file, telling, write_text
from flm_torchrec.training.checkpoint.manager import BEST, Checkpoints, Progress, load_checkpoint
from flm_torchrec.training.follow.events import (
    FIELDS,
    LEARNED,
    EventEncoder,
    NewEvents,
    RowForm,
    append,
    new_windows,
    newest,
)
from flm_torchrec.training.follow.sources import Chunk, EventSource, open_source
from flm_torchrec.training.guard import NON_FINITE, Guard
from flm_torchrec.training.identity import open_run
from flm_torchrec.training.job import Job, open_inputs
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.run_events import ANY_RANKS, IN_MEMORY
from flm_torchrec.training.run_folder import claimed, open_run_folder
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS
from flm_torchrec.training.trainer import resume

RATE = 0.1
"""Learning rates, as a share of those that the run began with: at its end they were 0."""
ENDLESS = 2**40
"""Steps over which the rates would fall: so many that they stay the same."""
PAUSE = 2.0
"""Seconds before a source that has nothing new is asked again."""
REPORT = "follow.json"


def follow(
    run: Path, url: str, output: Path, form: RowForm, once: bool, overrides: Sequence[str] = ()
) -> dict[str, int]:
    """Train a run's best model further on a source's events, into a run folder of its own.

    The checkpoint after a chunk makes its events, its counts and the source's position final. So a follower that was
    killed resumes behind its last complete chunk, and ends in the same weights. Each chunk is learned from once, in
    the windows that hold its events. What the run held out stays held out.

    Args:
        form: how the source writes its rows.
        once: end when there is nothing new, rather than wait.
        overrides: of the run's config: `data.path`, where its data are now.

    Returns the number of events learned from and of rows refused, since the folder was made.

    Raises:
        FlmError: run, source or folder is wrong.
        Interrupted: asked to stop by SIGTERM or Ctrl-C; the state is saved.
    """
    config = _config_of(run, output, overrides)
    source = open_source(url)
    with open_inputs(config) as inputs:
        comm = inputs.comm
        if comm.world_size > 1:
            raise RunError("flm follow: runs as one process; start it without torchrun")
        with claimed(output, comm, ANOTHER):
            job = Job(inputs)
            load_checkpoint(run / BEST, job.model, comm)
            encoder = EventEncoder(run / "vocabulary", form)
            guard = Guard(comm, "stop", output / NON_FINITE)
            with open_run_folder(config, inputs.data, comm, 0) as logger, guard:
                follower = _Follower(job, logger, guard, encoder)
                follower.resume(source)
                follower.take_all(source, once)
                return follower.totals()


def _config_of(run: Path, output: Path, overrides: Sequence[str]) -> Config:
    if run.resolve() == output.resolve():
        raise RunError(f"{output}: is the run itself; give another --output")
    config = open_run(run, [*ANY_RANKS, IN_MEMORY, "train.existing=resume", *overrides])
    if config.finetune.source:
        raise RunError(f"{run}: is a fine-tuning; follow the run that it came from")
    rates = {name: RATE * getattr(config.train, name) for name in ("dense_lr", "sparse_lr")}
    return replace(config, train=replace(config.train, run=str(output), **rates))


class _Follower:
    """The model, the newest events of each user, and what has been taken from the source."""

    def __init__(self, job: Job, logger: RunLogger, guard: Guard, encoder: EventEncoder) -> None:
        self.job = job
        self.logger = logger
        self.guard = guard
        self.folder = Path(job.config.train.run)
        self.encoder = encoder
        self.checkpoints = Checkpoints(self.folder, job.model, job.optimizer, job.comm, job.data.fingerprint)
        self.schedule = Schedule(job.optimizer, 0, ENDLESS)
        self.progress = Progress(following={"source": {}, "parts": 0, "events": 0, "refused": {}})
        self.data, self.learned_from = job.data, job.events.learned_from
        self.counts = np.bincount(self.data.item[self.learned_from], minlength=self.data.schema.items)
        self.train_stats = TrainStats.of(self.data, job.events.seen, values=True)

    def resume(self, source: EventSource) -> None:
        """Load the newest checkpoint, and the source's position in it.

        Raises:
            FlmError: the folder is that of another kind of run or of another source, or the disk is too small.
        """
        if self.logger.resumed:
            progress = resume(self.checkpoints, self.logger)
            if progress.step and not progress.following:
                raise RunError(f"{self.folder}: no 'flm follow' made it; give another --output")
            self.progress = progress if progress.following else self.progress
        state = self.progress.following
        state["source"] = source.resume(state["source"])
        self._log_messages(source)
        self.checkpoints.check_space()
        with telling(self.folder):
            (self.folder / LEARNED).mkdir(exist_ok=True)
            mend_inside(self.folder / LEARNED)
        for number in range(state["parts"]):
            table = pq.read_table(self._part(number))
            self._append(NewEvents(**{name: table[name].to_numpy() for name in FIELDS}))
        self._save()

    def take_all(self, source: EventSource, once: bool) -> None:
        """Learn from chunk after chunk.

        Raises:
            Interrupted: asked to stop; the state is saved.
            DataError: the source cannot be read.
        """
        while not self.guard.asked:
            chunk = source.after(self.progress.following["source"])
            self._log_messages(source)
            if chunk is not None:
                self._take(chunk)
            elif once:
                return
            else:
                time.sleep(PAUSE)
        raise Interrupted(f"stopped as asked after step {self.progress.step}, all saved; start it again to go on")

    def totals(self) -> dict[str, int]:
        """The number of events learned from and of rows refused, since the folder was made."""
        state = self.progress.following
        return {"events": state["events"], "refused": sum(entry["rows"] for entry in state["refused"].values())}

    def _log_messages(self, source: EventSource) -> None:
        for line in source.messages:
            self.logger.say(line)
        source.messages.clear()

    def _take(self, chunk: Chunk) -> None:
        """Learn from a chunk, and save the state after it."""
        state = self.progress.following
        new = self.encoder.encode(chunk.rows, state["refused"])
        if len(new):
            with telling(self.folder), replacing_file(self._part(state["parts"])) as fresh:
                pq.write_table(pa.table({name: getattr(new, name) for name in FIELDS}), fresh)
            self._train(self._loader(self._append(new)), state["parts"])
            state["parts"] += 1
        state["events"] += len(new)
        state["source"] = chunk.position
        self._save()
        if chunk.rows:
            self.logger.say(f"{chunk.name}: {len(new)} of {len(chunk.rows)} rows, to step {self.progress.step}")

    def _append(self, new: NewEvents) -> np.ndarray:
        """Add events to the histories, of which only the end is kept → [interactions] bool: which are new."""
        # A window may have max_history old events before the new ones, and the first of the old ones needs a gap.
        data, learned_from = newest(self.data, self.learned_from, self.job.config.data.max_history + 2)
        self.data, self.learned_from, is_new = append(data, learned_from, new)
        np.add.at(self.counts, new.item, 1)
        self.train_stats.items[new.item] = 1.0
        self.train_stats.users[new.user] = 1.0
        return is_new

    def _loader(self, is_new: np.ndarray) -> TrainLoader:
        config = self.job.config
        return TrainLoader(
            new_windows(self.data, is_new, config.data.max_history),
            Assembler(self.data, self.learned_from, self.train_stats),
            Negatives(self.counts, config.loss.negatives, config.loss.negative_power),
            Sharing(config.train.batch_size, config.train.seed),
        )

    def _train(self, loader: TrainLoader, number: int) -> None:
        """One epoch, whose order the number of the chunk sets."""
        job, batches = self.job, loader.epoch(number)
        losses: Counter[str] = Counter()
        job.model.train()
        steps = STEPS[job.comm.device.type](job.model, job.optimizer, self.schedule, job.comm.device, self.guard)
        for _ in range(len(loader)):
            outputs = steps.take(batches, self.progress.step)
            self.progress.step += 1
            if outputs is not None:
                losses.update({f"loss/{name}": float(loss) / len(loader) for name, loss in outputs.losses.items()})
        steps.release()
        self.logger.scalars(self.progress.step, dict(losses))

    def _save(self) -> None:
        """Save the state to resume from; then what others read, the model and the report."""
        self.checkpoints.save(self.progress)
        self.checkpoints.finish()
        self.checkpoints.save_best({"step": self.progress.step})
        with telling(self.folder):
            write_text(self.folder / REPORT, json.dumps(self.progress.following, indent=2))

    def _part(self, number: int) -> Path:
        return self.folder / LEARNED / f"part-{number:06d}.parquet"
