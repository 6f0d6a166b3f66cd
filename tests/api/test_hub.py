"""A run that is pushed and pulled is the run; a folder that is not as it was written is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.api import hub
from flm_torchrec.api.evaluation import EvaluateOptions, evaluate_run
from flm_torchrec.api.model_card import model_card
from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import RunError
from flm_torchrec.files import sha256

pytest.importorskip("safetensors", reason="an environment from before safetensors was pinned; run make venv")
from safetensors.torch import load_file, save_file

from flm_torchrec.training.checkpoint import tensor_files
from flm_torchrec.training.checkpoint.tensor_files import read_tensors, write_tensors

EVALUATE = ["evaluate", "--eval.baselines", "[]", "--run"]


@pytest.fixture(scope="module")
def run(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training with its evaluation."""
    run = tmp_path_factory.mktemp("hub") / "shop"
    options = ["--model.dim", "16", "--model.layers", "1", "--train.batch_size", "32", "--train.max_steps", "2"]
    options += ["--train.eval_users", "20", "--data.path", str(small.path), "--train.run", str(run)]
    assert main(["train", *options]) == 0 and main([*EVALUATE, str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def pushed(run: Path) -> Path:
    folder = run.parent / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHARD_BYTES", 9000)
        assert main(["push", str(run), str(folder)]) == 0
    return folder


def test_a_pulled_run_evaluates_to_the_same_bits(run: Path, pushed: Path, tmp_path: Path) -> None:
    """Its tables were in several files, some of them cut between rows."""
    parts = json.loads((pushed / hub.MANIFEST).read_text())["tensors"]
    assert any(len(of) > 1 for of in parts.values()) and len(list(pushed.glob("tables-*.safetensors"))) > 2
    again = tmp_path / "again"
    assert main(["pull", str(pushed), str(again)]) == 0
    assert main([*EVALUATE, str(again)]) == 0
    assert (again / "evaluation-test.json").read_bytes() == (run / "evaluation-test.json").read_bytes()


def test_the_folder_has_a_card_and_no_pickle(pushed: Path, run: Path, small: PreparedData) -> None:
    card = (pushed / hub.CARD).read_text()
    found = json.loads((run / "evaluation-test.json").read_text())["table"]["fused"]
    assert f"{found['ndcg@10']:.4f}" in card and f"{small.schema.users:,} users" in card and "`brand`" in card
    assert all(f"## {title}" in card for title in ("Data", "Model", "Metrics", "Intended use", "Limits", "Load it"))
    kinds = {file.suffix for file in pushed.rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".json", ".yaml", ".parquet", ".md", ""}
    assert [file.name for file in pushed.rglob("*") if file.is_file() and not file.suffix] == ["fingerprint"]
    assert str(run) not in card


def test_other_seeds_give_the_card_deviations(
    run: Path, pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, folder = tmp_path / "other", tmp_path / "folder"
    shutil.copytree(run, other)
    record = json.loads((other / "evaluation-test.json").read_text())
    record["table"]["fused"]["ndcg@10"] += 0.2
    (other / "evaluation-test.json").write_text(json.dumps(record))
    command = ["push", str(run), str(folder), "--seeds", str(other)]
    assert main(command) == 2 and "has the same seed" in capsys.readouterr().err and not folder.exists()
    settings = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(settings.replace("seed: 0", "seed: 1"))
    assert main(command) == 0
    card = (folder / hub.CARD).read_text()
    assert f"{record['table']['fused']['ndcg@10'] - 0.1:.4f} ± 0.1414" in card and "of 2 trainings" in card
    assert "one training" in (pushed / hub.CARD).read_text()


def test_names_of_an_evaluation_cannot_change_the_card(run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        shutil.copytree(run, folder)
        (folder / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", f"seed: {seed}"))
        record = json.loads((run / "evaluation-test.json").read_text())
        record["table"]["a\n# b"] = record["table"]["content"]
        (folder / "evaluation-test.json").write_text(json.dumps(record))
    for number, seeds in enumerate(([], folders[1:])):
        hub.push(folders[0], tmp_path / str(number), seeds)
        card = (tmp_path / str(number) / hub.CARD).read_text()
        assert r"| a\n# b |" in card and "\n# b" not in card


def test_names_of_labels_cannot_change_the_card(run: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    shutil.copytree(run / "vocabulary", folder / "vocabulary")
    labels = {"label/auc": 0.625, "label/a\n# b/auc": 0.75, "label/buy/auc": 0.5, "label/buy/ne": 1}
    card = model_card(folder, {"step": 1, "valid": labels}, {})
    assert "| label | 0.6250 |  |\n" in card and "| label/a\\n# b | 0.7500 |  |\n" in card and "\n# b" not in card
    assert "| validation | auc | ne |\n" in card and "| label/buy | 0.5000 | 1.0000 |\n" in card


def test_the_card_of_a_quick_evaluation_says_so(run: Path, tmp_path: Path, small: PreparedData) -> None:
    quick = tmp_path / "quick"
    shutil.copytree(run, quick)
    assert main(["evaluate", "--run", str(quick), "--sample", "9", "--eval.baselines", "[popularity]"]) == 0
    hub.push(quick, tmp_path / "pushed")
    card = (tmp_path / "pushed" / hub.CARD).read_text()
    assert f"test: 9 of {small.schema.users} users, drawn once, every item ranked" in card
    assert "Of the default baselines, not ranked: item-kNN, Markov, EASE-R." in card


def test_the_seeds_rank_a_sample_of_the_same_users(run: Path, tmp_path: Path, small: PreparedData) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    options = EvaluateOptions(drawn=9, overrides=["eval.baselines=[]"])
    found, same = (evaluate_run(folder, options) for folder in (run, other))
    assert found.examples.user.tolist() == same.examples.user.tolist()
    assert found.evaluation.examples == same.evaluation.examples
    rest = found.examples.take(np.arange(8))
    assert rest.digest(small) != found.evaluation.examples == found.examples.digest(small)


def test_neither_writes_over_what_is_there(run: Path, pushed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: sha256(file) for file in (*run.rglob("*"), *pushed.rglob("*")) if file.is_file()}
    assert main(["push", str(run), str(pushed)]) == 2 and main(["pull", str(pushed), str(run)]) == 2
    assert capsys.readouterr().err.count("is there already; give another folder") == 2
    assert {file: sha256(file) for file in before} == before


def test_what_is_no_run_is_not_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), str(tmp_path / "out")]) == 2
    assert main(["pull", str(tmp_path), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "no config.yaml" in told[0] and "is this a folder of 'flm push'?" in told[1]
    assert list(tmp_path.iterdir()) == []


def relist(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Make the manifest fit the files, as somebody would who means harm; then change it."""
    file = folder / hub.MANIFEST
    manifest = json.loads(file.read_text())
    for name, listed in manifest["files"].items():
        listed |= {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    change(manifest)
    file.write_text(json.dumps(manifest))


def dense(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / tensor_files.DENSE)
    change(tensors)
    save_file(tensors, folder / tensor_files.DENSE)
    relist(folder)


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.dense.another"] = tensors.pop(min(tensors))


def enlarged(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] = torch.zeros(1000, 1000)


def linked(folder: Path) -> None:
    (folder / hub.CONFIG).rename(folder.parent / "elsewhere.yaml")
    (folder / hub.CONFIG).symlink_to(folder.parent / "elsewhere.yaml")


def header(folder: Path, content: bytes) -> None:
    file = folder / tensor_files.DENSE
    file.write_bytes(content)
    relist(folder)


def listing(name: str) -> Callable[[Path], None]:
    return lambda folder: relist(folder, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))


def edited(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(text)
        relist(folder)

    return edit


TOO_SHORT = (63).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}  '
OUTSIDE = {"file": "../x", "dtype": "int8", "shape": []}
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda f: (f / tensor_files.DENSE).unlink(), "No such file"),
    "cut file": (lambda f: (f / hub.META).write_bytes((f / hub.META).read_bytes()[:-1]), "manifest.json says"),
    "changed byte": (lambda f: (f / hub.META).write_bytes((f / hub.META).read_bytes()[:-1] + b"]"), "has changed"),
    "missing tensor": (lambda f: dense(f, lambda t: t.pop(min(t))), "has no tensor 'model.dense."),
    "renamed tensor": (lambda f: dense(f, renamed), "does not name, 'model.dense.another'"),
    "oversized tensor": (lambda f: dense(f, enlarged), "is float32 [1000, 1000], not float32"),
    "header too long": (lambda f: header(f, (2**62).to_bytes(8, "little") + b"{}"), "not readable as safetensors"),
    "header of data that are not there": (lambda f: header(f, TOO_SHORT), "not readable as safetensors"),
    "pickle": (lambda f: header(f, b"\x80\x04cos\nsystem\n"), "not readable as safetensors"),
    "path out": (listing("../evil.yaml"), "is no file of a hub folder"),
    "path inside and out": (listing("vocabulary/../../evil"), "is no file of a hub folder"),
    "absolute path": (listing("/etc/passwd"), "is no file of a hub folder"),
    "link": (linked, "is a link"),
    "tensor of another file": (
        lambda f: relist(f, lambda m: m["tensors"].update({"model.x": [OUTSIDE]})),
        "does not list '../x'",
    ),
    "state of an optimizer": (
        lambda f: relist(f, lambda m: m["tensors"].update({"optimizer.x": m["tensors"][min(m["tensors"])]})),
        "is no tensor of a model",
    ),
    "format": (lambda f: relist(f, lambda m: m.update(format=2)), "format 2, this version reads 1"),
    "unknown key": (lambda f: relist(f, lambda m: m.update(code="import os")), "code"),
    "negative size": (lambda f: relist(f, lambda m: m["files"][hub.META].update(bytes=-1)), "bytes"),
    "no manifest": (lambda f: (f / hub.MANIFEST).write_text("[" * 5000), "not readable"),
    "config": (edited(hub.CONFIG, "train: {epoch: 3}"), "did you mean 'epochs'"),
    "other data": (edited("vocabulary/fingerprint", "0" * 64), "is of other data"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_one_line_and_leaves_nothing(
    pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = Path(shutil.copytree(pushed, tmp_path / "folder"))
    harm, told = HOSTILE[name]
    harm(folder)
    before = sorted(tmp_path.iterdir())
    assert main(["pull", str(folder), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and error.startswith("error: "), error
    assert sorted(tmp_path.iterdir()) == before


def test_a_tensor_that_the_model_has_not_is_refused_when_it_is_loaded(
    pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest and the file agree with each other, and not with the settings."""
    folder = Path(shutil.copytree(pushed, tmp_path / "folder"))
    tensors = load_file(folder / tensor_files.DENSE)
    name = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / tensor_files.DENSE)
    relist(folder, lambda manifest: manifest["tensors"].pop(name))
    assert main(["pull", str(folder), str(tmp_path / "run")]) == 0
    assert main([*EVALUATE, str(tmp_path / "run")]) == 2
    assert "does not fit this model" in capsys.readouterr().err


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=5), st.integers(1, 200))
def test_tables_are_cut_by_rows_and_joined_again(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], most: int
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    tensors = {f"t{n}": torch.randn(size) for n, size in enumerate(sizes)}
    tensors |= {"one": torch.tensor(3.0), "d": torch.ones(2, dtype=torch.int64)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHARD_BYTES", most)
        index = write_tensors(folder, tensors, ["d"])
    found = read_tensors(folder, index)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with pytest.raises(RunError):
        read_tensors(folder, {**index, "more": index["d"]})
