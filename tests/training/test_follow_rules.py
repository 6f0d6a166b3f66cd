"""A follower drops what preparation of its run's data dropped: low values and duplicates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flm_torchrec.cli import main
from tests.training.test_follow import put
from tests.training.test_follow_ids import follow

BEGIN = 1_700_000_000


def a_run(folder: Path, *options: str) -> Path:
    """A run of one step on data of 10 users and items that were prepared with options."""
    log = [f"u{u},i{(3 * u + n) % 10},{BEGIN + 60 * n},{1 + n % 5}" for u in range(10) for n in range(8)]
    (folder / "log.csv").write_text("\n".join(["user,item,timestamp,value", *log]) + "\n")
    files = ["--input", str(folder / "log.csv"), "--output", str(folder / "data")]
    columns = "user=user,item=item,timestamp=timestamp,value=value"
    assert main(["prepare", "--source", "csv", *files, "--columns", columns, *options]) == 0
    paths = ["--data.path", str(folder / "data"), "--train.run", str(folder / "run")]
    small = ["--train.max_steps", "1", "--model.dim", "8", "--model.layers", "1", "--data.max_history", "4"]
    assert main(["train", *paths, *small]) == 0
    return folder / "run"


def one(item: str, second: int, **more: Any) -> dict[str, Any]:
    return {"user": "u1", "item": item, "timestamp": BEGIN + second, **more}


def refused(live: Path) -> dict[str, list[str]]:
    report = json.loads((live / "follow.json").read_text())["refused"]
    assert all(entry["rows"] == len(entry["examples"]) for entry in report.values())
    return {reason: entry["examples"] for reason, entry in report.items()}


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        (["--dedup", "exact"], ["a.jsonl: row 1", "a.jsonl: row 3", "b.jsonl: row 1"]),
        (["--dedup", "consecutive"], ["a.jsonl: row 1", "a.jsonl: row 3", "a.jsonl: row 4", "b.jsonl: row 1"]),
        (["--dedup", "window", "--dedup-window", "9"], ["a.jsonl: row 1", "a.jsonl: row 3", "a.jsonl: row 4"]),
        ([], []),
    ],
    ids=["exact", "consecutive", "window", "none"],
)
def test_duplicates_are_dropped_as_preparation_did(tmp_path: Path, options: list[str], dropped: list[str]) -> None:
    """Of events of the data, of a chunk before and of the same chunk; of an item that is new, too."""
    run, source = a_run(tmp_path, *options), tmp_path / "source"
    source.mkdir()
    put(source / "a.jsonl", [one("i0", 420), one("new", 500), one("new", 500), one("new", 505)])
    put(source / "b.jsonl", [one("new", 505), one("i5", 700)])
    if options and options[1] == "window":
        put(source / "b.jsonl", [one("new", 600), one("i5", 700)])
    assert follow(run, source, tmp_path / "live", "--admit-after", "1") == 0
    reason = f"duplicate ({options[1]})" if options else ""
    assert refused(tmp_path / "live") == ({reason: dropped} if options else {})


def test_values_below_the_least_of_the_data_are_dropped(tmp_path: Path) -> None:
    run, source = a_run(tmp_path, "--min-value", "3"), tmp_path / "source"
    source.mkdir()
    put(source / "a.jsonl", [one("i1", 900 + n, value=n) for n in range(5)])
    assert follow(run, source, tmp_path / "live") == 0
    assert refused(tmp_path / "live") == {"value below 3.0": [f"a.jsonl: row {n}" for n in (1, 2, 3)]}


@pytest.mark.parametrize("kind", ["first", "last"])
def test_what_needs_all_events_of_a_user_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run, source = a_run(tmp_path, "--dedup", kind), tmp_path / "source"
    source.mkdir()
    capsys.readouterr()
    assert follow(run, source, tmp_path / "live") == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'data'}: was prepared with --dedup {kind}" in told and "warm_start" in told
    assert told.count("\n") == 1 and not (tmp_path / "live").exists()
