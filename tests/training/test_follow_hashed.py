"""Following a run whose users were hashed: no key of a source comes into it as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flm_torchrec.cli import main
from flm_torchrec.prepare.hash_users import hash_keys
from tests.training.test_follow import NEW, put
from tests.training.test_follow_ids import follow

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def hashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 20 users whose keys were hashed, one of whom is forgotten, a run of them, and the secret."""
    folder = tmp_path_factory.mktemp("hashed")
    log = [f"person-{u},i{(3 * u + n) % 12},{1_700_000_000 + 60 * n}" for u in range(20) for n in range(8)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *log]) + "\n")
    (folder / "secret").write_bytes(SECRET)
    files = ["--input", str(folder / "log.csv"), "--output", str(folder / "data")]
    assert main(["prepare", "--source", "csv", *files, "--hash-users", str(folder / "secret")]) == 0
    paths = ["--data.path", str(folder / "data"), "--train.run", str(folder / "run")]
    options = ["--train.max_steps", "2", "--train.batch_size", "32", "--model.dim", "8", "--data.max_history", "6"]
    assert main(["train", *paths, *options]) == 0
    gone = ["--user", "person-7", "--key-file", str(folder / "secret")]
    assert main(["forget", "--data", str(folder / "data"), *gone, "--run", str(folder / "run")]) == 0
    return folder


def users_of(live: Path) -> list[str]:
    """Keys of the users that a follower knows."""
    return list(pq.read_table(live / "vocabulary/users.parquet")["user_key"].to_pylist())


def test_a_plain_key_is_refused_and_written_nowhere(
    hashed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, live = tmp_path / "source", tmp_path / "live"
    source.mkdir()
    known, new = hash_keys(["person-3", "person-99"], SECRET)
    rows = [{"user": user, "item": "i1", "timestamp": NEW} for user in (known, new, None)]
    put(source / "a.jsonl", [*rows, {**rows[0], "user": "person-3"}])
    assert follow(hashed / "run", source, live) == 2
    error = capsys.readouterr().err
    assert "a.jsonl: row 4: its user is not hashed" in error and "--key-file FILE" in error and error.count("\n") == 1
    assert "person-3" not in error and not live.exists()
    put(source / "a.jsonl", rows)
    assert follow(hashed / "run", source, live) == 0
    assert len(users_of(live)) == 21 and users_of(live)[-1] == new
    put(source / "b.jsonl", [{**rows[0], "user": "person-98"}])
    assert follow(hashed / "run", source, live) == 2  # also where the output is there already
    assert "b.jsonl: row 1: its user is not hashed" in capsys.readouterr().err
    assert all(b"person-" not in file.read_bytes() for file in live.rglob("*") if file.is_file())


def test_keys_are_hashed_with_the_secret_of_the_data(
    hashed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, live = tmp_path / "source", tmp_path / "live"
    source.mkdir()
    put(source / "a.jsonl", [{"user": f"person-{u}", "item": "i1", "timestamp": NEW} for u in (3, 99)])
    assert follow(hashed / "run", source, live, "--key-file", str(hashed / "secret")) == 0
    assert json.loads((live / "follow.json").read_text())["events"] == 2
    assert len(users_of(live)) == 21 and users_of(live)[-1:] == hash_keys(["person-99"], SECRET)
    assert all(b"person-" not in file.read_bytes() for file in live.rglob("*") if file.is_file())
    assert follow(hashed / "run", source, tmp_path / "out", "--key-file", str(tmp_path / "none")) == 2
    assert "none: not found" in capsys.readouterr().err and not (tmp_path / "out").exists()
