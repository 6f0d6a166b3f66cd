"""Logs larger than memory: shards at any address, malformed lines, resumption, the same bytes however prepared."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.claim import claim
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import load_prepared
from flm_torchrec.prepare.sources import lines
from flm_torchrec.prepare.sources.source_data import IN_MEMORY
from flm_torchrec.prepare.work_folder import work_folder
from tests.conftest import ROOT

GOOD = [("ann", "x", 3), ("bob", "y", 1), ("ann", "z", 2)]
HEADER = b"user_id,item_id,timestamp\n"


def flm(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments)])


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder: Path) -> list[tuple[str, str, int]]:
    data = load_prepared(folder)
    both = zip(data.event_users(), data.item, data.timestamp.tolist(), strict=True)
    return [(data.user_keys[u], data.item_keys[i], t) for u, i, t in both]


BAD_CSV = st.sampled_from([
    b"ann,x", b"ann,x,1,2", b'ann,"x,1', b"\xff\xfe,x,1", b"a\x00b,x,1", b"a\rb,x,1", b",x,1", b"ann,,1", b"ann,x,",
    b"ann,x,soon", b"ann,x,-5", b"ann,x,99999999999999999999", b'"",x,1', b"{}", b"ann;x;1",
])  # fmt: skip
BAD_JSON = st.sampled_from([
    b"{", b"[]", b"null", b"1", b'{"user_id": "a"', b'{"user_id": ["a"], "item_id": "x", "timestamp": 1}',
    b'{"user_id": "a", "item_id": {"b": 1}, "timestamp": 1}', b'{"user_id": null, "item_id": "x", "timestamp": 1}',
    b'{"item_id": "x", "timestamp": 1}', b'{"user_id": "a", "item_id": "x", "timestamp": "soon"}', b"\xff",
    b'{"user_id": "a", "item_id": "x", "timestamp": NaN}', b'{"user_id": "a\x00", "item_id": "x", "timestamp": 1}',
    b"ann,x,1", b'{"user_id": "a", "item_id": "x", "timestamp": -1}', b'{"user_id": "a" "item_id": "x"}',
])  # fmt: skip
ENDS = st.sampled_from([b"\n", b"\r\n"])


def good_csv(event: tuple[str, str, int]) -> bytes:
    return f'{event[0]},"{event[1]}",{event[2]}'.encode()


def good_json(event: tuple[str, str, int]) -> bytes:
    return json.dumps({"item_id": event[1], "user_id": event[0], "timestamp": event[2]}).encode()


@settings(max_examples=15)
@given(data=st.data(), kind=st.sampled_from(["csv", "jsonl"]), block=st.integers(1, 60), end=ENDS, closed=st.booleans())
def test_every_malformed_line_is_counted_with_its_row(tmp_path_factory, data, kind, block, end, closed) -> None:  # type: ignore[no-untyped-def]
    good, bad = (good_csv, BAD_CSV) if kind == "csv" else (good_json, BAD_JSON)
    drawn = data.draw(st.lists(st.one_of(st.sampled_from(GOOD), bad), min_size=1, max_size=12))
    drawn.append(GOOD[0])
    text = [good(one) if isinstance(one, tuple) else one for one in drawn]
    folder = tmp_path_factory.mktemp("fuzz")
    body = (HEADER if kind == "csv" else b"") + end.join(text) + (end if closed else b"")
    (folder / f"l.{kind}").write_bytes(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        call = ("--source", kind, "--input", folder / f"l.{kind}", "--output", folder / "out", "--max-dropped", "1")
        assert flm(*call) == 0
    found = report(folder / "out")
    assert sorted(rows(folder / "out")) == sorted(one for one in drawn if isinstance(one, tuple))
    assert found["rows_read"] == len(drawn)
    dropped = [n for n, one in enumerate(drawn, start=1) if not isinstance(one, tuple)]
    assert sum(d["rows"] for d in found["dropped"].values()) == len(dropped)
    examples = [example.split(": row ") for d in found["dropped"].values() for example in d["examples"]]
    named = [int(row) for _, row in examples]
    assert set(named) <= set(dropped) and {name for name, _ in examples} <= {f"l.{kind}"}
    assert len(dropped) > 5 or sorted(named) == dropped


@settings(max_examples=25)
@given(st.binary(max_size=200), st.sampled_from(["csv", "jsonl"]))
def test_no_bytes_crash_it(tmp_path_factory, body, kind) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("bytes")
    (folder / f"l.{kind}").write_bytes((HEADER if kind == "csv" else b"") + body)
    assert flm("--source", kind, "--input", folder / f"l.{kind}", "--output", folder / "out") in (0, 2)


def write_logs(folder: Path, kind: str = "csv", files: int = 5) -> Path:
    folder.mkdir(parents=True)
    for n in range(files):
        events = [(f"u{(n * 7 + i) % 11}", f"i{(i * i + n) % 9}", 1000 + i * (n + 1)) for i in range(60)]
        body = b"\n".join((good_csv if kind == "csv" else good_json)(e) for e in events) + b"\n"
        (folder / f"{n}.{kind}").write_bytes((HEADER if kind == "csv" else b"") + body)
    return folder


def test_the_same_bytes_however_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flm_torchrec.prepare.interactions.ROWS_PER_BUCKET", 50)
    cleaning = ("--dedup", "exact", "--min-item-events", "2", "--session-gap", "20")
    made = {}
    for name, kind, machine in (
        ("one", "csv", ("--threads", "1", "--memory", "1GiB")),
        ("two", "csv", ("--threads", "2", "--memory", "3GiB")),
        ("three", "jsonl", ()),
    ):
        logs = write_logs(tmp_path / name / "logs", kind)
        assert flm("--source", kind, "--input", logs, "--output", tmp_path / name / "out", *cleaning, *machine) == 0
        made[name] = contents(tmp_path / name / "out")
    assert made["one"] == made["two"] and len(made["one"]) > 6
    tables = [n for n in made["one"] if n.endswith(".parquet")]
    assert {n: made["one"][n] for n in tables} == {n: made["three"][n] for n in tables}


def test_any_address_and_gzip(tmp_path: Path) -> None:
    logs = write_logs(tmp_path / "logs")
    memory = fsspec.filesystem("memory")
    for file in logs.iterdir():
        memory.pipe(f"/logs/{file.name}.gz", gzip.compress(file.read_bytes()))
    assert flm("--source", "csv", "--input", logs, "--output", tmp_path / "a") == 0
    assert flm("--source", "csv", "--input", "memory://logs/*.csv.gz", "--output", tmp_path / "b") == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a")) == 300
    memory.rm("/logs", recursive=True)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("harm", ["cut off", "garbage in it", "not packed"])
def test_text_that_cannot_be_unpacked_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, harm: str
) -> None:
    plain = next(write_logs(tmp_path / "logs", kind, files=1).glob("*")).read_bytes()
    packed = gzip.compress(plain)
    half = len(packed) // 2
    harmed = {"cut off": packed[:half], "garbage in it": packed[:half] + b"\xff" * 99, "not packed": plain}[harm]
    file = tmp_path / f"a.{kind}.gz"
    file.write_bytes(harmed)
    assert flm("--source", kind, "--input", file, "--output", tmp_path / "out") == 2
    assert f"{file}: cannot be read to its end" in capsys.readouterr().err
    assert not list(tmp_path.glob(".out*"))


KILLED = """
import os, signal, sys
from flm_torchrec.prepare import intake
from flm_torchrec.cli import main
take = intake.Intake.__call__
def call(self, number, shard):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    take(self, number, shard)
intake.Intake.__call__ = call
main(sys.argv[1:])
"""


def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = write_logs(tmp_path / "logs")
    call = ["prepare", "--source", "csv", "--input", str(logs), "--output", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *call], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    (work,) = [p for p in tmp_path.iterdir() if p.name.startswith(".out.work-")]
    done = {p.name: p.stat().st_mtime_ns for p in work.glob("rows-*.parquet")}
    assert len(done) == 3
    opened: list[str] = []
    monkeypatch.setattr("flm_torchrec.prepare.sources.shards.CsvShard.batches", _told(opened))
    assert main(call) == 0
    assert opened == ["3.csv", "4.csv"]
    monkeypatch.undo()
    assert flm("--source", "csv", "--input", logs, "--output", tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "out", "whole"]


def _told(opened: list[str]):  # type: ignore[no-untyped-def]
    from flm_torchrec.prepare.sources.shards import CsvShard

    batches = CsvShard.batches

    def telling(self, dropped):  # type: ignore[no-untyped-def]
        opened.append(self.name)
        return batches(self, dropped)

    return telling


def test_work_on_other_files_is_not_taken_for_this(tmp_path: Path) -> None:
    logs = write_logs(tmp_path / "logs")
    stale = tmp_path / ".out.work-0123456789abcdef"
    stale.mkdir()
    (stale / "rows-000000.parquet").write_bytes(b"old")
    assert flm("--source", "csv", "--input", logs, "--output", tmp_path / "out") == 0
    assert not stale.exists()
    before = contents(tmp_path / "out")
    time.sleep(0.01)
    (logs / "0.csv").write_bytes(HEADER + b"new,i1,5\n")
    assert flm("--source", "csv", "--input", logs, "--output", tmp_path / "out", "--overwrite") == 0
    assert contents(tmp_path / "out") != before and ("new", "i1", 5) in rows(tmp_path / "out")


def test_users_are_hashed_and_other_columns_never_read(tmp_path: Path) -> None:
    import hashlib
    import hmac

    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "l.csv").write_text("user_id,item_id,timestamp,email\nann,x,1,ann@home.example\nbob,y,2,b@x.example\n")
    (tmp_path / "u.csv").write_text("user_id,age\nann,30\nbob,50\n")
    options = ("--users", tmp_path / "u.csv", "--user-features", "age:numeric", "--hash-users", tmp_path / "key")
    assert flm("--source", "csv", "--input", tmp_path / "l.csv", "--output", tmp_path / "out", *options) == 0
    data = load_prepared(tmp_path / "out")
    hashed = {hmac.new(bytes(range(32)), k, hashlib.sha256).hexdigest(): v for k, v in ((b"ann", -1), (b"bob", 1))}
    assert {k: round(float(v) * 2**0.5) for k, v in zip(data.user_keys, data.users.dense[:, 0], strict=True)} == hashed
    everything = b"".join(contents(tmp_path / "out").values())
    tables = "".join(str(pl.read_parquet(p).rows()) for p in (tmp_path / "out").rglob("*.parquet"))
    for secret in ("ann", "bob", "home.example", bytes(range(32)).hex()):
        assert secret.encode() not in everything and secret not in tables


def test_memory_runs_out_in_one_line(  # type: ignore[no-untyped-def]
    tmp_path: Path, capsys, monkeypatch
) -> None:
    import duckdb

    def full(*_: object) -> None:
        raise duckdb.OutOfMemoryException("Out of Memory Error: could not allocate")

    monkeypatch.setattr("flm_torchrec.prepare.engine.DuckEngine.write", full)
    logs = write_logs(tmp_path / "logs")
    assert flm("--source", "csv", "--input", logs, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--memory: too little" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_two_preparations_of_one_output_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_logs(tmp_path / "logs")
    other = tmp_path / ".out.work-0123456789abcdef"
    other.mkdir()
    with claim(tmp_path / "out"):
        assert flm("--source", "csv", "--input", logs, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert f"process {os.getpid()} on '{socket.gethostname()}' is writing it" in error and other.is_dir()
    assert flm("--source", "csv", "--input", logs, "--output", tmp_path / "out") == 0
    assert not other.exists()


@pytest.mark.parametrize(("made_of", "left"), [("events.csv", 1), (IN_MEMORY, 0)])
def test_ctrl_c_leaves_only_what_the_next_preparation_goes_on_from(tmp_path: Path, made_of: str, left: int) -> None:
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "out", [made_of]):
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == left
