"""Fusion weights chosen on validation: what they find, what they leave out, where they end up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.config.heads import HEADS
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples, split
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.evaluation.head_scorer import HeadScorer
from flm_torchrec.evaluation.protocol import Of
from flm_torchrec.evaluation.ranking import Blocks, RankingProblem, count_ranks, rank_targets
from flm_torchrec.training import trainer
from flm_torchrec.training.fusion_weights import ChosenFusion, choose_fusion
from flm_torchrec.training.restore import restore
from tests.evaluation.test_ranking import Alone, make_data, together

DIM = 16


class Planted:
    """Heads whose vector is the true item's plus noise of a given size, drawn apart for each."""

    dim = DIM
    growth = 0
    mixture = None

    def __init__(self, data: PreparedData, examples: Examples, noise: dict[str, float]) -> None:
        g = torch.Generator().manual_seed(0)
        self.vectors = torch.nn.functional.normalize(torch.randn(data.schema.items, DIM, generator=g), dim=1)
        truth = self.vectors[torch.from_numpy(data.item[examples.end])]
        self.heads = {n: truth + size * torch.randn(truth.shape, generator=g) for n, size in noise.items()}

    def users(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {name: h[torch.from_numpy(rows)] for name, h in self.heads.items()}

    def items(self, ids: np.ndarray, of: Of = "all") -> Tensor:
        return self.vectors[torch.from_numpy(ids)]

    def views(self, ids: np.ndarray) -> dict[Of, Tensor]:
        return {"all": self.items(ids)}


@pytest.fixture
def comm() -> Comm:
    return Comm(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def chosen(data: PreparedData, comm: Comm, noise: dict[str, float], heads: tuple[str, ...] = HEADS) -> tuple:
    examples = split(data, "leave-one-out", 0.1).valid
    encoder = Planted(data, examples, {**noise, "fused": 0.0})
    untrained = [f"loss.{name}=0" for name in HEADS if name not in heads]
    config = load_config(None, untrained)
    assert config.train.select.endswith("/ndcg@10")
    problem = RankingProblem(data, examples, Blocks(16, 64))
    found = choose_fusion(problem, encoder, [10.0] * len(HEADS), comm, config)
    score = found.tried["weighted_sum/ndcg@10"]
    scorer = HeadScorer(encoder, data.schema.items, 64, comm)
    ranked = rank_targets(problem, scorer, comm)
    alone = [count_ranks(ranked, name, data.schema.items, comm).ndcg(10) for name in heads]
    return dict(zip(HEADS, found.weights, strict=True)), score, alone


def test_heads_that_know_different_things_are_added_up(small: PreparedData, comm: Comm) -> None:
    weights, score, alone = chosen(small, comm, dict.fromkeys(HEADS, 0.5))
    assert min(weights.values()) > 0 and score > max(alone) + 0.05


def test_a_head_of_noise_is_left_out(small: PreparedData, comm: Comm) -> None:
    weights, score, alone = chosen(small, comm, {"content": 1e3, "collaborative": 0.3, "sequential": 0.3})
    assert weights["content"] == 0 and weights["collaborative"] > 0 and score >= max(alone) - 1e-4


def test_any_number_of_ranks_chooses_alike(small: PreparedData) -> None:
    """Also where a rank has no examples."""
    examples = split(small, "leave-one-out", 0.1).valid
    problem, config = RankingProblem(small, examples, Blocks(50, 64)), load_config(None, [])

    def choose(comm: Alone) -> ChosenFusion:
        encoder = Planted(small, examples, {"content": 1.0, "collaborative": 0.5, "sequential": 0.7, "fused": 0.0})
        return choose_fusion(problem, encoder, [10.0] * len(HEADS), comm, config)

    alone = choose(Alone())
    assert max(alone.weights) == 1 and min(alone.weights) > 0
    assert together(2, choose) == [alone] * 2 and together(5, choose) == [alone] * 5


def test_a_head_that_was_not_trained_takes_no_part(small: PreparedData, comm: Comm) -> None:
    weights, score, alone = chosen(small, comm, dict.fromkeys(HEADS, 0.5), ("sequential",))
    assert weights == {"content": 0.0, "collaborative": 0.0, "sequential": 1.0} and score == pytest.approx(
        alone[0], abs=1e-4
    )


def test_a_mixture_is_chosen_where_each_event_has_one_cause(small: PreparedData, comm: Comm) -> None:
    """Each head knows a third of the users' next items exactly, and is misled about the others."""
    examples = split(small, "leave-one-out", 0.1).valid
    encoder = Planted(small, examples, dict.fromkeys((*HEADS, "fused"), 0.0))
    g = torch.Generator().manual_seed(1)
    for position, name in enumerate(HEADS):
        wrong = encoder.vectors[torch.randint(0, small.schema.items, (len(examples),), generator=g)]
        known = (torch.arange(len(examples)) % len(HEADS) == position)[:, None]
        encoder.heads[name] = torch.where(known, encoder.heads[name], 0.6 * wrong)
    problem = RankingProblem(small, examples, Blocks(16, 64))
    found = choose_fusion(problem, encoder, [10.0] * len(HEADS), comm, load_config(None, []))
    by_sum, mixed = found.tried["weighted_sum/ndcg@10"], found.tried["mixture/ndcg@10"]
    assert found.mixture is not None and mixed > by_sum
    encoder.mixture = found.mixture  # type: ignore[assignment]
    scorer = HeadScorer(encoder, small.schema.items, 64, comm)
    assert scorer.names == (*HEADS, "fused", "fused, one vector")
    ranked = rank_targets(problem, scorer, comm)
    exact = count_ranks(ranked, "fused", small.schema.items, comm).ndcg(10)
    assert exact == pytest.approx(mixed, abs=2e-3)


def test_a_sum_is_kept_where_it_is_as_good(small: PreparedData, comm: Comm) -> None:
    examples = split(small, "leave-one-out", 0.1).valid
    encoder = Planted(small, examples, dict.fromkeys((*HEADS, "fused"), 0.0))
    problem = RankingProblem(small, examples, Blocks(16, 64))
    assert choose_fusion(problem, encoder, [10.0] * len(HEADS), comm, load_config(None, [])).mixture is None


def test_a_deep_metric_is_that_of_the_whole_catalogue(comm: Comm) -> None:
    rng = np.random.default_rng(0)
    data = make_data([rng.choice(900, 4, replace=False).tolist() for _ in range(60)], 900)
    examples = split(data, "leave-one-out", 0.1).valid
    encoder = Planted(data, examples, dict.fromkeys((*HEADS, "fused"), 3.0))
    problem = RankingProblem(data, examples, Blocks(16, 64))
    settings = ["train.select=fused/hr@100", "eval.ks=[100]", "loss.collaborative=0", "loss.sequential=0"]
    found = choose_fusion(problem, encoder, [10.0] * len(HEADS), comm, load_config(None, settings))
    ranks = rank_targets(problem, HeadScorer(encoder, data.schema.items, 64, comm), comm).ranks["content"]
    assert found.tried["weighted_sum/hr@100"] == pytest.approx((ranks <= 100).mean()) and (ranks > 300).any()


def test_the_weights_are_in_the_checkpoint(small: PreparedData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--model.dim", "16", "--train.max_steps", "4", "--eval.ks", "[10]"]
    assert main(["train", "--data.path", str(small.path), "--train.run", str(run), *options]) == 0
    told = json.loads((run / "checkpoints" / "best" / "meta.json").read_text())["fusion"]
    with restore(run) as restored:
        scale = restored.job.model.module.dense.tower.fusion.scale.flatten().tolist()
    assert scale == pytest.approx([told[name] for name in HEADS]) and max(scale) == 1


def test_a_bounded_number_of_users_chooses(
    small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def choose(problem: RankingProblem, *rest: Any) -> ChosenFusion:
        asked.append(len(problem.examples))
        return choose_fusion(problem, *rest)

    monkeypatch.setattr(trainer, "MOST_EXAMPLES", 7)
    monkeypatch.setattr(trainer, "choose_fusion", choose)
    options = ["--model.dim", "16", "--train.max_steps", "2", "--train.run", str(tmp_path / "run")]
    assert main(["train", "--data.path", str(small.path), *options]) == 0
    assert set(asked) == {7}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--train.select", "sequential/ndcg@10", "--loss.sequential", "0"], "set loss.sequential"),
        (["--train.select", "fused/hr@300", "--eval.ks", "[300]"], "select by a K up to 200"),
        (["--model.fusion", "concat"], "set one of the two"),
        (["--model.fusion", "gated"], "model.fusion=gated"),
    ],
)
def test_what_nothing_trains_is_refused(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    arguments = ["train", "--data.path", str(small.path), "--train.run", str(tmp_path / "run"), *options]
    assert main(arguments) == 2 and told in capsys.readouterr().err and not (tmp_path / "run").exists()
