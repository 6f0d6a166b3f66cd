"""Kinds of events that are predicted, and what a target counts: from the log to the answer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import flm_torchrec as flm
from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.config.schema import LossConfig, ModelConfig
from flm_torchrec.data.cohort import LabelRule, label_events
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.history import Events
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.splits import NOT_LEARNT, SplitSettings, last_of_domain, split
from flm_torchrec.data.survey import load_streamed
from flm_torchrec.distributed.candidates import CandidateRanks
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import ConfigError, DataError
from flm_torchrec.evaluation.lists import Targets
from flm_torchrec.evaluation.ranking import RankingProblem, target_and_seen
from flm_torchrec.export.tower.reader import PackagedTower
from flm_torchrec.export.write import seen_items
from flm_torchrec.model.label import LabelDense
from flm_torchrec.training.job import open_job
from flm_torchrec.training.run_events import with_targets
from tests.conftest import NO_DROPOUT
from tests.steps import losses_of_steps

USERS, ITEMS = 40, 30
SMALL = [
    *("model.dim=8", "model.layers=1", "train.batch_size=16", "data.max_history=5", "loss.negatives=12"),
    *("distributed.threads=1", "train.max_steps=2", "train.warmup_steps=1", "eval.ks=[10]", "train.trackers=[]"),
]
OPTIONS = [text for setting in SMALL for text in (f"--{setting.partition('=')[0]}", setting.partition("=")[2])]
BUYS = "data.target_events=buy"


def log(weight: Sequence[float] | None = None) -> pl.DataFrame:
    """Views, clicks and a few buys of each user, in order of time."""
    rng = np.random.default_rng(0)
    n = USERS * 12
    columns = {
        "user_id": np.repeat([f"u{u}" for u in range(USERS)], 12),
        "item_id": [f"i{i}" for i in rng.integers(0, ITEMS, n)],
        "timestamp": np.sort(rng.integers(0, 10**6, (USERS, 12)), 1).ravel(),
        "event": rng.choice(["buy", "click", "view"], n, p=[0.4, 0.2, 0.4]),
        **({} if weight is None else {"weight": np.resize(weight, n)}),
    }
    return pl.DataFrame(columns)


ROLES = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "event": "event"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The log without weights."""
    folder = tmp_path_factory.mktemp("kinds") / "plain"
    flm.prepare(log(), folder, columns=ROLES)
    return load_prepared(folder)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The log with weights that differ; some are 0."""
    folder = tmp_path_factory.mktemp("kinds") / "weighted"
    flm.prepare(log([0.5, 2.0, 0.0, 1.0, 3.0]), folder, columns={**ROLES, "weight": "weight"})
    return load_prepared(folder)


def targets_of(data: PreparedData, *kinds: str) -> PreparedData:
    return replace(data, targets=np.isin(data.schema.events, kinds))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), min_size=1, max_size=40))
def test_the_last_two_targets_of_three_are_held_out(events: list[tuple[int, int, bool]]) -> None:
    user, domain, target = (np.array(column) for column in zip(*sorted(events, key=lambda e: e[0]), strict=True))
    found = last_of_domain(user, domain, target)
    for u in range(4):
        for d in range(3):
            rows = np.flatnonzero((user == u) & (domain == d))
            own = [row for row in rows if target[row]]
            expected = dict.fromkeys(rows, 0)
            if len(own) >= 3:
                expected |= {row: NOT_LEARNT for row in rows if row > own[-2]} | {own[-2]: 1, own[-1]: 2}
            assert {row: found[row] for row in rows} == expected


@pytest.mark.parametrize("kind", ["leave-one-out", "time", "cold-start"])
def test_only_targets_are_predicted_in_memory_and_streamed(plain: PreparedData, kind: str) -> None:
    data = targets_of(plain, "buy", "click")
    splits = split(data, kind, 0.3)
    for examples in (splits.valid, splits.test):
        assert data.targets is not None and data.targets[data.event[examples.end]].all() and len(examples)
    mask = splits.train_mask(data)
    assert not mask[splits.valid.end].any() and not mask[splits.test.end].any()
    assert (data.event[mask] == data.schema.events.index("view")).any()
    streamed = load_streamed(data.path, "all", SplitSettings(kind, 0.3, ("click", "buy")), USERS, 0)
    user = data.event_users()
    assert streamed.stream.rule is not None
    held = streamed.stream.rule.held_out(user, data.item, data.event)
    np.testing.assert_array_equal((np.arange(len(user)) < streamed.stream.train_end[user]) & ~held, mask)
    np.testing.assert_array_equal(streamed.stream.counts, data.item_counts(mask))


def test_views_leave_no_item_out_and_are_not_right(plain: PreparedData) -> None:
    data = targets_of(plain, "buy")
    examples = split(data, "time", 0.3).test
    buy = data.event == data.schema.events.index("buy")
    _, seen = target_and_seen(RankingProblem(data, examples), np.arange(len(examples)))
    right = Targets.of(data, examples)
    assert right is not None and examples.until is not None
    for row, (user, end, until) in enumerate(zip(examples.user, examples.end, examples.until, strict=True)):
        before, later = np.arange(data.offsets[user], end), np.arange(end, until)
        known = set(data.item[before[buy[before]]])
        assert set(seen.items[seen.rows == row].tolist()) == known - {data.item[end]}
        wanted = set(data.item[later[buy[later]]]) - known | {data.item[end]}
        assert set(right.items[right.rows == row]) == wanted


def test_events_that_are_not_predicted_have_no_label(plain: PreparedData) -> None:
    values = np.arange(len(plain.value)) % 2
    data = targets_of(replace(plain, value=values.astype(np.float32)), "buy")
    labels = label_events(data, np.ones(USERS, bool), LabelRule(("value",), 1.0), 1.0, 0)
    labelled = ~np.isnan(np.hstack([labels.train, labels.valid, labels.test])).all(1)
    np.testing.assert_array_equal(labelled, data.event == data.schema.events.index("buy"))


def steps(data: PreparedData, *overrides: str) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of two steps, and the dense weights after them."""
    config = load_config(None, [*SMALL, f"data.path={data.path}", *overrides])
    with open_job(config, with_targets(data, config)) as job:
        found = losses_of_steps(job, 2, seed=1)
        return found, [p.detach().clone() for p in job.model.module.dense.parameters()]


def test_weights_of_one_are_the_bits_of_none(plain: PreparedData, tmp_path: Path) -> None:
    flm.prepare(log([1.0]), tmp_path / "ones", columns={**ROLES, "weight": "weight"})
    ones = load_prepared(tmp_path / "ones")
    assert ones.weight is not None and plain.weight is None
    assert plain.fingerprint != ones.fingerprint and "weights" not in (plain.path / "schema.yaml").read_text()
    losses, weights = steps(plain)
    for other in (steps(ones), steps(plain, "loss.event_weights=buy=1,view=1")):
        assert other[0] == losses and all(map(torch.equal, other[1], weights))
    assert steps(plain, "loss.event_weights=buy=2")[0] != losses


def test_a_batch_counts_the_weight_of_event_and_kind(weighted: PreparedData) -> None:
    overrides = [*SMALL, f"data.path={weighted.path}", "data.target_events=[buy, view]", "loss.event_weights=buy=4"]
    mask = split(targets_of(weighted, "buy", "view"), "leave-one-out", 0.1).train_mask(weighted)
    by_kind = np.array([{"buy": 4.0, "click": 0.0, "view": 1.0}[name] for name in weighted.schema.events])
    assert weighted.weight is not None
    events = zip(weighted.event[mask], weighted.weight[mask], strict=True)
    expected = Counter((weighted.schema.events[event] != "click", float(own * by_kind[event])) for event, own in events)
    for more in ((), ("data.stream=true", "train.eval_users=9")):
        found: Counter[tuple[bool, float]] = Counter()
        with open_job(load_config(None, [*overrides, *more])) as job:
            for batch in job.loader.epoch(0):
                assert batch.weight is not None and batch.predicted is not None
                found.update(zip(batch.predicted.tolist(), batch.weight.tolist(), strict=True))
        assert found == expected


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.target_events=byu", "data.target_events: the data have no event 'byu'; did you mean 'buy'"),
        ("data.target_events=[]", "names nothing to predict"),
        ("data.target_events=[buy, buy]", "name each kind once"),
        ("loss.event_weights=bye=2", "loss.event_weights: the data have no event 'bye'; did you mean 'buy'"),
        ("loss.event_weights=[buy=-1]", "'buy=-1' is not NAME=WEIGHT"),
        ("loss.event_weights=buy=1e9", "'buy' counts 1e\\+09; give at most 1e\\+06"),
        ("loss.event_weights=[buy=0, click=0, view=0]", "every target counts 0"),
    ],
)
def test_wrong_kinds_are_told_before_work_starts(plain: PreparedData, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        steps(plain, override)


def test_a_weight_of_what_is_not_predicted_is_refused(plain: PreparedData) -> None:
    with pytest.raises(ConfigError, match="'view' is not predicted; add it"):
        steps(plain, BUYS, "loss.event_weights=view=2")


def test_rows_without_a_weight_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = ["user_id,item_id,timestamp,w"]
    rows += [f"u{n % 3},i{n % 5},{n},{w}" for n, w in enumerate(["1", "0", "-1", "", "x", "inf", "2e6", "0.5"] * 4)]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "weight": "w"}
    prepared = flm.prepare(tmp_path / "log.csv", tmp_path / "data", columns=columns, max_dropped=0.99)
    ((reason, dropped),) = prepared.report["dropped"].items()
    assert reason.startswith("weight missing") and dropped["rows"] == 20
    assert dropped["examples"][0].endswith("log.csv: row 3")
    data = load_prepared(tmp_path / "data")
    assert data.weight is not None and sorted(set(data.weight.tolist())) == [0.0, 0.5, 1.0] and len(data.weight) == 12
    with pytest.raises(DataError, match="the weight of every event is 0"):
        flm.prepare(log([0.0]), tmp_path / "zero", columns={**ROLES, "weight": "weight"})
    assert not (tmp_path / "zero").exists()


def test_joined_data_keep_weights(plain: PreparedData, weighted: PreparedData, tmp_path: Path) -> None:
    assert main(["join", str(plain.path), str(weighted.path), "--output", str(tmp_path / "joint")]) == 0
    joint = load_prepared(tmp_path / "joint")
    assert joint.weight is not None and joint.item_domain is not None and weighted.weight is not None
    own = joint.weight[joint.item_domain[joint.item] == joint.schema.domains.index("weighted")]
    assert sorted(own) == sorted(weighted.weight)
    assert (joint.weight[joint.item_domain[joint.item] == joint.schema.domains.index("plain")] == 1).all()
    data = targets_of(joint, "buy")
    splits = split(data, "leave-one-out", 0.1)
    assert data.targets is not None and data.targets[data.event[splits.test.end]].all()


def test_a_run_that_predicts_buys_is_ranked_and_tuned_so(
    plain: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    buys = ["--data.target_events", "buy", "--loss.event_weights", "buy=2"]
    train = ["train", "--data.path", str(plain.path), "--train.run", str(run), *OPTIONS, *NO_DROPOUT]
    assert main([*train, *buys]) == 0
    assert main([*train, "--data.target_events", "view", "--train.existing", "resume"]) == 2
    assert "was made with data.target_events" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(run), "--windows", "4"]) == 2
    assert "has a leave-one-out split" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(run)]) == 0
    found = json.loads((run / "evaluation-test.json").read_text())
    data = targets_of(plain, "buy")
    assert found["users"] == len(split(data, "leave-one-out", 0.1).test)
    tune = ["finetune", "--finetune.source", str(run), "--train.run", str(tmp_path / "tuned"), "--train.max_steps", "1"]
    assert main([*tune, "--data.target_events", "all"]) == 2
    assert "validation events, so their figures would be too good; take its split" in capsys.readouterr().err
    warm = [*train[:3], "--train.run", str(tmp_path / "w"), "--train.warm_start", str(run), *OPTIONS]
    assert main([*warm, "--data.target_events", "all"]) == 2
    assert "was made with data.target_events ('buy',), not all" in capsys.readouterr().err


def test_an_export_leaves_out_what_was_had(plain: PreparedData, exported: Path, tmp_path: Path) -> None:
    data = targets_of(plain, "buy")
    seen = seen_items(data, data.offsets[3:7])
    for user, items in zip(range(3, 6), seen.to_pylist(), strict=True):
        own = np.arange(data.offsets[user], data.offsets[user + 1])
        assert items == data.item[own[data.event[own] == data.schema.events.index("buy")]].tolist()
    assert (
        sum(map(len, seen.to_pylist()))
        < len(seen_items(plain, plain.offsets[3:7]).flatten())
        == data.offsets[6] - data.offsets[3]
    )
    shutil.copytree(exported, tmp_path / "export")
    file = tmp_path / "export" / "tower" / "tower.json"
    description = json.loads(file.read_text())
    assert "targets" not in description  # as exports of older versions
    kinds = ["glance", *description["events"]]
    events = Events(np.arange(4), np.arange(4), np.array([0, 1, 1, 0]), np.ones(4, np.float32))
    for targets, had in (({}, [0, 1, 2, 3]), ({"targets": kinds[1:]}, [1, 2])):
        file.write_text(json.dumps({**description, "events": kinds, **targets}))
        assert PackagedTower(tmp_path / "export").had(events).tolist() == had


def test_labels_have_a_head_a_loss_and_metrics_each(
    plain: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    assert main(["train", "--data.path", str(plain.path), "--train.run", str(source), *OPTIONS]) == 0

    def tune(name: str, *given: str) -> int:
        tuned = ["--finetune.source", str(source), "--train.run", str(tmp_path / name), "--finetune.task", "label"]
        return main(["finetune", *tuned, "--no-control", *OPTIONS, *given])

    assert tune("two", "--finetune.labels", "buy,click=0.5", "--train.select", "label/click/auc") == 0
    report = json.loads((tmp_path / "two" / "finetune.json").read_text())
    found = report["test"]["pretrained"]
    assert report["labels"] == ["buy", "click"] and found["label/events"] == USERS // 5 * 12
    assert found["label/auc"] == pytest.approx((found["label/buy/auc"] + found["label/click/auc"]) / 2)
    for name in ("buy", "click"):
        assert {"auc", "gauc", "ne", "calibration", "ece"} <= {m.split("/")[2] for m in found if f"/{name}/" in m}
    metrics = [json.loads(line) for line in (tmp_path / "two/pretrained/metrics.jsonl").read_text().splitlines()]
    assert {"loss/label/buy", "loss/label/click"} <= set().union(*metrics)
    assert "label/click/auc" in capsys.readouterr().out
    for labels, told in (
        ("buy,buy", "'buy=1' is not NAME=WEIGHT, once for each name"),
        ("buy=0", "'buy' has the weight 0"),
        ("clik,buy", "no event 'clik'; did you mean 'click'"),
        ("value,buy", "the labels 'value' to learn from are not of both kinds at finetune.threshold=4.0"),
    ):
        assert tune("wrong", "--finetune.labels", labels) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "wrong").exists()
    assert tune("wrong", "--finetune.labels", "buy,click", "--train.select", "label/view/auc") == 2
    assert "choose of label/auc, label/buy/auc, label/click/auc" in capsys.readouterr().err


def test_the_loss_of_labels_is_the_weighted_sum_of_their_means() -> None:
    torch.manual_seed(0)
    schema, model = Schema("t", "t", 3, 4, 5), ModelConfig(dim=4, attention_heads=1, dropout=0.0)
    one = CandidateRanks(Comm(0, 1, 1, torch.device("cpu")), "global")
    dense = LabelDense(schema, model, LossConfig(), 3, one, {"buy": 1.0, "like": 0.25})
    encoded = SimpleNamespace(
        items=torch.randn(4, 8), representations={name: torch.randn(5, 8) for name in REPRESENTATIONS}
    )
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    label = torch.tensor([[1, 0], [0, 1], [1, 1], [torch.nan, torch.nan], [0, 0]])
    batch = SimpleNamespace(targets=torch.tensor([0, 1, 2, 3, 0]), label=label, weight=weight)
    loss, outputs = dense._result(batch, encoded)  # type: ignore[arg-type]
    assert outputs.logits is not None and outputs.logits.shape == (5, 2) and outputs.sequences == 4
    kept = [0, 1, 2, 4]
    each = F.binary_cross_entropy_with_logits(outputs.logits[kept], label[kept], reduction="none")
    means = (each * weight[kept, None]).sum(0) / weight[kept].sum()
    torch.testing.assert_close(loss, means[0] + 0.25 * means[1])
    torch.testing.assert_close(outputs.losses["label/like"], means[1])
