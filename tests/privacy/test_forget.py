"""Forgetting: nothing of a user is left in data, runs and their checkpoints, and all others are as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.claim import InUse, claim
from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.config.schema import LossConfig, ModelConfig
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.hashing import remap_ids
from flm_torchrec.data.schema import Feature, Schema, Table
from flm_torchrec.distributed.candidates import CandidateRanks
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.files import temporary
from flm_torchrec.model.pretrain import PretrainModel, user_weights
from flm_torchrec.prepare.hash_users import hash_keys
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.table_options import parse_tables
from flm_torchrec.privacy import forget_in_data as data_forget
from flm_torchrec.privacy.forget import forget, rows_to_reset
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.manager import user_tensors
from flm_torchrec.training.trainer import pretrain

GONE, STAYS = "u17", "u18"
SETTINGS = ("train.epochs=2", "train.batch_size=16", "train.checkpoint_every=2", "model.dim=16", "loss.negatives=64")
SHOWN = "model.user_id_dropout=0"
"""Every user's row learns, so that there is something to forget."""


def config_of(folder: Path, *more: str) -> list[str]:
    return [*SETTINGS, SHOWN, f"data.path={folder / 'data'}", f"train.run={folder / 'run'}", *more]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data and a run made with it."""
    folder = tmp_path_factory.mktemp("forget")
    prepare(synthetic.read(synthetic.Recipe(users=60, items=100, events=10, seed=3)), folder / "data", PrepareOptions())
    pretrain(load_config(None, config_of(folder)))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    config = tmp_path / "copy/run/config.yaml"
    config.write_text(config.read_text().replace(str(made), str(tmp_path / "copy")))
    return tmp_path / "copy"


def holders(folder: Path, key: str) -> list[str]:
    """Files that hold the key, as bytes or, decompressed, as a whole value."""
    found = []
    for file in (f for f in folder.rglob("*") if f.is_file()):
        values = pq.read_table(file).to_pandas().to_numpy().ravel().tolist() if file.suffix == ".parquet" else []
        if key in [v for v in values if isinstance(v, str)] or key.encode() in file.read_bytes():
            found.append(file.name)
    return found


def test_nothing_of_the_user_is_left_and_others_are_as_before(copy: Path) -> None:
    data, run = copy / "data", copy / "run"
    before, states = load_prepared(data), list((run / "checkpoints").iterdir())
    old = {s.name: storage.read_all(s) for s in states}
    row = before.user_keys.index(GONE)
    assert holders(copy, GONE)

    forget(data, [GONE], [run], [])

    assert holders(copy, GONE) == []
    after = load_prepared(data)
    assert after.offsets[row] == after.offsets[row + 1]
    assert [k for k in after.user_keys if k != data_forget.tombstone(row)] == [k for k in before.user_keys if k != GONE]
    other = np.repeat(np.arange(before.schema.users), np.diff(before.offsets)) != row
    assert np.array_equal(after.item, before.item[other]) and np.array_equal(after.timestamp, before.timestamp[other])
    assert after.schema.interactions == len(after.item)
    assert [after.users.sparse[n].row(row).tolist() for n in after.users.sparse] == [[]] * len(after.users.sparse)
    assert (run / "vocabulary/fingerprint").read_text() == after.fingerprint
    told = json.loads((data / "report.json").read_text())["forgotten"]
    assert told["users"] == 1 and told["events"] == int((~other).sum())

    assert len(states) >= 2
    for state in states:
        assert storage.damage(state) == [] and storage.read_meta(state)["data"] == after.fingerprint
        for name, tensor in storage.read_all(state).items():
            was = old[state.name][name]
            if "users.embedding_bags.user_id" in name:
                assert was[row].any() and not tensor[row].any(), name
                was[row] = 0
            if "users.embedding_bags.user_interests" not in name:
                assert torch.equal(tensor, was), name


def test_training_goes_on_and_others_metrics_are_as_before(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = copy / "data", copy / "run"
    question = ["evaluate", "--run", str(run), "--user", STAYS, "--markdown"]
    rows = ("content", "sequential", "collaborative", "fused")

    def metrics() -> list[str]:
        """The ranks of the true items. The second table counts training events, of which some will be gone."""
        assert main(question) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if any(f"| {r} |" in line for r in rows)]
        return told[: len(rows)]

    before = metrics()
    assert main(["forget", "--data", str(data), "--user", GONE, "--run", str(run)]) == 0
    assert GONE not in capsys.readouterr().out
    assert metrics() == before and before
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))  # as if it had been killed before the end
    finished = pretrain(load_config(None, config_of(copy, "train.existing=resume")))
    assert "resuming after step" in (run / "train.log").read_text()
    assert finished.steps > 0


@pytest.mark.parametrize("step", ["forget_rows", "write", "exchange"])
def test_after_an_interruption_the_same_call_does_the_rest(
    copy: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flm_torchrec.privacy import forget as module

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    place = {"forget_rows": (data_forget, "replacing"), "write": (storage, "write"), "exchange": (module, "replacing")}
    with monkeypatch.context() as patch:
        patch.setattr(*place[step], kill)
        with pytest.raises(Killed):
            forget(copy / "data", [GONE], [copy / "run"], [])
    assert load_prepared(copy / "data").schema.users == 60  # the old or the new, never a half
    forget(copy / "data", [GONE], [copy / "run"], [])
    assert holders(copy, GONE) == [] and len(list(copy.iterdir())) == 2


def test_a_kill_between_the_two_renames_is_mended(copy: Path) -> None:
    fresh, older = (temporary(copy / "data", kind) for kind in ("new", "old"))
    shutil.copytree(copy / "data", fresh)
    (copy / "data").rename(older)
    forget(copy / "data", [GONE], [copy / "run"], [])
    assert holders(copy, GONE) == [] and not fresh.exists() and not older.exists()


def test_modes_and_neighbours_stay(copy: Path) -> None:
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    for place in (copy / ".data.forgetting", copy / ".data.before-forgetting", copy / "run/.vocabulary.forgetting"):
        place.mkdir()
        (place / "mine").touch()
    forget(copy / "data", [GONE], [copy / "run"], [])
    assert holders(copy, GONE) == [] and len(list(copy.rglob("mine"))) == 3
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (copy / "data").rglob("*") if p.is_file())
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (copy / "run").rglob("*") if p.is_file() and p.name != "mine")
    assert (copy / "data").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("busy", ["data", "run"])
def test_what_another_job_writes_is_not_forgotten_from(copy: Path, busy: str) -> None:
    before = holders(copy, GONE)
    with claim(copy / busy), pytest.raises(InUse, match=rf"{busy}: process \d+ on .* is writing it"):
        forget(copy / "data", [GONE], [copy / "run"], [])
    assert holders(copy, GONE) == before
    forget(copy / "data", [GONE], [copy / "run"], [])
    assert holders(copy, GONE) == []


def test_a_link_to_data_stays_one(copy: Path) -> None:
    (copy / "linked").symlink_to(copy / "data")
    forget(copy / "linked", [GONE], [], [])
    assert (copy / "linked").is_symlink() and holders(copy / "data", GONE) == []


def test_a_run_left_out_is_brought_up_to_date_later(copy: Path) -> None:
    forget(copy / "data", [GONE], [], [])
    forget(copy / "data", [STAYS], [], [])
    assert holders(copy / "run", GONE)
    assert "forgotten so far (2)" in forget(copy / "data", [], [copy / "run"], [])[0]
    assert holders(copy, GONE) == holders(copy, STAYS) == []


def test_an_export_that_has_the_user_is_not_called_done(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = copy / "export"
    export.mkdir()
    pl.DataFrame({"user_id": [17, 18], "user_key": [GONE, STAYS]}).write_parquet(export / "users.parquet")
    command = ["forget", "--data", str(copy / "data"), "--user", GONE, "--export", str(export)]
    for _ in range(2):  # the second time only the export has it
        assert main(command) == 2
        assert "flm export --overwrite" in capsys.readouterr().err
    pl.DataFrame({"user_id": [18], "user_key": [STAYS]}).write_parquet(export / "users.parquet")
    assert main(command) == 2  # nobody knows it any more
    assert "nearest" in capsys.readouterr().err


def test_a_hashed_key_is_found_by_its_plain_one(copy: Path, tmp_path: Path) -> None:
    secret, users = b"s" * 32, copy / "data/users.parquet"
    frame = pl.read_parquet(users)
    frame.with_columns(user_key=pl.Series(hash_keys(frame["user_key"], secret))).write_parquet(users)
    (tmp_path / "secret").write_bytes(secret)
    (tmp_path / "who").write_text(f"{GONE}\n{STAYS}\n")
    files = ["--users", str(tmp_path / "who"), "--key-file", str(tmp_path / "secret")]
    assert main(["forget", "--data", str(copy / "data"), *files]) == 0
    assert set(hash_keys([GONE, STAYS], secret)).isdisjoint(pl.read_parquet(users)["user_key"])


def test_an_unknown_id_is_told_which_id_is_asked_for(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, users, secret = copy / "data", copy / "data/users.parquet", tmp_path / "secret"
    secret.write_bytes(b"s" * 32)

    def told(*options: str) -> str:
        assert main(["forget", "--data", str(data), *options]) == 2
        return capsys.readouterr().err

    with_key = ("--key-file", str(secret))
    assert f"user '{GONE}': " in (line := told("--user", GONE, *with_key)) and "are not hashed: leave out" in line
    frame = pl.read_parquet(users)
    frame.with_columns(user_key=pl.Series(hash_keys(frame["user_key"], b"t" * 32))).write_parquet(users)
    assert "as the source has it, and --key-file" in told("--user", GONE)
    assert f"user '{GONE}': " in (line := told("--user", GONE, *with_key)) and "that the secret is the one" in line


def test_a_value_that_nobody_else_has_goes_too(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u in "abc" for i in range(5)))
    (tmp_path / "users.csv").write_text("user_id,mail,town\na,a@x.org,Ulm\nb,b@x.org,Ulm\nc,,Bonn\n")
    made = [
        "prepare", "--source", "csv", "--input", str(tmp_path / "events.csv"), "--output", str(tmp_path / "data"),
        "--columns", "user=user_id,item=item_id", "--users", str(tmp_path / "users.csv"),
        "--user-features", "mail:categorical,town:categorical",
    ]  # fmt: skip
    assert main(made) == 0
    forget(tmp_path / "data", ["a"], [], [])
    assert holders(tmp_path / "data", "a@x.org") == []
    assert holders(tmp_path / "data", "b@x.org") and holders(tmp_path / "data", "Ulm")


@given(gone=st.sets(st.integers(0, 119), min_size=1, max_size=119), cut=st.integers(1, 119), group=st.integers(20, 400))
@settings(max_examples=8)
def test_whoever_is_forgotten_all_others_keep_their_rows(
    small: PreparedData, tmp_path_factory: pytest.TempPathFactory, gone: set[int], cut: int, group: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "data"
    shutil.copytree(small.path, folder)
    file = folder / "interactions/part-00000.parquet"
    rows = pl.read_parquet(file)
    for part, half in enumerate((rows.filter(pl.col("user_id") < cut), rows.filter(pl.col("user_id") >= cut))):
        half.write_parquet(folder / f"interactions/part-{part:05d}.parquet", row_group_size=group)
    data_forget.forget_rows(folder, [small.user_keys[user] for user in gone])
    after = pl.read_parquet(folder / "interactions/*.parquet")
    assert after.equals(rows.filter(~pl.col("user_id").is_in(list(gone))))
    assert data_forget.forgotten_users(folder / "users.parquet").tolist() == sorted(gone)
    kept = ~pl.col("user_id").is_in(list(gone))
    before = pl.read_parquet(small.path / "users.parquet").filter(kept)
    assert pl.read_parquet(folder / "users.parquet").filter(kept).equals(before)
    load_prepared(folder)


def test_of_a_hashed_table_the_shared_row_is_reset(tmp_path: Path) -> None:
    source = synthetic.read(synthetic.Recipe(users=40, items=100, events=8, seed=1))
    prepare(source, tmp_path / "data", PrepareOptions(tables=parse_tables("user_id=hash:8")))
    forget(tmp_path / "data", [GONE], [], [])
    data = load_prepared(tmp_path / "data")
    gone = data_forget.forgotten_users(tmp_path / "data/users.parquet")
    row = remap_ids(data.schema.table("user_id"), gone)
    assert rows_to_reset(data, gone)["user_id"].tolist() == row.tolist() and 0 <= row[0] < 8


def test_what_cannot_be_done_is_told_before_anything_changes(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = str(copy / "data"), str(copy / "run")
    before = load_prepared(data).fingerprint

    def refused(*arguments: str, says: str) -> None:
        assert main(["forget", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
        assert load_prepared(data).fingerprint == before

    refused("--data", data, says="nobody")
    refused("--data", str(tmp_path / "none"), "--user", GONE, says="not found")
    refused("--data", data, "--user", "u1777", says="nearest: u")
    refused("--data", data, "--users", str(tmp_path / "none"), says="one id a line")
    refused("--data", data, "--user", GONE, "--key-file", str(tmp_path / "none"), says="not found")
    refused("--data", data, "--user", GONE, "--run", str(tmp_path), says="no run folder")
    refused("--data", data, "--user", GONE, "--export", str(tmp_path / "none"), says="not found")
    schema = copy / "run/vocabulary/schema.yaml"
    shared = schema.read_text()
    schema.write_text(shared + "tables:\n  user_id: {kind: zch, rows: 8}\n")
    refused("--data", data, "--user", GONE, "--run", run, says="managed (zch)")
    schema.write_text(shared)
    (copy / "run/checkpoints/best/meta.json").write_text("{}")
    refused("--data", data, "--user", GONE, "--run", run, says="has changed since")
    (copy / "run/vocabulary/fingerprint").write_text("0" * 64)
    refused("--data", data, "--user", GONE, "--run", run, says="other data")
    file = copy / "data/interactions/part-00000.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert main(["forget", "--data", data, "--user", GONE]) == 2
    assert "not a readable Parquet file" in capsys.readouterr().err and len(list(copy.iterdir())) == 2
    file.write_bytes(whole)
    (copy / "data/report.json").write_text("{")
    refused("--data", data, "--user", GONE, says="report.json: not readable")


def test_the_tensors_of_users_are_those_of_the_model(tmp_path: Path) -> None:
    """By name, for fixed, hashed and managed tables; a managed one has no row of which it is known whose it is."""
    kinds = {"user_id": Table("hash", 8), "user_country": Table("zch", 16)}
    features = [Feature(n, "user", "categorical", n, table=n, cardinality=5) for n in ("user_country", "user_age")]
    schema = Schema("made", "up", users=20, items=9, interactions=50, features=tuple(features), tables=kinds)
    model = PretrainModel(
        schema,
        ModelConfig(dim=8, attention_heads=1),
        LossConfig(),
        5,
        CandidateRanks(Comm(0, 1, 1, torch.device("cpu"))),
    )
    weights = {name for name in model.state_dict() if name.startswith("users.")}
    assert set(user_weights(schema).values()) == weights and len(weights) == 2
    stored = [f"model.{name}" for name in weights] + [f"optimizer.tables.{name}.x.momentum1" for name in weights]
    by_table = user_tensors(schema, [*stored, "optimizer.tables.users.embedding_bags.user_ages.weight.x.momentum1"])
    assert sorted(by_table) == ["user_age", "user_id"]
    assert sorted(n for weight, state in by_table.values() for n in (weight, *state)) == sorted(stored)
