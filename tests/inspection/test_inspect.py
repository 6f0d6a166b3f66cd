"""Inspecting prepared data: what is amiss is told, what is well is not, and figures are right."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.charts import Curves, Histogram, draw
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.data.splits import split
from flm_torchrec.inspection.bins import fitting
from flm_torchrec.inspection.drift import _by_period, _divergence, _stability
from flm_torchrec.inspection.inspect import Inspection, _values, opened
from flm_torchrec.inspection.leakage import look_at_splits
from flm_torchrec.pages import Bars

DAY = 86400


def write(
    folder: Path, events: Sequence[tuple[int, ...]], features: Sequence[tuple[Feature, list[Any]]] = (), **schema: Any
) -> Path:
    """Prepared data of events (user, item, time, type) as they are given, and of item features."""
    (folder / "interactions").mkdir(parents=True)
    user, item, time, kind = (np.array(column) for column in zip(*events, strict=True))
    rows = {"user_id": user, "item_id": item, "timestamp": time, "event": kind.astype(np.int32),
            "value": np.ones(len(user), np.float32)}  # fmt: skip
    pq.write_table(pa.table(rows), folder / "interactions/part-00000.parquet")
    users, items = int(user.max()) + 1, int(item.max()) + 1
    pq.write_table(
        pa.table({"user_id": range(users), "user_key": [f"u{u}" for u in range(users)]}), folder / "users.parquet"
    )
    columns = {f.column: values for f, values in features}
    keys = {"item_id": list(range(items)), "item_key": [f"<script>i{i}</script>" for i in range(items)]}
    pq.write_table(pa.table({**keys, **columns}), folder / "items.parquet")
    made: dict[str, Any] = {"users": users, "items": items, "interactions": len(user), "events": ("view", "buy")}
    Schema("made", "test", features=tuple(f for f, _ in features), **{**made, **schema}).save(folder / "schema.yaml")
    return folder


def steady(days: int = 20, users: int = 60, items: int = 30) -> list[tuple[int, ...]]:
    """Every user has another random item every other day, by the same distribution always."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(items) for _ in range(users)]
    return [
        (u, int(orders[u][day // 2]), day * DAY + int(rng.integers(DAY)), int(rng.random() < 0.2))
        for u in range(users)
        for day in range(u % 2, days, 2)
    ]


def findings(folder: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["inspect", str(folder), *options]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]


def test_well_made_data_passes_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", steady())
    page = tmp_path / "page.html"
    assert main(["inspect", str(data), "--strict", "--output", str(page)]) == 0
    assert "no problems found" in capsys.readouterr().out
    html = page.read_text()
    assert html.count("<svg") >= 7 and "<script" not in html and "&lt;script&gt;i" in html
    assert "http" not in html.replace("http://www.w3.org/", "")  # nothing but the names of formats


def planted() -> dict[str, tuple[list[tuple[int, ...]], str]]:
    """By fault: events that have it, and what must be told."""
    events = steady()
    busy: list[tuple[int, ...]] = [(n % 50, (n * 7) % 20, (n // 1000) * DAY + n % 1000, 0) for n in range(10_000)]
    busy.sort(key=lambda e: (e[0], e[2]))
    same: list[tuple[int, ...]] = [(u, i, t * DAY, 0) for u in range(20) for t, i in enumerate([3, 1, 4, 1, 5])]
    return {
        "leak": ([*events, *((60 + u, i, 5 * DAY, 0) for u in range(9) for i in (u, 10, u))], "leak: 9 test events"),
        "copies": (same, "19 of 20 users"),
        "repeats": (
            [*events, *((u, 3, 20 * DAY, 0) for u in range(60))],
            "32% of test events have an item that the user had before",
        ),
        "hole": (
            [e for e in events if not 5 <= e[2] // DAY < 9],
            "few or no events in 4 periods, first from 1970-01-06",
        ),
        "types": ([(u, i, t, int(t >= 5 * DAY)) for u, i, t, _ in busy], "event types shift in"),
        "items": ([(u, i + 20 * (t >= 8 * DAY), t, 0) for u, i, t, _ in busy], "item popularity shifts in 2 periods"),
        "robot": ([*events, *((60, n % 30, n * 1000, 0) for n in range(1500))], "user 'u60' has 71.4% of all events"),
        "short": (
            [(u, (u * 7 + n) % 30, n * DAY + u, 0) for u in range(60) for n in range(1 + (u < 20) * 3)],
            "40 of 60",
        ),
        "unsorted": ([(0, 1, 9 * DAY, 0), (0, 2, 1, 0), *((u + 1, *e) for u, *e in events)], "1 events are older"),
        "milliseconds": (
            [(u, i, (1_700_000_000 + t) * 1000, k) for u, i, t, k in events],
            f"{len(events)} of {len(events)} events are later than the year 2242, the last in 55895",
        ),
        "days": ([(u, i, 20240301 + t // DAY, k) for u, i, t, k in events], "days written as numbers such as 20240331"),
        "mixed units": ([*events, (60, 1, 5, 0), (60, 2, 10**13, 0)], f"1 of {len(events) + 2} events are later than"),
        "ties": (
            [(u, (u * 3 + n) % 30, u * DAY // 4, 0) for u in range(60) for n in range(6)],
            "share their timestamp",
        ),
    }


@pytest.mark.parametrize("fault", planted())
def test_a_planted_fault_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    events, told = planted()[fault]
    data = write(tmp_path / "data", events)
    lines = findings(data, capsys=capsys)
    assert any(told in line for line in lines), lines
    assert main(["inspect", str(data), "--strict"]) == 1


def test_users_who_have_one_item_again_and_again_are_no_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faithful = [(60 + u, u % 30, t * DAY, 0) for u in range(90) for t in range(8)]
    lines = findings(write(tmp_path / "data", [*steady(), *faithful]), capsys=capsys)
    assert not any("another's very history" in line for line in lines)


def test_users_never_met_in_training_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = [(u, i, t + (u > 40) * 40 * DAY, 0) for u, i, t, _ in steady()]
    lines = findings(write(tmp_path / "data", late), "--split", "time", "--holdout", "0.2", capsys=capsys)
    assert any("100% of test events have a user never met in training" in line for line in lines)


def test_dead_features_are_told_and_live_ones_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(name: str, cardinality: int) -> Feature:
        return Feature(name, "item", "categorical", name, f"item_{name}", cardinality)

    rows = range(120)
    some = pa.array([None] * 120, pa.int32())
    features = [
        (code("genre", 5), [i % 5 for i in rows]),
        (code("country", 3), [1 for _ in rows]),
        (code("sku", 120), list(rows)),
        (code("void", 2), some),
        (code("sparse", 90), [i % 9 for i in rows]),
        (Feature("price", "item", "numeric", "price", width=1), [float(i) for i in rows]),
        (Feature("flat", "item", "numeric", "flat", width=1), [0.5 for _ in rows]),
        (Feature("tags", "item", "multi_categorical", "tags", "item_tags", 4), [[i % 4, 3] for i in rows]),
        (Feature("image", "item", "dense", "image", width=2), [[float(i), 1.0] for i in rows]),
        (Feature("blank", "item", "dense", "blank", width=2), [[0.0, 0.0] for _ in rows]),
    ]
    events = [*steady(), (60, 119, 0, 0)]
    lines = findings(write(tmp_path / "data", events, features), capsys=capsys)
    told = {line.split("'")[1]: line for line in lines if "feature" in line}
    assert told.keys() == {"country", "sku", "void", "sparse", "flat", "blank"}
    assert "nearly an id" in told["sku"] and "9 of 90 codes" in told["sparse"] and "every row" in told["void"]


def test_features_may_have_names_that_sql_takes_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(name: str) -> Feature:
        return Feature(name, "item", "categorical", name, f"item_{name}", 2)

    rows = range(30)
    features: list[tuple[Feature, list[Any]]] = [(code(name), [i % 2 for i in rows]) for name in ("n", "Brand")]
    features.append((code("brand"), [1] * 30))
    features.append((Feature("words", "item", "text", "words", "item_words", 2), [["one"] for _ in rows]))
    data = write(tmp_path / "data", steady(), features, title="words")
    told = [line for line in findings(data, capsys=capsys) if "feature" in line]
    assert [line.split("'")[1] for line in told] == ["brand", "words"]


@pytest.mark.parametrize("kind", ["leave-one-out", "time"])
def test_parts_are_those_that_training_draws(small: PreparedData, kind: Any) -> None:
    with opened(small.path, 2**30) as data:
        look_at_splits(data, kind, 0.1)
        sizes = dict(data.rows("SELECT part, count(*) FROM parts GROUP BY part"))
        testers = {row[0] for row in data.rows("SELECT DISTINCT user_id FROM parts WHERE part = 'test'")}
    drawn = split(small, kind, 0.1)
    assert sizes["train"] == int((drawn.train_end - small.offsets[:-1]).sum())
    assert testers == set(drawn.test.user.tolist())


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=10)
def test_drift_is_that_of_a_plain_computation(tmp_path_factory: pytest.TempPathFactory, seed: int, days: int) -> None:
    rng = np.random.default_rng(seed)
    events = [(0, int(rng.integers(8)), day * DAY + n, int(rng.integers(2))) for day in range(days) for n in range(9)]
    folder = write(tmp_path_factory.mktemp("drift") / "data", events)
    with opened(folder, 2**30) as data:
        data.connection.execute(
            f"CREATE TEMP VIEW periods AS SELECT *, (timestamp // {DAY})::INT AS period FROM events"
        )
        popularity, types = _by_period(data, _divergence(), days), _stability(data, days)
    loaded = load_prepared(folder)
    day = loaded.timestamp // DAY
    for number in range(1, days):
        p, q = (np.bincount(loaded.item[m], minlength=8) / m.sum() for m in (day == number, day < number))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [np.nansum(x * np.log2(2 * x / (p + q))) / 2 for x in (p, q)]
        assert popularity[number] == pytest.approx(sum(parts), abs=1e-9)
        p, q = (
            np.bincount(loaded.event[m], minlength=2) + 0.5 * n for m, n in ((day == number, 1), (day < number, number))
        )
        p, q = p / p.sum(), q / q.sum()
        assert types[number] == pytest.approx(float(((p - q) * np.log(p / q)).sum()))


def test_a_log_of_one_day_or_without_timestamps_has_no_drift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "one", [(u, i % 7, i * 60, 0) for u in range(5) for i in range(u, 9)])
    none = write(tmp_path / "none", steady(), timestamps=False)
    for folder, told in ((one, "of one day"), (none, "no timestamps")):
        assert main(["inspect", str(folder)]) == 0
        assert told in capsys.readouterr().out


def test_what_cannot_be_inspected_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good", steady(), timestamps=False)
    broken = {}
    for name in ("torn", "column", "empty", "users", "rows"):
        broken[name] = write(tmp_path / name, steady())
    (broken["torn"] / "interactions/part-00000.parquet").write_bytes(b"PAR1 no more")
    pq.write_table(pa.table({"user_id": [1]}), broken["column"] / "interactions/part-00000.parquet")
    rows = pq.read_table(broken["empty"] / "interactions/part-00000.parquet")
    pq.write_table(rows.slice(0, 0), broken["empty"] / "interactions/part-00000.parquet")
    (broken["users"] / "users.parquet").unlink()
    (broken["rows"] / "interactions/part-00000.parquet").unlink()
    for folder in [tmp_path / "missing", *broken.values()]:
        assert main(["inspect", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(folder) in error and error.count("\n") == 1
    for options in (["--split", "time"], ["--holdout", "0.7"], ["--memory", "0"], ["--output", str(tmp_path / "no/x")]):
        assert main(["inspect", str(good), *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("times", "told"), [(1, "50.0000%"), (9, "50.0000%"), (500, "50.0000%")])
def test_sparsity_counts_a_pair_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], times: int, told: str) -> None:
    events = [(u, (u + n % 2) % 4, n * DAY, 0) for u in range(4) for n in range(2 * times)]
    assert main(["inspect", str(write(tmp_path / "data", events))]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sparsity" in line]
    assert line.split()[-1] == told


@pytest.mark.parametrize("size", ["1", "0.5", "2 GB of it", "50MB", "99MiB", "-1GiB", "1PiB"])
def test_memory_has_one_form_and_a_least_that_is_told(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    """The same of both commands: no size without its unit, and the least named in the message and in the help."""
    for command, least in ((["inspect", str(small.path)], "100MiB"), (["prepare", "--output", str(tmp_path)], "1GiB")):
        assert main([*command, f"--memory={size}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--memory" in error and f"the least is {least}" in error
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert f"at least {least}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("size", ["1GiB", "1500MB", "0.5 gib", "200m"])
def test_memory_with_a_unit_is_taken(small: PreparedData, size: str) -> None:
    assert main(["inspect", str(small.path), "--memory", size]) == 0


def test_ids_that_do_not_fit_the_schema_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", steady(), users=50)
    lines = findings(data, capsys=capsys)
    assert any("outside users.parquet" in line for line in lines)
    assert any("60 users, but schema.yaml says 50" in line for line in lines)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", steady(days=4))
    for place in ("/proc/page.html", "/dev/full", str(tmp_path)):
        assert main(["inspect", str(data), "--output", place]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {place}: ") and error.count("\n") == 1
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@settings(max_examples=60)
@given(st.integers(-500, 500), st.integers(0, 10**7))
def test_bins_of_whole_numbers_hold_each_once(least: int, span: int) -> None:
    most = least + span
    bins = fitting(least, most, whole=True)
    assert (
        (np.diff(bins.edges) > 0).all() and bins.edges[0] <= least and most < bins.edges[-1] and len(bins.edges) <= 32
    )
    assert bins.log == (least > 0 and most > 100 * least)
    # No bin is without a whole number: otherwise the chart has gaps that the data do not have.
    assert (np.ceil(bins.edges[1:]) - np.ceil(bins.edges[:-1]) >= 1).all()
    if span < 30 and not bins.log:
        assert np.diff(bins.edges).tolist() == [1.0] * (span + 1)


@settings(max_examples=60)
@given(st.floats(-1e6, 1e6, width=32), st.floats(2**-10, 1e9, width=32))
def test_bins_of_other_numbers_hold_least_and_most(least: float, span: float) -> None:
    most = least + span
    bins = fitting(least, most, whole=False)
    heights = np.histogram([least, most, (least + most) / 2], bins.edges)[0]
    assert heights.sum() == 3 and (np.diff(bins.edges) >= 0).all()
    assert bins.log == (least > 0 and most > 100 * least)


def values(folder: Path, numbers: Sequence[float]) -> AbstractContextManager[Inspection]:
    """Prepared data in which event n has the value `numbers[n]`."""
    data = write(folder, [(n % 7, n % 5, n * DAY, 0) for n in range(len(numbers))])
    file = data / "interactions/part-00000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(4, "value", pa.array(numbers, pa.float32())), file)
    return opened(data, 2**30)


@pytest.mark.parametrize(
    ("numbers", "kind", "log"),
    [
        ([0.5 * (n % 9) for n in range(90)], Bars, False),
        ([float(n % 70 + 10) for n in range(700)], Histogram, False),
        ([1.5 ** (n % 40) for n in range(400)], Histogram, True),
        ([n % 3 and 1.5 ** (n % 40) for n in range(400)], Histogram, True),
        ([-5.0 + 0.11 * n for n in range(100)], Histogram, False),
    ],
)
def test_the_chart_of_values_fits_them(tmp_path: Path, numbers: list[float], kind: type, log: bool) -> None:
    with values(tmp_path / "data", numbers) as data:
        (chart,) = _values(data)
    assert isinstance(chart, kind)
    if isinstance(chart, Histogram):
        assert chart.log == log
        zeros = sum(number == 0 for number in numbers)
        assert sum(chart.heights) == len(numbers) - (zeros if log else 0)
        assert (f"{zeros} events of value 0" in chart.title) == (log and zeros > 0)
    else:
        assert isinstance(chart, Bars)
        assert chart.labels == [f"{0.5 * n:g}" for n in range(9)] and sum(chart.heights) == len(numbers)


def test_charts_have_names_units_and_the_scale_that_the_data_need(tmp_path: Path) -> None:
    events = [*steady(), *((60, n % 30, n * DAY // 40, 0) for n in range(1100))]
    page = tmp_path / "page.html"
    assert main(["inspect", str(write(tmp_path / "data", events)), "--output", str(page)]) == 0
    html = page.read_text()
    names = (
        "events of the user (log scale)",
        "users",
        "share of events",
        "date, UTC",
        "divergence",
        "events of the item",
    )
    for name in (*names, "time since the event before (log scale)", ">1 h<", ">1 d<"):
        assert name in html, name
    assert "10^" not in html and "mathdefault" not in html


@pytest.mark.parametrize("hours", [4, 24 * 130, 24 * 1000])
def test_dates_of_any_span_have_an_axis(hours: int) -> None:
    times = np.datetime64("2023-11-14T22:13") + np.array([0, hours]) * np.timedelta64(1, "h")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<svg" in draw(Curves("events", "day (UTC)", "events", {"all": (times, [1.0, 2.0])}))
