"""Streamed batches: nothing lost or repeated, the same at any number of ranks, and those of data in memory."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data import disk_columns
from flm_torchrec.data import lanes as lanes_module
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.data.lanes import LANES, LanePlan, merged
from flm_torchrec.data.loader import Loader, Sharing, TrainLoader
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.order_statistics import order_statistics
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.splits import SplitSettings, split
from flm_torchrec.data.stream_loader import StreamLoader
from flm_torchrec.data.survey import StreamedData, load_streamed
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.data.windows import windows
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import ConfigError, DataError
from flm_torchrec.export.vectors import decode
from flm_torchrec.training import restore
from flm_torchrec.training.finetune import source_config
from flm_torchrec.training.loaders import make_loader
from flm_torchrec.training.run_events import events_of, load_data
from tests.conftest import NO_DROPOUT
from tests.processes import launch_ranks

ITEMS = 30
KINDS = ("leave-one-out", "time", "cold-start")


def write_data(folder: Path, events: list[int], group: int, files: int = 1, seed: int = 0) -> Path:
    """Prepared data of users with so many events, in row groups of `group` rows."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(len(events)), events)
    times = rng.integers(0, 5000, len(users))
    columns = {
        "user_id": users,
        "item_id": rng.integers(0, ITEMS, len(users)),
        "timestamp": times[np.lexsort([times, users])],
        "event": rng.integers(0, 2, len(users)).astype(np.int32),
        "value": rng.integers(1, 6, len(users)).astype(np.float32),
    }
    (folder / "interactions").mkdir(parents=True)
    ends = [sum(events[: len(events) * n // files]) for n in range(1, files + 1)]  # no user is in two files
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        table = pa.table(columns).slice(start, end - start)
        pq.write_table(table, folder / "interactions" / f"part-{number:05d}.parquet", row_group_size=group)
    for entity, size in (("user", len(events)), ("item", ITEMS)):
        keys = [str(n) for n in range(size)]
        pq.write_table(pa.table({f"{entity}_id": range(size), f"{entity}_key": keys}), folder / f"{entity}s.parquet")
    Schema("test", "test", len(events), ITEMS, len(users), ("view", "buy")).save(folder / "schema.yaml")
    (folder / "report.json").write_text("{}")
    return folder


@contextmanager
def data_of(folder: dict) -> Iterator[Path]:
    """The folder while it lasts; few lanes, so that each has several units, or as many as there are units."""
    with TemporaryDirectory() as name, patch.object(lanes_module, "LANES", folder["lanes"]):
        yield write_data(Path(name) / "data", *(folder[key] for key in ("events", "group", "files", "seed")))


@st.composite
def folders(draw: st.DrawFn) -> dict:
    """For `data_of`: users with no events and with most of them, groups of any size, several files."""
    events = draw(st.lists(st.integers(0, 12), min_size=4, max_size=30))
    events[draw(st.integers(0, len(events) - 1))] += draw(st.integers(0, 80))
    events[0] += 3
    return {
        "events": events,
        "group": draw(st.integers(1, 60)),
        "files": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 99)),
        "lanes": draw(st.sampled_from([2, 3, 64])),
    }


def stream_loader(path: Path, kind: str, batch_size: int, rank: int = 0, ranks: int = 1) -> StreamLoader:
    data = load_streamed(path, "all", SplitSettings(kind, 0.2), 5, 0)
    assembler = Assembler(data, np.zeros(len(data.item), bool), data.stream.stats)
    plan = LanePlan(data.stream, 4, Sharing(batch_size, 7, rank, ranks, moved=True))
    return StreamLoader(plan, assembler, Negatives(data.stream.counts, 3, 0.5))


def memory_loader(path: Path, kind: str, batch_size: int) -> TrainLoader:
    data = load_prepared(path)
    splits = split(data, kind, 0.2)
    fit = splits.train_mask(data)
    negatives = Negatives(np.bincount(data.item[fit], minlength=ITEMS), 3, 0.5)
    return TrainLoader(windows(data, splits, 4), Assembler(data, fit), negatives, Sharing(batch_size, 7, moved=True))


def sequences(batch: Batch, stats: TrainStats) -> Counter:
    """All that a batch says of each sequence which is not there to fill up ranks, values as they were in the data."""
    items = batch.item_ids.values().numpy()
    ends = np.cumsum(batch.lengths.numpy())
    history = batch.history.to_dict()
    fields = [
        items[batch.targets.numpy()],
        np.append(items, -1)[batch.tokens.numpy()],
        history["event"].values().numpy(),
        history["gap"].values().numpy(),
        batch.time.numpy(),
        np.round(batch.value.numpy() / (stats.value_scale or 1.0) + stats.value_mean),
    ]
    whose = batch.users["user_id"].to_dense()
    return Counter(
        (*whose[row].tolist(), *(tuple(f[start:end].tolist()) for f in fields))
        for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > start
    )


def steps_of(loaders: Sequence[Loader], first: int, last: int) -> list[Counter]:
    """By step, the sequences of all ranks; ranks must have equally many, empty ones included."""
    found = []
    for batches in zip(*(islice(loader.after(first), last - first) for loader in loaders), strict=True):
        assert len({len(batch.lengths) for batch in batches}) == 1
        stats = loaders[0].assembler.stats
        found.append(sum((sequences(batch, stats) for batch in batches), Counter()))
    return found


def usable(path: Path, kind: str) -> bool:
    try:
        split(load_prepared(path), kind, 0.2)
    except DataError:
        return False
    return True


@settings(max_examples=60)
@given(folders(), st.sampled_from(KINDS), st.integers(1, 40))
def test_an_epoch_has_the_sequences_that_it_has_in_memory(folder: dict, kind: str, batch_size: int) -> None:
    with data_of(folder) as path:
        if not usable(path, kind):
            return
        memory, stream = memory_loader(path, kind, batch_size), stream_loader(path, kind, batch_size)
        assert len(stream) == len(memory)
        size = len(memory)
        for first in (0, size):  # each epoch cuts the events elsewhere
            of_memory, of_stream = (steps_of([loader], first, first + size) for loader in (memory, stream))
            assert sum(of_memory, Counter()) == sum(of_stream, Counter())


@settings(max_examples=40)
@given(
    folders(), st.sampled_from(KINDS), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 4]),
    st.floats(0, 1),
)  # fmt: skip
def test_batches_are_the_same_at_any_number_of_ranks_and_after_any_resume(
    folder: dict, kind: str, batch_size: int, before: int, after: int, part: float
) -> None:
    with data_of(folder) as path:
        if not usable(path, kind) or stream_loader(path, kind, batch_size).plan.lanes < max(before, after):
            return
        alone = [stream_loader(path, kind, batch_size)]
        end = 2 * len(alone[0]) + 1
        stop = round(part * end)
        parts = [[stream_loader(path, kind, batch_size, r, n) for r in range(n)] for n in (before, after)]
        assert steps_of(parts[0], 0, stop) + steps_of(parts[1], stop, end) == steps_of(alone, 0, end)


@settings(max_examples=30)
@given(folders(), st.integers(1, 40), st.sampled_from([1, 2, 3]))
def test_each_rank_reads_its_own_rows_once_and_has_no_more_sequences_than_a_batch(
    folder: dict, batch_size: int, ranks: int
) -> None:
    with data_of(folder) as path:
        if not usable(path, "leave-one-out") or stream_loader(path, "leave-one-out", batch_size).plan.lanes < ranks:
            return
        times = np.zeros(sum(folder["events"]), int)
        for rank in range(ranks):
            loader = stream_loader(path, "leave-one-out", batch_size, rank, ranks)
            groups, read = loader.plan.stream.groups, loader.plan.stream.groups.read

            def spy(start: int, stop: int, columns: tuple[str, ...], read=read) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
                times[start:stop] += 1
                return read(start, stop, columns)

            groups.read = spy  # type: ignore[method-assign, assignment]
            most = max(len(batch.lengths) for batch in loader.epoch(1))
            assert most <= batch_size
        assert (times == 1).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_lanes_are_merged_in_proportion(sizes: list[int]) -> None:
    places = sorted(((i + 0.5) / size, lane) for lane, size in enumerate(sizes) for i in range(size))
    counts = np.zeros(len(sizes), int)
    for taken, (_, lane) in enumerate(places):
        np.testing.assert_array_equal(merged(np.array(sizes), taken), counts)
        counts[lane] += 1
    np.testing.assert_array_equal(merged(np.array(sizes), len(places)), sizes)


@settings(max_examples=60)
@given(folders(), st.sampled_from(KINDS), st.floats(0.05, 0.45), st.integers(1, 20))
def test_a_survey_finds_what_is_known_of_data_in_memory(folder: dict, kind: str, holdout: float, sample: int) -> None:
    with data_of(folder) as path:
        data = load_prepared(path)
        try:
            splits = split(data, kind, holdout)
        except DataError:
            return
        streamed = load_streamed(path, "all", SplitSettings(kind, holdout), sample, 3)
        stream, fit = streamed.stream, splits.train_mask(data)
        np.testing.assert_array_equal(stream.offsets, data.offsets)
        np.testing.assert_array_equal(stream.train_end, splits.train_end)
        np.testing.assert_array_equal(stream.counts, np.bincount(data.item[fit], minlength=ITEMS))
        assert stream.train_rows == fit.sum()
        assert stream.rule is not None
        cold = np.zeros(ITEMS, bool) if splits.cold_items is None else splits.cold_items
        np.testing.assert_array_equal(
            stream.rule.held_out(*np.stack([np.zeros(ITEMS, int), np.arange(ITEMS), np.zeros(ITEMS, int)])), cold
        )
        if fit.any():
            stats = TrainStats.of(data, fit, values=True)
            np.testing.assert_array_equal(stream.stats.items, stats.items)
            np.testing.assert_array_equal(stream.stats.users, stats.users)
            assert stream.stats.value_mean == pytest.approx(stats.value_mean, rel=1e-4, abs=1e-5)
            assert stream.stats.value_scale == pytest.approx(stats.value_scale, rel=1e-3)


@settings(max_examples=40)
@given(folders(), st.data())
def test_any_rows_of_a_file_can_be_read_alone(folder: dict, data: st.DataObject) -> None:
    with data_of({**folder, "files": 1}) as path:
        rows = sum(folder["events"])
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        whole, part = load_prepared(path), RowGroups(path).read(start, stop)
        np.testing.assert_array_equal(part["item_id"], whole.item[start:stop])
        np.testing.assert_array_equal(part["value"], whole.value[start:stop])


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40), st.data())
def test_order_statistics_are_those_of_sorting(timestamps: list[int], data: st.DataObject) -> None:
    def scan() -> Iterator[np.ndarray]:
        return (np.array(timestamps[start : start + 7], np.int64) for start in range(0, len(timestamps) + 7, 7))

    ranks = data.draw(st.lists(st.integers(0, len(timestamps) - 1), min_size=1, max_size=3))
    assert order_statistics(scan, ranks) == [sorted(timestamps)[r] for r in ranks]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One user has most of the events, and groups are small."""
    return write_data(tmp_path_factory.mktemp("uneven") / "data", [3, 400, 0, 4, 5, *[6] * 40, 1, 250], 37, 2)


@pytest.mark.parametrize("kind", ["leave-one-out", "time"])
def test_validation_has_the_users_that_it_has_in_memory(uneven: Path, kind: str) -> None:
    """With seed 0, whatever the seed of the streamed run: runs that differ in it are compared."""
    config = load_config(None, [f"data.path={uneven}", f"data.split={kind}", "train.eval_users=9", "train.seed=5"])
    streamed = load_data(dataclasses.replace(config, data=dataclasses.replace(config.data, stream=True)))
    valid = events_of(config, streamed).splits.valid
    whole = load_data(config)
    everyone = events_of(config, whole).splits.valid
    chosen = np.sort(np.random.default_rng(0).choice(len(everyone), 9, replace=False))
    np.testing.assert_array_equal(valid.user, everyone.user[chosen])
    np.testing.assert_array_equal(streamed.item[valid.end], whole.item[everyone.end[chosen]])
    known = [d.offsets[e.user] for d, e in ((streamed, valid), (whole, everyone.take(chosen)))]
    np.testing.assert_array_equal(valid.end - known[0], everyone.end[chosen] - known[1])


def test_hidden_values_are_hidden_in_the_stream_too(uneven: Path) -> None:
    options = [f"data.path={uneven}", "data.stream=true", "train.eval_users=9", "data.values=false"]
    data = load_data(load_config(None, options))
    assert isinstance(data, StreamedData)
    assert data.stream.stats.value_scale == 0.0 and set(data.value) == {1.0}


def test_what_streaming_cannot_do_is_told_before_it_starts(uneven: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set train\.eval_users"):
        load_config(None, ["data.stream=true"])
    few = write_data(tmp_path / "few", [5, 6], 3)
    with pytest.raises(DataError, match=r"over 2 ranks at most, not 3"):
        stream_loader(few, "leave-one-out", 4, 0, 3).check_ranks()
    assert 2 < stream_loader(uneven, "leave-one-out", 4).plan.lanes <= LANES


def test_files_that_cannot_be_streamed_are_named(tmp_path: Path) -> None:
    path = write_data(tmp_path / "data", [9] * 20, 30, 2)
    first, second = sorted((path / "interactions").iterdir())
    loader = stream_loader(path, "leave-one-out", 4)
    broken = bytearray(first.read_bytes())
    broken[4 : len(broken) // 2] = bytes(len(broken) // 2 - 4)
    first.write_bytes(broken)
    with pytest.raises(DataError, match=r"part-00000.*not a readable Parquet file"):
        list(loader.epoch(0))
    first.write_bytes(second.read_bytes())  # users 10 … 19 come twice
    with pytest.raises(DataError, match=r"not sorted by user_id"):
        stream_loader(path, "leave-one-out", 4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_time_split_that_leaves_nothing_to_learn_from_is_refused(tmp_path: Path, stream: bool) -> None:
    path = write_data(tmp_path / "data", [10] * 20, 30)
    (file,) = (path / "interactions").iterdir()
    times = pa.array([int(n % 10 == 9) * n for n in range(200)])  # all but the last event of a user are of one time
    pq.write_table(pq.read_table(file).set_column(2, "timestamp", times), file)
    options = [f"data.path={path}", "data.split=time", "train.eval_users=9", f"data.stream={str(stream).lower()}"]
    config = load_config(None, options)
    with pytest.raises(DataError, match=r"data: no event to learn from in a time split"):
        events_of(config, load_data(config))


@pytest.fixture(scope="module")
def runs(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two epochs, by one rank and by two, of which one has nothing to learn from in many steps."""
    options = [
        *("--data.path", str(uneven), "--data.stream", "true", "--train.eval_users", "9", "--train.batch_size", "4"),
        *("--data.max_history", "9", "--train.epochs", "2", "--train.log_every", "1", "--model.dim", "8"),
        *NO_DROPOUT,
        *("--train.patience", "0"),
        *("--distributed.threads", "1", "--loss.negatives", "20", "--train.run"),
    ]
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *options, str(folder / "one")]) == 0
    launch_ranks(2, ["-m", "flm_torchrec", "train", *options, str(folder / "two")])
    return [folder / "one", folder / "two"]


def test_ranks_of_uneven_shards_end_with_the_losses_of_one(runs: list[Path]) -> None:
    """Then evaluate and fine-tune."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    losses = [[line["loss/sequential"] for line in found if "loss/sequential" in line] for found in lines]
    assert len(losses[0]) == len(losses[1]) > 40
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert all(0 <= line["input_wait"] <= 1 for line in lines[1] if "input_wait" in line)
    found = []
    for sample in ([], ["--sample"], ["--sample", "7"]):
        assert main(["evaluate", "--run", str(runs[1]), "--split", "valid", *sample]) == 0
        found.append(json.loads((runs[1] / "evaluation-valid.json").read_text()))
    assert [evaluation["users"] for evaluation in found] == [45, 9, 7]
    # A number draws from all users, and the baselines learn from all.
    assert main(["evaluate", "--run", str(runs[1]), "--split", "valid", "--sample", "45"]) == 0
    assert json.loads((runs[1] / "evaluation-valid.json").read_text())["table"] == found[0]["table"]
    assert main(["evaluate", "--run", str(runs[1]), "--sample", "0"]) == 2
    best = next(line for line in lines[1] if line["step"] == _best_step(runs[1]) and "valid/sequential/mrr" in line)
    assert found[1]["table"]["sequential"]["mrr"] == pytest.approx(best["valid/sequential/mrr"], rel=1e-4)
    assert main(["plan", "--config", str(runs[1] / "config.yaml"), "--hardware", "h100"]) == 0
    tuned = source_config(runs[1], ["train.run=elsewhere", f"finetune.source={runs[1]}"])
    assert tuned.data.stream


def test_evaluation_and_export_from_disk_are_those_from_memory(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last byte: users of one row group and of many, users without a held-out event, one rank and two."""
    monkeypatch.setattr(disk_columns, "KEPT", 3)
    evaluate = ["evaluate", "--run", str(runs[0]), *(f"--by={by}" for by in ("items", "users", "events"))]
    evaluate += ["--eval.baselines", "[popularity,item-kNN,Markov,EASE-R]", "--eval.user_block", "8"]
    export = ["export", "--run", str(runs[0]), "--tower", "none", "--map", "pca", "--quantise", "int8", "--output"]
    tables, manifests = [], []
    for place in ("disk", "memory"):
        if place == "memory":
            monkeypatch.setattr(restore, "load_data", lambda config, on_disk: load_data(config))
        with patch.object(disk_columns.Units, "values", autospec=True, side_effect=disk_columns.Units.values) as read:
            assert main(evaluate) == 0 and main([*export, str(tmp_path / place)]) == 0
        assert read.called == (place == "disk")
        tables.append((runs[0] / "evaluation-test.json").read_bytes())
        manifests.append((tmp_path / place / "manifest.json").read_bytes())
    assert tables[0] == tables[1] and manifests[0] == manifests[1]  # the manifest has the digest of each file
    with monkeypatch.context() as small:
        small.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
        small.setattr(restore, "restore", lambda *_, **__: pytest.fail("the model is loaded"))
        for more, told in (
            ([], "--index flat: takes"),
            (["--index", "none", "--tower", "int8"], "--tower int8: takes"),
        ):
            assert main([*export, str(tmp_path / "none"), *more]) == 2 and not (tmp_path / "none").exists()
            assert told in capsys.readouterr().err
    launch_ranks(2, ["-m", "flm_torchrec", *evaluate])
    assert (runs[0] / "evaluation-test.json").read_bytes() == tables[0]
    launch_ranks(2, ["-m", "flm_torchrec", *export, str(tmp_path / "two")])
    one, two = (pq.read_table(tmp_path / name / "users.parquet") for name in ("disk", "two"))
    assert one.select(["user_key", "seen"]).equals(two.select(["user_key", "seen"]))
    vectors = [decode(table["sequential"].combine_chunks()) for table in (one, two)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=0.02)


@pytest.mark.parametrize("task", ["next-item", "label"])
def test_a_fine_tuning_from_disk_learns_what_it_learns_from_memory(runs: list[Path], tmp_path: Path, task: str) -> None:
    given = {"finetune.source": runs[0], "finetune.task": task, "finetune.share": 0.5, "finetune.threshold": 3}
    given |= {"train.max_steps": 2, "train.select": "fused/mrr" if task == "next-item" else "label/auc"}
    found = []
    for stream in ("true", "false"):
        options = {**given, "data.stream": stream, "train.run": tmp_path / stream}
        config = load_config(runs[0] / "config.yaml", [f"{name}={value}" for name, value in options.items()])
        data = load_data(config)
        events = events_of(config, data)
        loader = make_loader(data, events, config, Comm(0, 1, 1, torch.device("cpu")))
        assert (data.units is not None) == isinstance(loader, StreamLoader) == (stream == "true")
        arrays = [events.learned_from, events.seen, *(vars(events.labels).values() if events.labels else ())]
        assert main(["finetune", "--no-control", *(f"--{name}={value}" for name, value in options.items())]) == 0
        tested = json.loads((tmp_path / stream / "finetune.json").read_text())["test"]
        epoch = sum(steps_of([loader], 0, len(loader)), Counter())
        found.append((epoch, vars(loader.assembler.stats), [array[:] for array in arrays], tested))
    (epoch, stats, arrays, tested), (in_memory, theirs, same, before) = found
    assert epoch == in_memory and tested.get("found") == before.get("found")
    np.testing.assert_equal(stats, theirs)
    np.testing.assert_equal(arrays, same)


def _best_step(run: Path) -> int:
    return json.loads((run / "checkpoints" / "best" / "meta.json").read_text())["step"]
