"""Fine-tuning: whom it learns from, what it takes over, what it leaves alone, what it reports."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc

from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.cohort import LabelRule, label_events, of_cohort
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import split
from flm_torchrec.errors import DataError
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.training.job import open_job
from flm_torchrec.training.label_evaluation import gauc
from flm_torchrec.training.restore import restore
from flm_torchrec.training.run_events import events_of, load_data
from tests.conftest import NO_DROPOUT

SMALL = ["--model.dim", "16", "--train.batch_size", "32", "--train.max_steps", "6", "--eval.ks", "[10]"]


@pytest.fixture(scope="module")
def source(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short pretraining that left some users and items out."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    split_ = ["--data.split", "cold-start", "--data.holdout", "0.3"]
    assert main(["train", "--data.path", str(small.path), "--train.run", str(run), *split_, *SMALL]) == 0
    return run


def tune(source: Path, run: Path, *arguments: str) -> int:
    return main(["finetune", "--finetune.source", str(source), "--train.run", str(run), *arguments])


@settings(max_examples=20)
@given(st.floats(0.01, 1.0), st.integers(0, 99))
def test_a_share_of_the_cohort_is_learnt_from(small: PreparedData, share: float, seed: int) -> None:
    cohort = np.arange(small.schema.users) % 3 == 0
    whole = split(small, "leave-one-out", 0.1)
    chosen = of_cohort(whole, small, cohort, share, seed)
    learners = np.flatnonzero(chosen.train_end > small.offsets[:-1])
    assert cohort[learners].all() and len(learners) == max(1, round(share * cohort.sum()))
    assert cohort[chosen.test.user].all() and len(chosen.test) == cohort.sum()
    assert not chosen.train_mask(small)[chosen.valid.end].any() and not chosen.train_mask(small)[chosen.test.end].any()


@settings(max_examples=20)
@given(st.floats(0.05, 1.0), st.integers(0, 99))
def test_labels_of_one_user_are_in_one_part(small: PreparedData, share: float, seed: int) -> None:
    threshold = float(np.median(small.value)) if len(np.unique(small.value)) > 1 else 1.0
    values = np.where(np.arange(len(small.value)) % 2, threshold, threshold - 1).astype(np.float32)
    data = dataclasses.replace(small, value=values)
    everyone = np.ones(small.schema.users, bool)
    rule = LabelRule(("value",), threshold)
    labels = label_events(data, everyone, rule, share, seed)
    users = np.repeat(np.arange(small.schema.users), np.diff(small.offsets))
    parts = [set(users[~np.isnan(p[:, 0])]) for p in (labels.train, labels.valid, labels.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(parts[1] | parts[2]) == small.schema.users - int(0.6 * small.schema.users)
    known = ~np.isnan(labels.test[:, 0])
    assert ((values >= threshold)[known] == labels.test[known, 0].astype(bool)).all()
    whole = label_events(data, everyone, rule, 1.0, seed)
    assert (~np.isnan(labels.train)).sum() == max(1, round(share * (~np.isnan(whole.train)).sum()))


def test_labels_of_one_kind_are_refused(small: PreparedData) -> None:
    with pytest.raises(DataError, match=r"finetune\.threshold=99"):
        label_events(small, np.ones(small.schema.users, bool), LabelRule(("value",), 99.0), 1.0, 0)


def test_new_users_are_those_the_source_never_saw(source: Path, small: PreparedData) -> None:
    overrides = [f"finetune.source={source}", "finetune.cohort=new", "data.split=leave-one-out"]
    tuned = events_of(load_config(source / "config.yaml", overrides), small)
    seen = events_of(load_config(source / "config.yaml"), small).learned_from
    users = np.repeat(np.arange(small.schema.users), np.diff(small.offsets))
    assert not set(users[tuned.learned_from]) & set(users[seen]) and (tuned.seen == tuned.learned_from | seen).all()
    assert set(tuned.splits.test.user) <= set(range(small.schema.users)) - set(users[seen])
    overrides += ["finetune.start=scratch"]
    scratch = events_of(load_config(source / "config.yaml", overrides), small)
    assert (scratch.seen == scratch.learned_from).all() and (scratch.learned_from == tuned.learned_from).all()


@pytest.mark.parametrize(("tower", "moves"), [("frozen", False), ("partial", True), ("full", True)])
def test_what_is_frozen_stays(source: Path, small: PreparedData, tower: str, moves: bool) -> None:
    overrides = [f"finetune.source={source}", f"finetune.tower={tower}", "finetune.sparse_lr=0"]
    config = load_config(source / "config.yaml", overrides)
    with open_job(config, small) as job:
        before = {n: t.detach().clone() for n, t in job.model.module.dense.state_dict().items()}
        table = job.model.module.item_id.state_dict()["embeddings.item_id.weight"].local_shards()[0].tensor.clone()
        job.model.train()
        for _, batch in zip(range(3), job.loader.epoch(0), strict=False):
            job.optimizer.zero_grad()
            job.model(batch)[0].backward()
            job.optimizer.step()
        after = job.model.module.dense.state_dict()
        changed = [n.removeprefix("tower.") for n in before if not torch.equal(before[n], after[n])]
        moved = {".".join(n.split(".")[:2]) for n in changed}
        assert ("transformer.blocks" in moved) == moves and ("transformer.position" in moved) == (tower == "full")
        assert any(name.startswith("fusion") for name in moved)
        same = job.model.module.item_id.state_dict()["embeddings.item_id.weight"].local_shards()[0].tensor
        assert torch.equal(table, same)


def test_next_item_for_new_users_with_its_control(
    source: Path, small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranked for a sample of users: those whom an evaluation of each run ranks for."""
    run, sample = tmp_path / "tuned", ["--sample", "9"]
    new = ["--finetune.cohort", "new", "--finetune.share", "0.5", "--data.split", "leave-one-out"]
    assert tune(source, run, *new, *sample) == 0
    report = json.loads((run / "finetune.json").read_text())
    assert set(report["test"]) == {"found", "pretrained", "scratch"} and "fused/ndcg@10" in report["test"]["scratch"]
    with restore(run / "pretrained") as restored:
        assert restored.job.config.finetune.start == "pretrained"
        everyone = len(restored.job.events.splits.test)
    printed = capsys.readouterr().out
    assert report["ranked"] == {"users": 9, "of": everyone} and everyone > 9
    assert f"9 of {everyone} test users are ranked, drawn once" in printed and "test, pretrained: " in printed
    for start in ("pretrained", "scratch"):
        assert main(["evaluate", "--run", str(run / start), "--eval.baselines", "[]", *sample]) == 0
        evaluation = json.loads((run / start / "evaluation-test.json").read_text())
        assert evaluation["users"] == 9
        assert evaluation["table"]["fused"]["mrr"] == pytest.approx(report["test"][start]["fused/mrr"])


def test_a_new_domain_gets_new_tables_and_the_old_tower(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = synthetic.read(synthetic.Recipe(users=60, items=110, events=10, seed=5))
    prepare(dataclasses.replace(raw, name="other"), tmp_path / "other", PrepareOptions())
    run = tmp_path / "tuned"
    other = ["--data.path", str(tmp_path / "other"), "--data.split", "leave-one-out", "--no-control"]
    assert tune(source, run, *other) == 0
    ranked = json.loads((run / "finetune.json").read_text())["ranked"]
    assert ranked["users"] == ranked["of"] > 9 and "drawn once" not in capsys.readouterr().out
    log = (run / "pretrained" / "train.log").read_text()
    assert "new: " in log and "item_id.embeddings.item_id.weight" in log and "dense.tower.transformer" not in log


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Events with ratings: of even items nearly always 5, of odd ones nearly always 2."""
    folder = tmp_path_factory.mktemp("rated")
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp,value"]
    for user in range(80):
        for time, item in enumerate(rng.choice(40, 12, replace=False)):
            likes = (item % 2 == 0) != (rng.random() < 0.05)
            lines.append(f"u{user},i{item},{time},{5 if likes else 2}")
    (folder / "events.csv").write_text("\n".join(lines))
    columns = "user=user_id,item=item_id,timestamp=timestamp,value=value"
    given = ["--input", str(folder / "events.csv"), "--columns", columns]
    assert main(["prepare", "--source", "csv", *given, "--output", str(folder / "data")]) == 0
    return folder / "data"


def test_labels_are_told_from_pretrained_and_from_new_weights(rated: Path, tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "labels"
    hidden = ["--data.path", str(rated), "--data.values", "false"]
    assert main(["train", *hidden, "--train.run", str(source), *SMALL]) == 0
    task = ["--finetune.task", "label", "--train.max_steps", "60", "--train.dense_lr", "0.01"]
    task += ["--train.checkpoint_every", "20", "--distributed.threads", "1"]
    assert tune(source, run, *task) == 0
    report = json.loads((run / "finetune.json").read_text())
    assert report["task"] == "label" and set(report["test"]) == {"pretrained", "scratch"}
    for test in report["test"].values():
        assert test["label/auc"] > 0.85 and test["label/ne"] < 0.8 and test["label/events"] == 16 * 12
        assert test["label/gauc"] > 0.85 and 0.8 < test["label/calibration"] < 1.25 and 0 < test["label/ece"] < 0.2
    assert main(["evaluate", "--run", str(run / "pretrained")]) == 2  # it tells labels, it does not rank
    assert tune(source, run, *task) == 2
    # As if it had been stopped in the midst of the control: the states before are there, the end is not.
    (run / "finetune.json").unlink()
    shutil.rmtree(max((run / "scratch" / "checkpoints").glob("step-*")))
    assert tune(source, run, *task, "--train.existing", "resume") == 0
    assert json.loads((run / "finetune.json").read_text()) == report


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_gauc_is_the_mean_of_the_users_auc_by_events(events: list[tuple[int, int, bool]]) -> None:
    user, score, label = (np.array(column) for column in zip(*events, strict=True))
    found: list[float] = []
    for one in np.unique(user):
        mine, truth = score[user == one].astype(np.float32), label[user == one]
        if 0 < truth.sum() < len(truth):
            found += [float(binary_auroc(torch.from_numpy(mine / 8), torch.from_numpy(truth).long()))] * len(truth)
    expected = np.mean(found) if found else np.nan
    assert gauc(score / 8, label.astype(np.float32), user) == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("tower", "dense"), [("full", "ddp"), ("frozen", "fsdp")])
def test_two_ranks_fine_tune_as_one(ranks, rated: Path, tmp_path: Path, tower: str, dense: str) -> None:  # type: ignore[no-untyped-def]
    """The same losses and choice of checkpoint, hence the same test metrics, but for the order of sums.

    Of 48 sequences to learn from the last batch has one: then a rank has nothing to learn. No item and no user has
    features, so that some layers have no inputs.
    """
    source = tmp_path / "source"
    assert main(["train", "--data.path", str(rated), "--train.run", str(source), *SMALL, *NO_DROPOUT]) == 0
    found = []
    for count in (1, 2):
        run = tmp_path / f"ranks{count}"
        task = ["--finetune.task", "label", "--train.max_steps", "12", "--train.batch_size", "47", "--no-control"]
        task += ["--finetune.tower", tower, "--distributed.dense", dense]
        given = ["--finetune.source", str(source), "--train.run", str(run), *task]
        ranks(count, ["-m", "flm_torchrec", "--", "finetune", *given])
        found.append(json.loads((run / "finetune.json").read_text())["test"]["pretrained"])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[1]["label/events"] == 16 * 12


def test_labels_of_one_kind_end_in_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The synthetic source has no values: all are 1."""
    assert tune(source, tmp_path / "labels", "--finetune.task", "label") == 2
    assert "not of both kinds" in capsys.readouterr().err and not (tmp_path / "labels").exists()


def test_wrong_requests_end_in_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(["finetune", *arguments]) == 2
        return capsys.readouterr().err

    assert "--finetune.source" in error("--train.run", "x")
    assert "no config.yaml" in error("--finetune.source", str(tmp_path), "--train.run", "x")
    assert "--train.run" in error("--finetune.source", str(source))
    assert "source itself" in error("--finetune.source", str(source), "--train.run", str(source))
    given = ["--finetune.source", str(source), "--train.run", str(tmp_path / "given")]
    assert "--no-control leaves out; leave it out" in error(*given, "--finetune.start", "scratch")
    assert "goes on from finetune.source; leave it out" in error(*given, "--train.warm_start", str(source))
    assert not (tmp_path / "given").exists()
    config = tmp_path / "tuning.yaml"
    config.write_text(f"finetune: {{source: {source}}}")
    assert main(["train", "--config", str(config)]) == 2 and "flm finetune" in capsys.readouterr().err
    label = ["--finetune.source", str(source), "--train.run", str(tmp_path / "t"), "--finetune.task", "label"]
    assert "label/auc" in error(*label, "--train.select", "label/auk")
    assert "--sample: users are ranked for the next item" in error(*label, "--sample", "5")
    assert "give 1 user or more" in error("--finetune.source", str(source), "--train.run", "x", "--sample", "0")


def test_vectors_of_another_encoder_are_refused(
    small: PreparedData, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the source's data name no encoder, and the new data name one."""
    shutil.copytree(small.path, tmp_path / "data")
    schema = small.schema
    features = [replace(f, encoder="0123456789abcdef") if not f.sparse else f for f in schema.features]
    replace(schema, features=tuple(features)).save(tmp_path / "data" / "schema.yaml")
    assert tune(source, tmp_path / "run", f"--data.path={tmp_path / 'data'}") == 2
    told = capsys.readouterr().err
    assert "feature 'price' has vectors of the text encoder 0123456789abcdef, and those of the source are of no" in told
    assert told.count("\n") == 1 and not (tmp_path / "run" / "pretrained").exists()


def test_values_that_will_be_labels_are_hidden_from_pretraining(rated: Path, source: Path) -> None:
    shown = load_data(load_config(None, [f"data.path={rated}"]))
    hidden = load_data(load_config(None, [f"data.path={rated}", "data.values=false"]))
    assert set(shown.value) == {2, 5} and set(hidden.value) == {1} and (hidden.item == shown.item).all()
    tuning = [f"data.path={rated}", "data.values=false", f"finetune.source={source}", "finetune.task=label"]
    np.testing.assert_array_equal(load_data(load_config(None, tuning)).value, shown.value)
