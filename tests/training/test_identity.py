"""A run knows its data by what they hold, wherever they are: its own are taken, all others are refused in a line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData, fingerprint_of
from flm_torchrec.model.heads import OF_A_DOMAIN
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.prepare.sources.source_data import SourceData
from flm_torchrec.training.checkpoint.storage import read_all

OPTIONS = ["--train.max_steps", "3", "--train.batch_size", "32", "--model.dim", "8", "--data.max_history", "6"]
OPTIONS += ["--eval.ks", "[10]", "--distributed.threads", "1"]


@pytest.fixture(scope="module")
def made(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run, both named by relative paths."""
    folder = tmp_path_factory.mktemp("identity") / "project"
    shutil.copytree(small.path, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--data.path", "data", "--train.run", "runs/one", *OPTIONS]) == 0
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to change, and the folder that commands run in."""
    shutil.copytree(made, tmp_path / "project")
    (tmp_path / "project/runs/one/started_in").write_text(str(tmp_path / "project"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def swap(file: Path, column: str, one: int = 3, other: int = 7) -> None:
    """Let two values of a column change places: all sizes stay."""
    table = pq.read_table(file)
    values = table[column].to_pylist()
    values[one], values[other] = values[other], values[one]
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, table[column].type)), file)


def swap_events(data: Path) -> None:
    swap(next((data / "interactions").glob("*.parquet")), "item_id", 0, 9)


def swap_values(data: Path) -> None:
    swap(min((data / "vocab").glob("item_*.parquet")), "value", 0, 1)


def other_schema(data: Path) -> None:
    file = data / "schema.yaml"
    file.write_text(file.read_text() + "tables: {user_id: {kind: hash, rows: 8}}\n")


CHANGES = [
    lambda data: swap(data / "items.parquet", "item_key"),
    lambda data: swap(data / "users.parquet", "user_key"),
    swap_events,
    swap_values,
    other_schema,
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_what_rows_mean_changes_the_fingerprint(
    small: PreparedData, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(small.path, copy)
    (copy / "report.json").write_text("{}")
    (copy / ".DS_Store").write_bytes(b"x")
    assert fingerprint_of(copy) == small.fingerprint
    change(copy)
    assert fingerprint_of(copy) != small.fingerprint


def test_two_keys_in_the_middle_of_a_large_file_count(small: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(small.path, tmp_path / "large")
    file = tmp_path / "large/items.parquet"
    keys = [f"{key:08d}" for key in np.random.default_rng(0).permutation(60_000)]
    pq.write_table(pa.table({"item_id": np.arange(60_000), "item_key": keys}), file, compression="none")
    before, size = fingerprint_of(tmp_path / "large"), file.stat().st_size
    keys[30_000], keys[30_001] = keys[30_001], keys[30_000]
    pq.write_table(pa.table({"item_id": np.arange(60_000), "item_key": keys}), file, compression="none")
    assert file.stat().st_size == size and fingerprint_of(tmp_path / "large") != before


@pytest.mark.parametrize("change", CHANGES[:1] + CHANGES[3:4])
def test_data_prepared_anew_are_refused_by_every_command(
    project: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    change(project / "data")
    (project / "incoming").mkdir()
    for command in (
        ["evaluate", "--run", "runs/one"],
        ["evaluate", "--run", "runs/one", "--data.path", "data"],
        ["export", "--run", "runs/one", "--output", "out"],
        ["follow", "--run", "runs/one", "--source", "incoming", "--output", "out", "--once"],
        ["finetune", "--finetune.source", "runs/one", "--train.run", "out"],
    ):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "made with other data than data holds now" in told and told.count("\n") == 1, command
        assert "'flm train --train.warm_start runs/one --data.path data --train.run NEW'" in told
    assert not (project / "out").exists()
    assert main(["report", "runs/one"]) == 0
    assert "missing: data: runs/one: made with other data" in capsys.readouterr().out


def without_brand(raw: SourceData) -> SourceData:
    return replace(raw, features=tuple(f for f in raw.features if f.name != "brand"))


def in_another_order(raw: SourceData) -> SourceData:
    return replace(raw, features=raw.features[::-1])


AGAIN: dict[str, tuple[Callable[[SourceData], SourceData], bytes]] = {
    "without a feature": (without_brand, b""),
    "features in another order": (in_another_order, b""),
    "users hashed": (lambda raw: raw, b"s" * 32),
}


@pytest.mark.parametrize("how", AGAIN)
def test_data_prepared_in_another_way_in_the_same_place_are_refused_by_every_command(
    project: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    change, secret = AGAIN[how]
    raw = change(synthetic.read(synthetic.Recipe(users=120, items=150, events=12, seed=1)))
    prepare(raw, project / "data", PrepareOptions(), overwrite=True, secret=secret)
    (project / "incoming").mkdir()
    before = sorted(project.rglob("*"))
    for command, reason in (
        (["evaluate", "--run", "runs/one"], "made with other data"),
        (["export", "--run", "runs/one", "--output", "out"], "made with other data"),
        (["follow", "--run", "runs/one", "--source", "incoming", "--output", "out", "--once"], "made with other data"),
        (["forget", "--data", "data", "--user", "u1", "--run", "runs/one"], "runs/one"),
        (["train", "--config", "runs/one/config.yaml", "--train.existing", "resume"], "runs/one"),
        (["train", "--train.warm_start", "runs/one", "--data.path", "data", "--train.run", "out"], "data: "),
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        told = capsys.readouterr().err
        assert reason in told and told.count("\n") == 1, command
    assert sorted(project.rglob("*")) == before


def test_a_copy_is_as_good_as_the_data_themselves(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = evaluated(project / "runs/one")
    shutil.copytree(project / "data", project / "copy")
    CHANGES[0](project / "data")
    assert evaluated(project / "runs/one", "--data.path", "copy") == table
    assert main(["export", "--run", "runs/one", "--output", "out", "--tower", "none", "--data.path", "copy"]) == 0
    shutil.rmtree(project / "data")
    capsys.readouterr()
    assert main(["evaluate", "--run", "runs/one"]) == 2
    assert "runs/one: its data are not at data; say where they are now with --data.path" in capsys.readouterr().err


def evaluated(run: Path, *options: str) -> dict[str, object]:
    assert main(["evaluate", "--run", str(run), *options]) == 0
    file = run / "evaluation-test.json"
    found = json.loads(file.read_text())
    file.unlink()
    return found


def test_relative_paths_lead_to_the_data_from_any_folder(
    made: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = evaluated(made / "runs/one")  # from the folder of its copy
    # Moved as a whole, and looked at from a third folder: nothing is left where the run was started.
    (project / "runs/one/started_in").write_text(str(tmp_path / "gone"))
    project.rename(tmp_path / "moved")
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    assert evaluated(tmp_path / "moved/runs/one") == table
    assert evaluated(Path("../moved/runs/one")) == table


def tuned(project: Path, *options: str) -> tuple[str, str]:
    """What `flm finetune` says of the tensors that begin anew, and all it says."""
    given = ["--finetune.source", "runs/one", "--train.run", "tuned", "--no-control", *options]
    assert main(["finetune", *given]) == 0
    log = (project / "tuned/pretrained/train.log").read_text()
    found = re.search(r"new: (.*)", log)
    assert found
    return found[1], log


def test_fine_tuning_on_a_copy_keeps_every_table(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project / "data", project / "copy")
    assert tuned(project, "--data.path", "copy")[0] == "none"
    shutil.rmtree(project / "data")
    monkeypatch.chdir(tmp_path)
    table = evaluated(project / "tuned/pretrained")
    project.rename(tmp_path / "moved")
    assert evaluated(tmp_path / "moved/tuned/pretrained") == table
    shutil.rmtree(tmp_path / "moved/runs")
    assert main(["evaluate", "--run", str(tmp_path / "moved/tuned/pretrained")]) == 2


def test_fine_tuning_on_data_prepared_anew_in_the_same_place_moves_rows_by_key(project: Path) -> None:
    CHANGES[1](project / "data")
    still = ["--train.sparse_lr", "0", "--finetune.sparse_lr", "0"]
    fresh, log = tuned(project, "--data.path", "data", *still)
    assert fresh == "none" and "user_id: 120 keys kept, 0 new, 0 dropped" in log
    before, after = (read_all(project / run / "checkpoints/best") for run in ("runs/one", "tuned/pretrained"))
    rows = list(range(120))
    rows[3], rows[7] = 7, 3
    name = "model.users.embedding_bags.user_id.weight"
    assert torch.equal(before[name][rows], after[name]) and not torch.equal(before[name], after[name])


def test_fine_tuning_on_another_domain_takes_no_rows_of_users_and_items(project: Path) -> None:
    schema = project / "data/schema.yaml"
    schema.write_text(schema.read_text().replace("name: synthetic", "name: elsewhere"))
    fresh, log = tuned(project, "--data.path", "data")
    assert "item_id.embeddings.item_id.weight" in fresh and "users.embedding_bags.user_id.weight" in fresh
    assert "item_genre" not in fresh and "another domain, so users and items begin anew" in log
    assert set(re.findall(r"tower\.[\w.]+", fresh)) == {f"tower.{name}" for name in OF_A_DOMAIN}


def test_a_run_that_was_stopped_before_its_first_validation_says_how_to_go_on(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(project / "runs/one/checkpoints/best")
    (project / "incoming").mkdir()
    for command in (
        ["evaluate", "--run", "runs/one"],
        ["export", "--run", "runs/one", "--output", "out"],
        ["follow", "--run", "runs/one", "--source", "incoming", "--output", "out", "--once"],
        ["finetune", "--finetune.source", "runs/one", "--train.run", "out"],
    ):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "stopped before its first validation" in told and "Errno" not in told and told.count("\n") == 1
    resume = re.search(r"'flm (.*?)'", told)
    assert resume
    shutil.rmtree(max((project / "runs/one/checkpoints").glob("step-*")))
    assert main(resume[1].split()) == 0
    assert main(["evaluate", "--run", "runs"]) == 2
    assert "give one of runs/one" in capsys.readouterr().err
    evaluated(project / "runs/one")


def test_a_run_whose_data_forgot_a_user_is_told_to_do_so_too(
    project: Path, small: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forget", "--data", "data", "--user", small.user_keys[4]]) == 0
    tuning = ["finetune", "--finetune.source", "runs/one", "--train.run", "tuned", "--no-control"]
    for command in (["evaluate", "--run", "runs/one"], tuning, [*tuning, "--data.path", "data"]):
        assert main(command) == 2
        assert "'flm forget --data data --run runs/one'" in capsys.readouterr().err
    assert main(["forget", "--data", "data", "--run", "runs/one"]) == 0
    evaluated(project / "runs/one")
    assert tuned(project)[0] == "none"
    # Forgetting moves no ids, so what was fine-tuned goes on with a source that was not brought up to date.
    assert main(["forget", "--data", "data", "--user", small.user_keys[5], "--run", "tuned/pretrained"]) == 0
    evaluated(project / "tuned/pretrained")
