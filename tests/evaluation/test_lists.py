"""What lists are made of, several true items, segments: against plain loops and torchmetrics."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_precision, retrieval_recall

from flm_torchrec.cli import main
from flm_torchrec.config.heads import HEADS
from flm_torchrec.config.schema import EvalConfig
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples, split
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.evaluation import lists as lists_module
from flm_torchrec.evaluation.evaluate import EvaluationTask, evaluate
from flm_torchrec.evaluation.lists import ItemFacts, Targets, gini, list_metrics, target_metrics
from flm_torchrec.evaluation.segments import labels_by
from tests.evaluation.test_ranking import make_data
from tests.training.test_fusion import Planted

ITEMS = 12
ALONE = Comm(0, 1, 1, torch.device("cpu"))


def some_lists(rng: np.random.Generator, users: int, k: int) -> np.ndarray:
    """[users, k] different items; of fewer than k, some lists end with -1."""
    top = np.stack([rng.choice(ITEMS, k, replace=False) for _ in range(users)])
    return np.where(np.arange(k) < rng.integers(1, 2 * k + 1, users)[:, None], top, -1)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**16))
def test_what_lists_are_made_of(users: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    top = some_lists(rng, users, k)
    popularity, vectors = rng.integers(0, 9, ITEMS), rng.normal(size=(ITEMS, 4)).astype(np.float32)
    popularity[0] += 1
    found = list_metrics(top, ItemFacts(popularity, torch.from_numpy(vectors).__getitem__), ALONE)
    flat = top[top >= 0]
    assert found[f"popularity@{k}"] == pytest.approx(popularity[flat].mean())
    share = np.maximum(popularity, 1) / popularity.sum()
    assert found[f"novelty@{k}"] == pytest.approx(np.mean([-np.log2(share[item]) for item in flat]))

    def cosine(a: int, b: int) -> float:
        return float(vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]))

    pairs = [[1 - cosine(a, b) for a, b in combinations(row[row >= 0], 2)] for row in top]
    apart = [float(np.mean(each)) if each else 0.0 for each in pairs]
    assert found[f"diversity@{k}"] == pytest.approx(np.mean(apart), abs=5.1e-5)
    counts = np.bincount(flat, minlength=ITEMS)
    differences = np.abs(counts[:, None] - counts).sum()
    assert found[f"gini@{k}"] == pytest.approx(differences / (2 * ITEMS**2 * counts.mean()))


def test_gini_of_all_alike_is_0_and_of_one_alone_is_near_1() -> None:
    assert gini(np.full(7, 3)) == pytest.approx(0)
    assert gini(np.array([0, 0, 5, 0])) == pytest.approx(3 / 4)


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(0, 2**16))
def test_several_true_items(users: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(users)
    top = some_lists(rng, users, 6)
    right = [rng.choice(ITEMS, rng.integers(1, 8), replace=False) for _ in range(users)]
    targets = Targets(np.repeat(np.arange(users), [len(r) for r in right]), np.concatenate(right))
    found = target_metrics(top, rows, targets, (1, 3, 6), ALONE)
    for k in (1, 3, 6):
        recall, precision, ap = [], [], []
        for row, listed in zip(rows, top, strict=True):
            rest = [item for item in range(ITEMS) if item not in listed]
            true = torch.tensor([item in right[row] for item in [*listed, *rest]])
            score = torch.arange(len(true), 0, -1.0)
            recall.append(float(retrieval_recall(score, true, top_k=k)))
            precision.append(float(retrieval_precision(score, true, top_k=k)))
            at_hits = [float(true[: n + 1].float().mean()) for n in range(k) if true[n]]
            ap.append(sum(at_hits) / min(k, int(true.sum())))
        expected = {f"recall@{k}": recall, f"precision@{k}": precision, f"map@{k}": ap}
        for name, values in expected.items():
            assert found[name] == pytest.approx(np.mean(values), abs=1e-6), name


def test_targets_are_the_later_items_that_are_not_known(small: PreparedData) -> None:
    data = replace(small, item=np.array([3, 4, 3, 5, 5, 4, 7, 1, 2]), offsets=np.array([0, 6, 9]))
    examples = Examples(np.array([0, 1]), np.array([2, 8]), until=np.array([6, 9]))
    with patch.object(lists_module, "EXAMPLES", 1):
        targets = Targets.of(data, examples)
    assert targets is not None
    pairs = list(zip(targets.rows.tolist(), targets.items.tolist(), strict=True))
    assert pairs == [(0, 3), (0, 5), (1, 2)]  # 3 is the next item, though it is known; 4 is known
    assert Targets.of(data, replace(examples, until=None)) is None
    assert split(small, "leave-one-out", 0.1).test.until is None
    by_time = split(small, "time", 0.2)
    for part in (by_time.valid, by_time.test):
        assert part.until is not None and (part.until > part.end).all() and (part.until - part.end).max() > 1
    np.testing.assert_array_equal(by_time.test.until, small.offsets[1:][by_time.test.user])


def test_segments_of_items_and_users(small: PreparedData) -> None:
    item = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5])
    data = replace(small, item=item, offsets=np.array([0, 3, 5, 6, 9]), segment=None)
    learned = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    examples = Examples(np.array([0, 1, 2, 3]), np.array([2, 4, 5, 7]))
    items, users = labels_by(["items", "users"], data, examples, learned)
    assert items.tolist() == ["head items", "tail items", "items without training events", "tail items"]
    few, many = "users of at most 2 training events", "users of more than 2 training events"
    assert users.tolist() == [many, few, "new users, without training events", few]
    assert list(labels_by([], data, examples, learned)) == []


@pytest.mark.parametrize("shown", [False, True])
def test_new_items_that_the_fused_lists_do_not_show_are_told(shown: bool) -> None:
    """Each user's last item has no other event. The content head knows it; the fused vector points elsewhere."""
    data = make_data([[n, n + 1, n + 2, 30 + n] for n in range(8)], 40)
    splits = split(data, "leave-one-out", 0.1)
    encoder = Planted(data, splits.test, dict.fromkeys((*HEADS, "fused"), 0.1))
    encoder.heads["fused"] *= 1 if shown else -1
    task = EvaluationTask(data, splits.test, "test", splits.train_mask(data), by=("items",))
    notes = evaluate(task, encoder, ALONE, EvalConfig(ks=(3,), baselines=())).notes
    told = [note for note in notes if "'items without training events' none is among the first 3" in note]
    assert (len(told), len(notes)) == ((0, 0) if shown else (1, 1))


def test_evaluate_tells_lists_several_targets_and_segments(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--data.path", str(small.path), "--train.run", str(run), "--data.split", "time", "--data.holdout", "0.2"]
    options += ["--train.max_steps", "2", "--model.dim", "8", "--model.layers", "1", "--train.batch_size", "32"]
    assert main(["train", *options, "--train.eval_users", "20"]) == 0
    assert main(["evaluate", "--run", str(run), "--by", "items", "--by", "users", "--eval.ks", "[3, 20]"]) == 0
    assert "what is recommended" in capsys.readouterr().out
    found = json.loads((run / "evaluation-test.json").read_text())
    kinds = [name for name in found["segments"] if "items" in name], [n for n in found["segments"] if "users" in n]
    assert len(kinds[0]) > 1 and kinds[1]
    parts = split(small, "time", 0.2)
    test, train = parts.test, parts.train_mask(small)
    for by, names in zip(("items", "users"), kinds, strict=True):
        (labels,) = labels_by([by], replace(small, segment=None), test, train)
        weights = [(labels == name).mean() for name in names]
        assert sum(weights) == pytest.approx(1)
        for scorer, metrics in found["table"].items():
            mean = sum(w * found["segments"][n][scorer]["hr@20"] for w, n in zip(weights, names, strict=True))
            assert mean == pytest.approx(metrics["hr@20"])
    for scorer, lists in found["lists"].items():
        assert list(lists)[:4] == ["novelty@10", "diversity@10", "popularity@10", "gini@10"]
        assert 0 < lists["recall@3"] <= lists["recall@20"] <= 1 and lists["precision@20"] < 0.5, scorer
        assert 0 <= lists["map@3"] <= 1 and 0 <= lists["gini@10"] < 1
    assert found["lists"]["popularity"]["popularity@10"] == max(row["popularity@10"] for row in found["lists"].values())
    rolling = ["evaluate", "--run", str(run), "--eval.baselines", "[]", "--windows"]
    assert main([*rolling, "3", "--against", "content"]) == 0
    told = capsys.readouterr().out
    users = found["users"]
    assert f"pairs of user and window ({users} users), every item ranked" in told
    assert f"bootstrap over {users} users" in told
    rolled = json.loads((run / "evaluation-test.json").read_text())
    assert len(rolled["segments"]) == 3 and rolled["users"] == rolled["comparison"]["users"] == users
    assert all(name.startswith("window ") and "fused" in rows for name, rows in rolled["segments"].items())
    assert main([*rolling, "-1"]) == 2
    assert capsys.readouterr().err == "error: --windows -1: give 1 or more\n"
    with pytest.raises(SystemExit):
        main(["evaluate", "--run", str(run), "--by", "hours"])
    assert "--by: invalid choice: 'hours'" in capsys.readouterr().err
