"""Warm start: each row follows its key, what is new begins from its content, what does not fit is refused in a line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.hashing import remap_ids
from flm_torchrec.data.schema import Table
from flm_torchrec.data.vocabulary import RowKeys, match_rows
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.model.tables import ITEM_TABLES
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.sources.source_data import SourceData
from flm_torchrec.training import warm_start
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.manager import Checkpoints, states_of
from flm_torchrec.training.follow import follower
from flm_torchrec.training.follow.events import NewEvents
from flm_torchrec.training.follow.histories import Histories
from flm_torchrec.training.guard import Guard
from flm_torchrec.training.job import Job, open_job
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.restore import restore
from flm_torchrec.training.schedule import Schedule
from flm_torchrec.training.steps import PlainSteps
from flm_torchrec.training.warm_start import WarmStart, warm_config
from tests.conftest import NO_DROPOUT, ROOT, rows_of

SMALL = ["--model.dim", "8", "--model.layers", "1", "--train.batch_size", "16", "--data.max_history", "6"]
SMALL += ["--train.max_steps", "8", "--eval.ks", "[10]", "--distributed.threads", "1", "--loss.negatives", "all"]


def part_of(raw: SourceData, leaves_out: Callable[[str], bool]) -> SourceData:
    """A source without the users and items of some keys."""
    events = rows_of(raw)
    keys = {name: [key for key in events[name].unique() if not leaves_out(key)] for name in ("user", "item")}
    kept = events.filter(pl.col("user").is_in(keys["user"]) & pl.col("item").is_in(keys["item"]))
    return replace(raw, interactions=kept, oracle=None)


@dataclass(frozen=True)
class Days:
    raw: SourceData
    """Of today."""
    folder: Path

    @property
    def today(self) -> Path:
        return self.folder / "today"

    @property
    def run(self) -> Path:
        """Trained on the data of yesterday."""
        return self.folder / "run"

    def prepared(self, folder: Path, raw: SourceData | None = None, secret: bytes = b"", **options: object) -> Path:
        prepare(raw or self.raw, folder, PrepareOptions(**options), secret=secret)  # type: ignore[arg-type]
        return folder


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    """A run of yesterday, and today's data: of each ten users and items one has come, and one has gone."""
    folder = tmp_path_factory.mktemp("days")
    raw = synthetic.read(synthetic.Recipe(users=60, items=100, events=10, seed=3))
    found = Days(part_of(raw, lambda key: key.endswith("2")), folder)
    found.prepared(folder / "yesterday", part_of(raw, lambda key: key.endswith("1")))
    found.prepared(found.today)
    data = ["--data.path", str(folder / "yesterday"), "--train.run", str(found.run)]
    assert main(["train", *data, *SMALL, *NO_DROPOUT]) == 0
    return found


def warm(days: Days, run: Path, *options: str) -> int:
    return main(["train", "--train.warm_start", str(days.run), "--train.run", str(run), *options])


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the newest state, but for those of random numbers."""
    return {n: t for n, t in storage.read_all(states_of(run)[0]).items() if not n.startswith("rng.")}


def keys(folder: Path, table: str) -> list[str]:
    """The key of each row of a table."""
    entity = "item" if table in ITEM_TABLES else table.removesuffix("_id")
    if entity in ("user", "item"):
        return pl.read_parquet(folder / f"{entity}s.parquet").sort(f"{entity}_id")[f"{entity}_key"].to_list()
    return pl.read_parquet(folder / "vocab" / f"{table}.parquet").sort("code")["value"].to_list()


def check_rows(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], days: Days) -> None:
    """Each row of a table that has keys is that of its key, and so is its optimizer state; what is new is zero.

    Rows that never learned, whose optimizer state is zero, begin from zero too.
    """
    assert before.keys() == after.keys()
    seen = set()
    for name, old in before.items():
        weight = name.removeprefix("model.")
        sums = [t for n, t in before.items() if n.startswith(f"optimizer.tables.{weight}.")]
        old = old * (sums[0] > 0).unsqueeze(1) if sums else old
        table = next((t for t in ("user_id", *ITEM_TABLES, "item_genre", "item_brand") if f".{t}.weight" in name), "")
        if not table:
            assert torch.equal(old, after[name]), name
            continue
        rows = {key: row for row, key in enumerate(keys(days.run / "vocabulary", table))}
        places = [rows.get(key, -1) for key in keys(days.today, table)]
        expected = torch.stack([old[row] if row >= 0 else torch.zeros_like(old[0]) for row in places])
        assert torch.equal(expected, after[name]), name
        assert (table not in ("user_id", "item_id")) or 0 < places.count(-1) < len(places)
        seen.add((table, name.split(".")[0]))
    assert len(seen) == 14


def started(job: Job, run: Path) -> Checkpoints:
    checkpoints = Checkpoints(run, job.model, job.optimizer, job.comm, job.data.fingerprint)
    with RunLogger(None, 0) as logger:
        WarmStart.of(job).load(job, checkpoints, logger)
    return checkpoints


def config_of(days: Days, run: Path, data: Path, *overrides: str):  # type: ignore[no-untyped-def]
    given = [f"train.warm_start={days.run}", f"train.run={run}", f"data.path={data}"]
    return warm_config(days.run, [*given, *overrides])


@pytest.mark.parametrize(("count", "sharding"), [(1, "auto"), (2, "table_wise"), (2, "row_wise")])
def test_weights_and_optimizer_state_follow_their_keys(  # type: ignore[no-untyped-def]
    ranks, days: Days, tmp_path: Path, count: int, sharding: str
) -> None:
    job = [str(ROOT / "tests" / "training" / "warm_job.py"), str(tmp_path / "saved"), str(days.run)]
    ranks(count, [*job, f"data.path={days.today}", f"distributed.sharding={sharding}"])
    check_rows(weights(days.run), weights(tmp_path / "saved"), days)


def test_what_is_new_begins_from_its_content_and_from_no_user(days: Days, tmp_path: Path) -> None:
    with open_job(config_of(days, tmp_path / "run", days.today)) as job:
        started(job, tmp_path / "run")
        old_items, old_users = (set(keys(days.run / "vocabulary", name)) for name in ("item_id", "user_id"))
        fresh = np.array([key not in old_items for key in job.data.item_keys])
        stats = job.train_stats
        learnt = stats.items > 0
        assert (fresh & learnt).sum() > 3
        views = job.encoder(job.events.splits.valid).views(np.arange(job.data.schema.items))
        apart = (views["all"] - views["content"]).abs().max(dim=1).values.numpy()
        assert apart[fresh].max() < 1e-6 and np.quantile(apart[learnt & ~fresh], 0.2) > 1e-3
        users = np.flatnonzero([key not in old_users for key in job.data.user_keys])
        rows = np.flatnonzero(np.isin(job.events.splits.valid.user, users))
        assert len(rows) and stats.users[users].all()
        as_they_are = job.encoder(job.events.splits.valid).users(rows)
        stats.users[users] = 0.0  # as if nobody knew them
        unknown = job.encoder(job.events.splits.valid).users(rows)
        for name, vectors in as_they_are.items():
            torch.testing.assert_close(vectors, unknown[name], rtol=0, atol=1e-6)


def test_who_was_known_stays_known_though_today_has_no_event_of_it(days: Days, tmp_path: Path) -> None:
    """Today's catalogue has every item, today's events have few."""
    few = part_of(days.raw, lambda key: key[0] == "i" and key[-1] in "013")
    data = days.prepared(tmp_path / "data", few, keep_unseen_items=True)
    assert warm(days, tmp_path / "run", "--data.path", str(data)) == 0
    sums = weights(days.run)["optimizer.tables.item_id.embeddings.item_id.weight.item_id.momentum1"]
    learned = {key for key, total in zip(keys(days.run / "vocabulary", "item_id"), sums, strict=True) if total > 0}
    with restore(tmp_path / "run") as restored:
        job = restored.job
        all_keys = np.array(job.data.item_keys)
        learned |= set(all_keys[job.data.item[:][job.events.seen[:]]])
        known = job.train_stats.items > 0
        assert set(all_keys[known]) == learned
        quiet = np.setdiff1d(np.arange(len(all_keys)), job.data.item[:])
        assert known[quiet].any() and not known[quiet].all()
        views = job.encoder(job.events.splits.valid).views(quiet)
        apart = (views["all"] - views["content"]).abs().max(dim=1).values.numpy()
        assert ((apart > 1e-4) == known[quiet]).all()


def test_a_row_that_never_learned_begins_from_nothing(days: Days, tmp_path: Path) -> None:
    short = Days(days.raw, tmp_path)
    data = ["--data.path", str(days.folder / "yesterday"), "--train.run", str(short.run)]
    assert main(["train", *data, *SMALL, *NO_DROPOUT, "--train.max_steps", "2"]) == 0
    with open_job(config_of(short, tmp_path / "next", days.today)) as job:
        started(job, tmp_path / "next")
        name = "users.embedding_bags.user_id.weight"
        weight = job.model.state_dict()[name].local_shards()[0].tensor
        state = job.optimizer.state_dict()["state"][f"tables.{name}"]
        never = next(iter(state.values())).local_shards()[0].tensor == 0
        old = set(keys(short.run / "vocabulary", "user_id"))
        assert sum(key in old for key, unlearned in zip(job.data.user_keys, never, strict=True) if unlearned) > 3
        assert not weight[never].any() and weight[~never].any(dim=1).all()


def losses(job: Job, steps: int) -> list[list[float]]:
    """Losses of the next steps, at full learning rates."""
    found = []
    with Guard(job.comm, "stop", Path("unused")) as guard:
        taken = PlainSteps(job.model, job.optimizer, Schedule(job.optimizer, 1, 2**40), job.comm.device, guard)
        batches = iter(islice(job.loader.after(0), steps))
        job.model.train()
        for step in range(steps):
            outputs = taken.take(batches, step)
            assert outputs is not None
            found.append([float(loss) for loss in outputs.losses.values()])
    return found


def shuffled(data: Path, folder: Path) -> Path:
    """The same data, but items and brands have other numbers."""
    shutil.copytree(data, folder)
    rng = np.random.default_rng(0)
    items, brands = pl.read_parquet(folder / "items.parquet"), pl.read_parquet(folder / "vocab/item_brand.parquet")
    place, code = rng.permutation(len(items)), rng.permutation(len(brands)).astype(np.int32)
    brand = [None if old is None else int(code[old]) for old in items["brand"]]
    items = items.with_columns(item_id=pl.Series(place), brand=pl.Series(brand, dtype=pl.Int32)).sort("item_id")
    items.write_parquet(folder / "items.parquet")
    brands.with_columns(code=pl.Series(code)).sort("code").write_parquet(folder / "vocab/item_brand.parquet")
    for file in (folder / "interactions").glob("*.parquet"):
        events = pl.read_parquet(file)
        events.with_columns(item_id=pl.Series(place[events["item_id"].to_numpy()])).write_parquet(file)
    return folder


def test_the_same_data_go_on_as_the_old_run_does_whatever_numbers_they_have(days: Days, tmp_path: Path) -> None:
    yesterday = days.folder / "yesterday"
    with open_job(config_of(days, tmp_path / "run", yesterday)) as job:
        Checkpoints(days.run, job.model, job.optimizer, job.comm, job.data.fingerprint).load(states_of(days.run)[0])
        going_on = losses(job, 6)
    for data in (yesterday, shuffled(yesterday, tmp_path / "shuffled")):
        with open_job(config_of(days, tmp_path / "run", data)) as job:
            started(job, tmp_path / "run")
            np.testing.assert_allclose(losses(job, 6), going_on, rtol=1e-6, atol=1e-6)
    with open_job(config_of(days, tmp_path / "run", yesterday)) as job:
        assert np.abs(np.array(losses(job, 6)) - going_on).max() > 1e-2  # new weights do not


def test_a_warm_start_reports_trains_and_resumes_without_its_source(
    days: Days, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    source = Path(shutil.copytree(days.run, tmp_path / "source"))
    command = ["train", "--train.warm_start", str(source), "--data.path", str(days.today), "--train.run", str(run)]
    assert main([*command, "--train.checkpoint_every", "2"]) == 0
    told = json.loads((run / "warm_start.json").read_text())
    old, new = keys(source / "vocabulary", "item_id"), keys(days.today, "item_id")
    kept = len(set(old) & set(new))
    assert told["keys"]["item_id"] == {"kept": kept, "new": len(new) - kept, "dropped": len(old) - kept}
    assert told["steps"] == 8 and f"item_id: {kept} keys kept" in (run / "train.log").read_text()
    assert main(["evaluate", "--run", str(run)]) == 0
    shutil.rmtree(source)
    whole = weights(run)
    shutil.rmtree(states_of(run)[0])
    assert main([*command, "--train.existing", "resume"]) == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(run).items())
    meta = storage.read_meta(states_of(run)[0])
    assert (meta["step"], meta["steps_before"]) == (8, 8)
    assert main(["evaluate", "--run", str(run)]) == 0


def without(raw: SourceData, name: str) -> SourceData:
    return replace(raw, features=tuple(f for f in raw.features if f.name != name))


def other_kind(raw: SourceData) -> SourceData:
    return replace(raw, features=tuple(replace(f, kind="quantile") if f.name == "price" else f for f in raw.features))


def renamed(raw: SourceData) -> SourceData:
    assert raw.items is not None
    events, items = rows_of(raw).with_columns(pl.col("item") + "x"), raw.items.with_columns(pl.col("key") + "x")
    return replace(raw, interactions=events, items=items)


BAD: list[tuple[str, Callable[[Days, Path], Path], list[str]]] = [
    ("lacks the feature 'brand'", lambda d, p: d.prepared(p, without(d.raw, "brand")), []),
    ("'price' is item quantile, and item numeric of width 1 in", lambda d, p: d.prepared(p, other_kind(d.raw)), []),
    ("hashed into 10000 rows in the run, and into 500", lambda d, p: d.prepared(p, text_buckets=500), []),
    ("kind direct in", lambda d, p: d.prepared(p, tables="item_brand=hash:8"), []),
    ("'item_id': has rows of kind direct in", lambda d, p: d.prepared(p, tables="item_id=zch:40"), []),
    ("not hashed under the secret", lambda d, p: d.prepared(p, secret=b"s" * 32), []),
    ("has none of the run's items", lambda d, p: d.prepared(p, renamed(d.raw)), []),
    ("model.dim 8, not 16", lambda d, p: d.today, ["--model.dim", "16"]),
    ("model.layers 1, not 2", lambda d, p: d.today, ["--model.layers", "2"]),
    ("data.max_history 6, not 9", lambda d, p: d.today, ["--data.max_history", "9"]),
    ("train.sparse_optimizer", lambda d, p: d.today, ["--train.sparse_optimizer", "adagrad"]),
    ("dense.attribute_scale", lambda d, p: d.today, ["--loss.attribute", "0"]),
    ("lacks the feature 'title'", lambda d, p: d.today, ["--data.features", "[genre,brand,price,interests,spending]"]),
    ("is the run to write itself", lambda d, p: d.today, ["--train.run", "RUN", "--train.existing", "replace"]),
]


def files(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(
    days: Days, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, (told, data_of, options) in enumerate(BAD):
        data = data_of(days, tmp_path / f"data{place}")
        before = files(days.folder)
        capsys.readouterr()
        given = [str(days.run) if option == "RUN" else option for option in options]
        assert warm(days, tmp_path / "out", "--data.path", str(data), *given) == 2, told
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1 and error.startswith("error: "), (told, error)
        assert not (tmp_path / "out").exists() and files(days.folder) == before, told


@pytest.fixture
def broken(days: Days, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(days.run, tmp_path / "broken"))


def test_a_run_without_a_state_or_with_a_damaged_one_is_refused(
    days: Days, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error() -> str:
        capsys.readouterr()
        given = ["--train.warm_start", str(broken), "--data.path", str(days.today), "--train.run", str(tmp_path / "o")]
        assert main(["train", *given]) == 2 and not (tmp_path / "o").exists()
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    for state in states_of(broken):
        (state / storage.SUMS).write_text("")
    assert "no older state is whole" in error()
    for state in states_of(broken):
        shutil.rmtree(state)
    assert "has no state to go on from" in error()
    shutil.rmtree(broken / "checkpoints")
    assert "stopped before its first validation" in error()
    (broken / "config.yaml").unlink()
    assert "no config.yaml, so no run folder" in error()
    shutil.rmtree(broken)
    assert "no config.yaml, so no run folder" in error()


def test_users_hashed_under_another_secret_are_not_the_same_users(days: Days, tmp_path: Path) -> None:
    one, same, other = (
        RowKeys.load(days.prepared(tmp_path / name, secret=secret))
        for name, secret in (("one", b"a" * 32), ("same", b"a" * 32), ("other", b"b" * 32))
    )
    warm_start._check_keys(one, same)
    for old, new in ((one, other), (RowKeys.load(days.today), one), (one, RowKeys.load(days.today))):
        with pytest.raises(DataError, match="not hashed under the secret"):
            warm_start._check_keys(old, new)


def test_shared_rows_stay_only_while_their_numbers_do(days: Days, tmp_path: Path) -> None:
    """Hashed tables: the same keys in the same order, or none. Managed rows go with the keys that hold them."""
    for kind in ("hash:8", "zch:8"):
        tables = f"item_brand={kind}"
        one, same, other = (tmp_path / f"{kind[:3]}-{name}" for name in ("one", "same", "other"))
        days.prepared(one, tables=tables), days.prepared(same, tables=tables)
        events = rows_of(days.raw)
        first = pl.read_parquet(one / "vocab/item_brand.parquet")["value"][0]
        assert days.raw.items is not None
        bought = days.raw.items.filter(pl.col("brand") != first)["key"]
        days.prepared(
            other, replace(days.raw, interactions=events.filter(pl.col("item").is_in(bought.implode()))), tables=tables
        )
        old = RowKeys.load(one)
        assert match_rows(old, RowKeys.load(same), "item_brand", ["brand"]).origin is None
        if kind == "hash:8":
            with pytest.raises(RunError, match="item_brand=direct"):
                match_rows(old, RowKeys.load(other), "item_brand", ["brand"])
            continue
        held = match_rows(old, RowKeys.load(other), "item_brand", ["brand"]).held
        before, after = (pl.read_parquet(folder / "vocab/item_brand.parquet") for folder in (one, other))
        codes = before.join(after, "value").select("code", "code_right").sort("code").to_numpy().T
        table = Table("zch", 8)
        assert held is not None and (codes[0] != codes[1]).any()
        order = np.argsort(held.before)
        expected = np.argsort(remap_ids(table, codes[0]))
        assert held.before[order].tolist() == remap_ids(table, codes[0])[expected].tolist()
        assert held.after[order].tolist() == remap_ids(table, codes[1])[expected].tolist()


def test_a_bucket_of_numbers_comes_from_the_one_that_held_them(tmp_path: Path) -> None:
    found = []
    for name, edges in (("old", ["-inf", "10.0", "20.0"]), ("new", ["-inf", "5.0", "12.0", "25.0"])):
        folder = tmp_path / name
        (folder / "vocab").mkdir(parents=True)
        pl.DataFrame({"code": range(len(edges)), "value": edges}).write_parquet(folder / "vocab/item_price.parquet")
        feature = {"name": "price", "entity": "item", "kind": "quantile", "column": "price", "table": "item_price"}
        schema = {"name": "x", "source": "x", "users": 1, "items": 1, "interactions": 1, "events": ["e"]}
        schema["features"] = [{**feature, "cardinality": len(edges)}]
        (folder / "schema.yaml").write_text(json.dumps(schema))
        found.append(RowKeys.load(folder))
    match = match_rows(found[0], found[1], "item_price", ["price"])
    assert match.origin is not None and match.origin.tolist() == [0, 0, 1, 2]


def test_tables_are_told_apart_by_what_is_looked_up_in_them(days: Days) -> None:
    """A second table of item ids moves as the first, whatever its name."""
    old, new = (RowKeys.load(folder) for folder in (days.run / "vocabulary", days.today))
    one, other = (match_rows(old, new, name, ["item_id"]) for name in ("item_id", "item_source"))
    assert one.origin is not None and other.origin is not None and np.array_equal(one.origin, other.origin)
    assert old.schema.table("item_source") == Table()


def known_items(job: Job) -> set[str]:
    return set(np.array(job.data.item_keys)[job.train_stats.items > 0])


def test_a_run_that_followed_hands_on_its_settings_and_what_it_knows(days: Days, tmp_path: Path) -> None:
    """From day to day: warm start, follow, warm start. Rates stay, and so does what has no event today."""
    few = part_of(days.raw, lambda key: key[0] == "i" and key[-1] in "013")
    data = days.prepared(tmp_path / "data", few, keep_unseen_items=True)
    assert warm(days, tmp_path / "second", "--data.path", str(data)) == 0
    (tmp_path / "source").mkdir()
    with restore(tmp_path / "second") as restored:
        before = known_items(restored.job)
    new = {"user": restored.job.data.user_keys[3], "item": "brand-new", "timestamp": 1_900_000_000}
    (tmp_path / "source/a.jsonl").write_text(json.dumps(new) + "\n")
    live = tmp_path / "live"
    follow = ["follow", "--run", str(tmp_path / "second"), "--source", str(tmp_path / "source"), "--output", str(live)]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        append = Histories.append

        def watched(self: Histories, events: NewEvents) -> np.ndarray:
            seen.append(self.train_stats.items.copy())
            return append(self, events)

        patch.setattr(Histories, "append", watched)
        assert main([*follow, "--once"]) == 0
    with restore(live) as restored:
        assert known_items(restored.job) == before | {"brand-new"}
        item_keys = np.array(restored.job.data.item_keys)
    assert set(item_keys[seen[0] > 0]) == before
    config = load_config(live / "config.yaml")
    made = load_config(days.run / "config.yaml")
    assert (config.train.dense_lr, config.train.sparse_lr) == (made.train.dense_lr, made.train.sparse_lr)
    given = [f"train.warm_start={live}", f"train.run={tmp_path / 'third'}", f"data.path={days.today}"]
    third = warm_config(live, given)
    assert (third.train.dense_lr, third.train.sparse_lr) == (made.train.dense_lr, made.train.sparse_lr)


def test_a_fine_tuning_knows_what_its_warm_started_source_knows(days: Days, tmp_path: Path) -> None:
    """What has no event in the data of the warm start, and what another fine-tuning went through."""
    few = part_of(days.raw, lambda key: key[0] == "i" and key[-1] in "013")
    data = days.prepared(tmp_path / "data", few, keep_unseen_items=True)
    assert warm(days, tmp_path / "warm", "--data.path", str(data)) == 0
    with restore(tmp_path / "warm") as restored:
        before, job = known_items(restored.job), restored.job
        assert len(before) > (job.events.stats(job.data, values=True).items > 0).sum()
    found, source = [], tmp_path / "warm"
    for name in ("one", "two"):
        given = ["--finetune.source", str(source), "--train.run", str(tmp_path / name)]
        assert main(["finetune", *given, "--train.max_steps", "1"]) == 0
        source = tmp_path / name / "pretrained"
        with restore(source) as restored:
            found.append(known_items(restored.job))
    assert found == [before, before]
    with restore(tmp_path / "one" / "scratch") as restored:
        assert known_items(restored.job) < before


def test_a_follower_stopped_between_model_and_vocabulary_is_no_source(
    days: Days, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, live = tmp_path / "source", tmp_path / "live"
    source.mkdir()
    new = {"user": "u4", "item": "brand-new", "timestamp": 1_900_000_000}
    (source / "a.jsonl").write_text(json.dumps(new) + "\n")
    follow = ["follow", "--run", str(days.run), "--source", str(source), "--output", str(live), "--once"]
    with pytest.MonkeyPatch.context() as patch:

        def dies(*args: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(follower, "publish_vocabulary", dies)
        assert main(follow) != 0
    start = ["train", "--train.warm_start", str(live), "--data.path", str(days.today), "--train.run"]
    capsys.readouterr()
    assert main([*start, str(tmp_path / "next")]) == 2
    told = capsys.readouterr().err
    assert "start the same 'flm follow --once' again" in told and told.count("\n") == 1
    assert not (tmp_path / "next").exists()
    assert main(follow) == 0 and main([*start, str(tmp_path / "next")]) == 0


def test_data_are_those_of_the_run_unless_given(days: Days, tmp_path: Path) -> None:
    assert warm(days, tmp_path / "run") == 0
    assert load_prepared(days.folder / "yesterday").fingerprint == (tmp_path / "run/vocabulary/fingerprint").read_text()
