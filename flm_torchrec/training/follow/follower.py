"""Incremental training: new events as they come, each learned from once, whatever happens in between."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flm_torchrec.config import Config
from flm_torchrec.data.admission import MOST_COUNTED, Admission
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.loader import Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.sketch import Sketches
from flm_torchrec.data.vocabulary import ENTITIES, RowMatch
from flm_torchrec.errors import ConfigError, Interrupted, RunError
from flm_torchrec.files import ANOTHER, mend_inside, replacing_file, telling, write_text
from flm_torchrec.folders import CONFIG
from flm_torchrec.training.build import make_model
from flm_torchrec.training.by_key import know_learned
from flm_torchrec.training.checkpoint.by_key import table_weights
from flm_torchrec.training.checkpoint.manager import BEST, Checkpoints, Progress, load_checkpoint, states_of
from flm_torchrec.training.checkpoint.storage import read_meta
from flm_torchrec.training.follow.events import EXAMPLES, LEARNED, EventEncoder, RowForm, fields_of, new_windows
from flm_torchrec.training.follow.growth import (
    event_table,
    part_file,
    publish_vocabulary,
    read_events,
    user_table,
    with_growth,
    write_growth,
)
from flm_torchrec.training.follow.histories import Histories
from flm_torchrec.training.follow.ids import IdIntake
from flm_torchrec.training.follow.item_file import ItemFeed, ItemFile
from flm_torchrec.training.follow.item_rows import ItemRows, is_bare
from flm_torchrec.training.follow.row_rules import RowRules
from flm_torchrec.training.follow.sources import Chunk, EventSource, open_source
from flm_torchrec.training.guard import NON_FINITE, Guard
from flm_torchrec.training.identity import open_run
from flm_torchrec.training.job import Job, JobInputs, open_inputs
from flm_torchrec.training.loaders import drawn_share, weights_of
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.run_events import ANY_RANKS, IN_MEMORY, load_data
from flm_torchrec.training.run_folder import claimed, open_run_folder
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import STEPS
from flm_torchrec.training.trackers import check_trackers
from flm_torchrec.training.trainer import resume

RATE = 0.1
"""Learning rates, as a share of those that the run began with: at its end they were 0."""
ENDLESS = 2**40
"""Steps over which the rates would fall: so many that they stay the same."""
PAUSE = 2.0
"""Seconds before a source that has nothing new is asked again."""
REPORT = "follow.json"


@dataclass(frozen=True)
class FollowOptions:
    """What `flm follow` is asked for beside run, source and output."""

    form: RowForm
    """How the source writes its rows."""
    once: bool = False
    """End when there is nothing new, rather than wait."""
    admit_after: int = 1
    """Sightings after which an unknown user, or an item without features, comes in; 0: unknown ids are refused."""
    expire_after: int = 0
    """Days without an event after which an id expires; 0: never."""
    items: Path | None = None
    """File that describes items."""
    avro_schema: str = ""
    """Files of the schemas of a topic's messages, as of `AvroMessages.of`; empty: they are JSON."""

    def __post_init__(self) -> None:
        if not 0 <= self.admit_after <= MOST_COUNTED:
            raise ConfigError(f"--admit-after {self.admit_after}: give 0 … {MOST_COUNTED}")
        if not 0 <= self.expire_after <= 36_500:
            raise ConfigError(f"--expire-after {self.expire_after}: give days, 0 … 36500")
        if self.items is not None and not self.admit_after:
            raise ConfigError("--items: new items come in, and --admit-after 0 refuses them; leave out one of the two")

    def feed(self, intake: IdIntake | None) -> ItemFeed | None:
        """The item file, as the follower reads it."""
        if self.items is None or intake is None:
            return None
        return ItemFeed(ItemFile(self.items, self.form.columns.get("item", "item")), intake.rows)

    @property
    def lasting(self) -> dict[str, int]:
        """The options that an output keeps."""
        return {"admit_after": self.admit_after, "expire_after": self.expire_after}


def follow(run: Path, url: str, output: Path, options: FollowOptions, overrides: Sequence[str] = ()) -> dict[str, int]:
    """Train a run's best model further on a source's events, into a run folder of its own; collective.

    The checkpoint after a chunk makes its events, its new users and items, its counts and the source's position final.
    So a follower that was killed resumes behind its last complete chunk, and ends in the same weights. Each chunk is
    learned from once, in the windows that hold its events. What the run held out stays held out.

    Args:
        overrides: of the run's config: `data.path`, where its data are now.

    Returns the counts of `_Follower.totals`.

    Raises:
        FlmError: run, source, item file or folder is wrong.
        Interrupted: asked to stop by SIGTERM or Ctrl-C; the state is saved.
    """
    config = _config_of(run, output, overrides)
    options.form.check(run / "vocabulary")
    source = open_source(url, options.avro_schema)
    given = {"source": url, **{k: str(v) for k, v in asdict(options).items()}}
    with open_inputs(config, load_data(config, on_disk=True), run, given) as inputs:
        comm = inputs.comm
        if options.expire_after and not inputs.data.schema.timestamps:
            raise ConfigError(f"--expire-after: {inputs.data.path} has no timestamps; leave it out")
        if inputs.data.schema.domains:
            raise ConfigError(
                f"{inputs.data.path}: is joint data, whose new items would have no domain; join the new data, and go on"
                " with flm train --train.warm_start"
            )
        with claimed(output, comm, ANOTHER):
            intake = _intake(options, inputs.data, output)
            row_rules = RowRules.of(inputs.data, inputs.events.splits)
            encoder = EventEncoder(run / "vocabulary", options.form, intake, inputs.data.schema, row_rules)
            new_items = options.feed(intake)
            if new_items is not None:
                new_items.check()  # what cannot be read is refused before anything is written
            job = Job(replace(inputs, config=_slower(config)))
            load_checkpoint(run / BEST, job.model, comm)
            know_learned(job)
            guard = Guard(comm, "stop", output / NON_FINITE)
            first = comm.on_main(lambda: _first(source, output))
            encoder.check_users(first.rows if first else [])
            with open_run_folder(config, inputs.data, comm, 0) as logger, guard:
                follower = _Follower(job, logger, guard, encoder, options)
                del job
                follower.resume(source)
                follower.take_all(source, new_items, first)
                return follower.totals()


def _config_of(run: Path, output: Path, overrides: Sequence[str]) -> Config:
    if run.resolve() == output.resolve():
        raise RunError(f"{output}: is the run itself; give another --output")
    config = open_run(run, [*ANY_RANKS, IN_MEMORY, "train.existing=resume", *overrides])
    if config.finetune.source:
        raise RunError(f"{run}: is a fine-tuning; follow the run that it came from")
    check_trackers(config.train.trackers)
    if read_meta(run / BEST).get("taken", {}).get("growths"):
        raise RunError(
            f"{run}: followed a run and took in users and items, which its data lack; follow the run that it came from,"
            f" with --output {run}, or prepare the data again and train with --train.warm_start {run}"
        )
    return replace(config, train=replace(config.train, run=str(output)))


def _first(source: EventSource, output: Path) -> Chunk | None:
    """The first chunk for a new output, so that a source that cannot be read leaves no folder behind; else None."""
    return None if (output / CONFIG).is_file() else source.after(source.resume({}))


def _slower(config: Config) -> Config:
    """The config with the rates of a follower. The run folder keeps those of the run, for what goes on from it."""
    rates = {name: RATE * getattr(config.train, name) for name in ("dense_lr", "sparse_lr")}
    return replace(config, train=replace(config.train, **rates))


def _intake(options: FollowOptions, data: PreparedData, output: Path) -> IdIntake | None:
    if not options.admit_after:
        return None
    reserved = [options.form.columns.get(field, field) for field in fields_of(data.schema)]
    return IdIntake(Admission(options.admit_after), ItemRows(data.path, output / "vocabulary"), reserved)


class _Follower:
    """The model, the newest events of each user, and what has been taken from the source."""

    def __init__(
        self, job: Job, logger: RunLogger, guard: Guard, encoder: EventEncoder, options: FollowOptions
    ) -> None:
        self.job = job
        self.comm = job.comm
        self.config = job.config
        self.base = job.data
        self.logger = logger
        self.guard = guard
        self.folder = Path(job.config.train.run)
        self.encoder = encoder
        self.options = options
        self.checkpoints = Checkpoints(self.folder, job.model, job.optimizer, job.comm, job.data.fingerprint)
        self.checkpoints.fit = self._fit
        if encoder.intake is not None and options.admit_after > 1:
            state = encoder.intake.admission.state()
            self.checkpoints.beside = {f"admission.{name}": torch.from_numpy(array) for name, array in state.items()}
        self.schedule = Schedule(job.optimizer, 0, ENDLESS)
        self.progress = Progress(following={"source": {}, "parts": 0, "events": 0, "refused": {}, "growths": 0})
        self.progress.following["options"] = options.lasting
        # A window may have max_history old events before the new ones, and the first of the old ones needs a gap.
        keep = job.config.data.max_history + 2
        self.histories = Histories(job, keep, options.expire_after)
        self.published = 0
        """Files of new users and items that the folder's vocabulary has."""
        if self.comm.world_size > 1:
            torch.manual_seed(job.config.train.seed + self.comm.rank)  # dropout, which each rank draws for itself

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
        state["source"] = self.comm.on_main(lambda: source.resume(state["source"]))
        self._log_messages(source)
        self.checkpoints.check_space()
        self.comm.on_main(self._make_folder)
        for number in range(state["parts"]):
            self.histories.append(read_events(self.folder / LEARNED, number))
            self.histories.expire()
        self._save()

    def take_all(self, source: EventSource, new_items: ItemFeed | None, first: Chunk | None) -> None:
        """Learn from chunk after chunk.

        Args:
            first: a chunk that was read already.

        Raises:
            Interrupted: asked to stop; the state is saved.
            DataError: the source cannot be read.
        """
        while not self.comm.any(self.guard.asked)[0]:
            if new_items is not None:
                self._take_items(new_items)
            chunk = first or self.comm.on_main(lambda: source.after(self.progress.following["source"]))
            first = None
            self._log_messages(source)
            if chunk is not None:
                self._take(chunk)
            elif self.options.once:
                return
            else:
                time.sleep(PAUSE)
        raise Interrupted(f"stopped as asked after step {self.progress.step}, all saved; start it again to go on")

    def totals(self) -> dict[str, int]:
        """Events learned from, rows refused, new users and items, and values left out, since the folder was made.

        Likewise `changed`, known items that have other features in the item file as it is now.
        """
        state, ids, schema = self.progress.following, self.encoder.ids, self.base.schema
        return {
            "events": state["events"],
            "refused": sum(entry["rows"] for entry in state["refused"].values()),
            "users": len(ids.user) - schema.users,
            "items": len(ids.item) - schema.items,
            "left_out": state.get("left_out", {"values": 0})["values"],
            "changed": state.get("changed", {"items": 0})["items"],
        }

    def _make_folder(self) -> None:
        with telling(self.folder):
            (self.folder / LEARNED).mkdir(exist_ok=True)
            mend_inside(self.folder / LEARNED)

    def _log_messages(self, source: EventSource | ItemFeed) -> None:
        for line in source.messages:
            self.logger.say(line)
        source.messages.clear()

    def _take_items(self, new_items: ItemFeed) -> None:
        """Take in the items of the item file, and save the state after it."""
        news = self.comm.on_main(new_items.read)
        self._log_messages(new_items)
        if news is None:
            return
        self._count_changed(news.changed)
        ids = self.encoder.ids
        for key, row in news.new:
            ids.add_item(key, row)
        ids.described += news.described
        if ids.new_items or ids.described:
            told = f"{self.options.items}: {len(ids.new_items)} new items"
            told += f", and features of {len(ids.described)} that had none" if ids.described else ""
            before = self.histories.data.schema.users, self.histories.data.schema.items
            self._count_left_out(str(self.options.items), news.left_out)
            self._grow()
            self._load_rows(before, {})
            self._save()
            self.logger.say(told)

    def _tell_bare(self, where: str) -> None:
        """Tell which items come in without features, before their rows in the item file."""
        bare = [key for key, row in self.encoder.ids.new_items if is_bare(row)]
        if bare and self.options.items:
            self.logger.say(
                f"{where}: {len(bare)} new items have no row in {self.options.items} yet, such as '{bare[0]}', and so"
                " no features until it comes"
            )

    def _count_changed(self, lines: list[str]) -> None:
        """Record and tell which known items have other features in the item file: they keep those that were learnt."""
        state = self.progress.following
        found = {"items": len(lines), "examples": lines[:EXAMPLES]}
        if found == state.get("changed", {"items": 0, "examples": []}):
            return
        state["changed"] = found
        self.comm.on_main(self._write_report)
        if lines:
            self.logger.say(
                f"{self.options.items}: {len(lines)} items have other features than the run knows, which it keeps, such"
                f" as {lines[0]}; to learn them, prepare the data again and train with --train.warm_start {self.folder}"
            )

    def _count_left_out(self, where: str, lines: list[str]) -> None:
        """Count and tell values of new items that have no row: tables of features do not grow."""
        if not lines:
            return
        counted = self.progress.following.setdefault("left_out", {"values": 0, "examples": []})
        counted["values"] += len(lines)
        counted["examples"] = list(dict.fromkeys([*counted["examples"], *lines]))[:EXAMPLES]
        self.logger.say(
            f"{where}: {len(lines)} values of features have no row and are left out, such as {lines[0]}; to learn them,"
            f" prepare the data again and train with --train.warm_start {self.folder}"
        )

    def _take(self, chunk: Chunk) -> None:
        """Learn from a chunk, and save the state after it."""
        state = self.progress.following
        new = self.encoder.encode(chunk.rows, state["refused"], self.histories.data)
        self._count_left_out(chunk.name, self.encoder.ids.left_out)
        self.encoder.ids.left_out = []
        self._tell_bare(chunk.name)
        if len(new):
            before = self.histories.data.schema.users, self.histories.data.schema.items
            grew = self._grow()
            table = event_table(new, self.base.schema)
            self.comm.on_main(lambda: self._write_part(table, state["parts"]))
            is_new, gone = self.histories.append(new), self.histories.expire()
            if grew or any(len(ids) for ids in gone.values()):
                self._load_rows(before, gone)
            self.guard.remedy = (
                f"nothing of {chunk.name} is learnt, and all before it is saved; mend or remove its events and start"
                " again, or prepare the data again and train with lower rates:"
                f" 'flm train --train.warm_start {self.folder}' with --train.dense_lr and --train.sparse_lr"
            )
            self._train(self._loader(is_new), state["parts"])
            state["parts"] += 1
        state["events"] += len(new)
        state["source"] = chunk.position
        self._save()
        if chunk.rows:
            self.logger.say(f"{chunk.name}: {len(new)} of {len(chunk.rows)} rows, to step {self.progress.step}")

    def _write_part(self, table: pa.Table, number: int) -> None:
        with telling(self.folder), replacing_file(part_file(self.folder / LEARNED, "part", number)) as fresh:
            pq.write_table(table, fresh)

    def _fit(self, progress: Progress) -> None:
        """Build the model in the sizes of a state, before the state is loaded.

        Raises:
            ConfigError: the state began with other options.
        """
        state = progress.following
        for name, value in state.setdefault("options", self.options.lasting).items():
            if value != self.options.lasting[name]:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{self.folder}: began with {option} {value}; give that again, or another --output")
        if not state.setdefault("growths", 0):
            return
        grown = with_growth(self.base, self.folder / LEARNED, state["growths"])
        self._build(grown)
        ids = self.encoder.ids
        for number in range(state["growths"]):
            for entity, add in (("user", ids.add_user), ("item", lambda key: ids.add_item(key, {}))):
                file = part_file(self.folder / LEARNED, entity, number)
                for key in pq.read_table(file, columns=[f"{entity}_key"])[f"{entity}_key"].to_pylist():
                    add(key)
        ids.settle()

    def _grow(self) -> bool:
        """Give the model rows for the users and items that came in, and features that came later.

        Returns whether there were any; `_load_rows` fills the rows.
        """
        ids, state = self.encoder.ids, self.progress.following
        if not (ids.new_users or ids.new_items or ids.described):
            return False
        assert self.encoder.intake is not None
        columns = pq.read_schema(self.base.path / "users.parquet")
        users = user_table(columns, len(ids.user) - len(ids.new_users), ids.new_users)
        rows = self.encoder.intake.rows
        items = rows.table(range(len(ids.item) - len(ids.new_items), len(ids.item)), ids.new_items)
        described = rows.table([ids.item[key] for key, _ in ids.described], ids.described)
        counts = {"without_features": sum(is_bare(row) for _, row in ids.new_items), "described": len(described)}
        for name, count in counts.items():
            state[name] = state.get(name, 0) + count
        with telling(self.folder):
            self.comm.on_main(lambda: write_growth(self.folder / LEARNED, state["growths"], users, items, described))
        state["growths"] += 1
        ids.settle()
        self._build(with_growth(self.base, self.folder / LEARNED, state["growths"]))
        return True

    def _build(self, grown: PreparedData) -> None:
        """A new model for the users and items of the grown data, without weights."""
        self.histories.take_in(grown)
        del self.job, self.checkpoints.model, self.checkpoints.optimizer, self.schedule  # their memory, before the new
        cuda = [self.comm.device] if self.comm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            self.job = Job(JobInputs.of(self.config, grown, self.comm))
        self.checkpoints.model, self.checkpoints.optimizer = self.job.model, self.job.optimizer
        self.schedule = Schedule(self.job.optimizer, 0, ENDLESS)

    def _load_rows(self, before: tuple[int, int], gone: dict[str, np.ndarray]) -> None:
        """Load the newest state: rows of new ids, and of those that expire, are zero in tables and optimizer.

        A zero row of an item leaves its content alone, so a new item begins with the score of a cold one.

        Args:
            before: users and items of the state.
            gone: by "user" and "item", ids that expire.
        """
        schema = self.job.data.schema
        sizes = {"user": (before[0], schema.users), "item": (before[1], schema.items)}
        matches = {}
        with torch.random.fork_rng(devices=[]):
            model = make_model(schema, self.config, self.comm)
        for weight, table, looked_up in table_weights(model):
            entity = ENTITIES.get(looked_up[0])
            if entity is None or schema.table(table).kind != "direct":
                continue
            old, new = sizes[entity]
            origin = np.where(np.arange(new) < old, np.arange(new), -1)
            origin[gone.get(entity, np.zeros(0, np.int64))] = -1
            matches[weight] = RowMatch(origin, old, new - old, 0)
        self.checkpoints.load_by_key(states_of(self.folder)[0], matches)

    def _loader(self, is_new: np.ndarray) -> TrainLoader:
        config, known, comm = self.config, self.histories, self.comm
        return TrainLoader(
            new_windows(known.data, is_new, config.data.max_history),
            Assembler(
                known.data,
                known.learnable,
                known.train_stats,
                kind_weights=weights_of(known.data, config),
                sketches=Sketches(known.data, config.model.dim),
            ),
            Negatives(known.counts, config.loss.negatives, config.loss.negative_power, drawn_share(config, comm)),
            Sharing(config.train.batch_size, config.train.seed, comm.rank, comm.world_size),
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
        shares = self.comm.gather(dict(losses))  # of each rank
        self.logger.scalars(self.progress.step, {name: sum(share[name] for share in shares) for name in losses})

    def _save(self) -> None:
        """Save the state to resume from; then what others read: the vocabulary, the model and the report."""
        state = self.progress.following
        self.checkpoints.save(self.progress)
        self.checkpoints.finish()
        if state["growths"] != self.published:
            with telling(self.folder):
                learned, vocabulary = self.folder / LEARNED, self.folder / "vocabulary"
                self.comm.on_main(lambda: publish_vocabulary(self.base.path, learned, state["growths"], vocabulary))
            self.published = state["growths"]
        taken = {"parts": state["parts"], "growths": state["growths"], "expire_after": self.options.expire_after}
        self.checkpoints.save_best({"step": self.progress.step, "taken": taken})
        self.comm.on_main(self._write_report)

    def _write_report(self) -> None:
        with telling(self.folder):
            write_text(self.folder / REPORT, json.dumps(self.progress.following, indent=2))
