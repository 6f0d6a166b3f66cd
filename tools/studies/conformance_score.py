"""Lists of recommendations → how much of each planted signal a model has learnt, for tools/studies/conformance.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.paired import INTERVAL
from flm_torchrec.prepare.sources.synthetic import MECHANISMS
from tools.studies.conformance_adapters.protocol import K
from tools.studies.conformance_data import Suite

ALL = "all"
METRICS = ("ndcg@10", "hr@10")
FLOOR = "baselines/popularity"
"""The model that one must beat to have learnt a signal: it knows nothing of users."""
RESAMPLES = 2_000
COLUMNS = {"user": pl.String, "rank": pl.Int64, "item": pl.String}


@dataclass(frozen=True)
class Score:
    """A metric of a model on the test events of one signal, with 95 % intervals."""

    users: int
    mean: float
    low: float
    high: float
    share: float
    """Of the ceiling: what the oracle of the signal reaches on the same events."""
    share_low: float
    share_high: float
    above_floor: bool
    """The interval of the difference to popularity is above 0."""

    def learns(self, least: float) -> str:
        """The verdict, where at least this share of the ceiling counts as learnt."""
        if not self.above_floor:
            return "no"
        return "learns it" if self.share >= least else "a trace"


def read_lists(file: Path, suite: Suite) -> np.ndarray:
    """A model's lists → [users] the rank of each user's test item, K + 1 where it is not in the list.

    Raises:
        RunError: a column, a user or an item is wrong, or a list is not K different items; names the user and the row.
    """
    rows = _read_columns(file).with_row_index("row", offset=1)
    users, items = suite.test["user"], suite.items
    _refuse(file, rows.filter(pl.any_horizontal(pl.col(*COLUMNS).is_null())), "has an empty cell; fill it")
    _refuse(file, rows.filter(~pl.col("user").is_in(users.implode())), "is no user of data/test_users.parquet")
    _refuse(
        file,
        rows.filter(~pl.col("item").is_in(items.implode())),
        "gets item '{item}', which no row of data/items.parquet has",
    )
    _refuse(file, rows.filter(~pl.col("rank").is_between(1, K)), f"has rank {{rank}}; ranks are 1 to {K}")
    _refuse(file, rows.filter(~pl.struct("user", "rank").is_first_distinct()), "has rank {rank} twice")
    _refuse(file, rows.filter(~pl.struct("user", "item").is_first_distinct()), "gets item '{item}' twice")
    counts = suite.test.select("user").join(rows.group_by("user").len(), on="user", how="left", maintain_order="left")
    short = counts.filter(pl.col("len").fill_null(0) < K)
    if len(short):
        user, found = short.row(0)
        raise RunError(
            f"{file}: user '{user}' has {found or 0} rows; each of the {len(users)} users needs ranks 1 to {K}"
        )
    hits = suite.test.select("user", "item").join(rows, on=["user", "item"], how="left", maintain_order="left")
    return hits["rank"].fill_null(K + 1).to_numpy()


def _read_columns(file: Path) -> pl.DataFrame:
    try:
        rows = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{file}: no Parquet file ({' '.join(str(error).split())}); write user, rank, item") from error
    for name, kind in COLUMNS.items():
        if name not in rows.columns:
            raise RunError(f"{file}: no column '{name}'; write the columns {', '.join(COLUMNS)}")
        if not (rows[name].dtype.is_integer() if kind == pl.Int64 else rows[name].dtype == kind):
            wanted = "integers" if kind == pl.Int64 else "text"
            raise RunError(f"{file}: column '{name}' is {rows[name].dtype}; write {wanted}")
    return rows.select(*COLUMNS)


def _refuse(file: Path, wrong: pl.DataFrame, reason: str) -> None:
    """Raise where there is a wrong row; the message is of the first one."""
    if len(wrong):
        row = wrong.row(0, named=True)
        raise RunError(f"{file}: row {row['row']}: user '{row['user']}' {reason.format(**row)}")


def gains(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """[n] ranks → by metric, [n] the user's share of it: NDCG@10 and HR@10 are their means."""
    hit = ranks <= K
    return {"ndcg@10": np.where(hit, 1 / np.log2(1 + ranks), 0.0), "hr@10": hit.astype(float)}


def scored(model: np.ndarray, ceiling: np.ndarray, floor: np.ndarray) -> Score:
    """[n] gains of a model, of the oracle and of popularity for the same users → the score.

    The percentile bootstrap over users, of all three together, as in `flm_torchrec/evaluation/paired.py`.
    """
    rows, counts = np.unique(np.stack([model, ceiling, floor], 1), axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), RESAMPLES)
    resampled = (
        np.concatenate([[counts], drawn]) @ rows / counts.sum()
    )  # [1 + RESAMPLES, 3], first the users as they are
    mean, most, least = resampled.T
    share = mean / np.maximum(most, 1e-12)
    low, high = np.percentile(mean[1:], INTERVAL)
    share_low, share_high = np.percentile(share[1:], INTERVAL)
    return Score(
        users=len(model),
        mean=float(mean[0]),
        low=float(low),
        high=float(high),
        share=float(share[0]),
        share_low=float(share_low),
        share_high=float(share_high),
        above_floor=bool(np.percentile((mean - least)[1:], INTERVAL[0]) > 0),
    )


def scores_of(suite: Suite, ranks: Mapping[str, Sequence[np.ndarray]]) -> dict[str, dict[str, dict[str, Score]]]:
    """By model, the [users] ranks of each seed → by signal or ALL, by model, by metric: the score of the seeds' mean.

    Raises:
        RunError: there is no list of popularity.
    """
    if FLOOR not in ranks:
        raise RunError(f"{suite.runs}: no lists of {FLOOR}, which a verdict needs; run the adapter baselines first")
    test = suite.test
    of_users = {name: _mean_gains(found) for name, found in ranks.items()}
    scores: dict[str, dict[str, dict[str, Score]]] = {}
    for signal in (ALL, *MECHANISMS):
        rows = np.ones(len(test), bool) if signal == ALL else (test["signal"] == signal).to_numpy()
        if not rows.any():
            continue
        ceiling = gains(test["mixture_rank" if signal == ALL else "signal_rank"].to_numpy())
        scores[signal] = {
            name: {m: scored(found[m][rows], ceiling[m][rows], of_users[FLOOR][m][rows]) for m in METRICS}
            for name, found in of_users.items()
        }
    return scores


def _mean_gains(seeds: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    found = [gains(ranks) for ranks in seeds]
    return {metric: np.mean([one[metric] for one in found], axis=0) for metric in METRICS}


def markdown(scores: dict[str, dict[str, dict[str, Score]]], seeds: Mapping[str, int], least: float) -> str:
    """A table of shares of the ceiling and verdicts, then a table of metrics for each signal."""
    signals = [s for s in scores if s != ALL]
    models = sorted(scores[ALL], key=lambda name: -scores[ALL][name]["ndcg@10"].mean)
    lines = [f"| model | seeds | {' | '.join(signals)} | all |", "|---" * (3 + len(signals)) + "|"]
    for name in models:
        cells = [f"{_share(s)}, {s.learns(least)}" for s in (scores[signal][name]["ndcg@10"] for signal in signals)]
        lines.append(f"| {name} | {seeds[name]} | {' | '.join(cells)} | {_share(scores[ALL][name]['ndcg@10'])} |")
    for signal, table in scores.items():
        lines += ["", f"{signal}, {table[FLOOR]['hr@10'].users} users:", ""]
        lines += ["| model | NDCG@10 | of the ceiling | HR@10 | of the ceiling |", "|---|---|---|---|---|"]
        for name in sorted(models, key=lambda name: -table[name]["ndcg@10"].mean):
            cells = [f"{s.mean:.4f} [{s.low:.4f}, {s.high:.4f}] | {_share(s)}" for s in table[name].values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(score: Score) -> str:
    return f"{score.share:.0%} [{score.share_low:.0%}, {score.share_high:.0%}]"


def as_json(scores: dict[str, dict[str, dict[str, Score]]], least: float) -> dict[str, Any]:
    """The same for programs."""
    return {
        signal: {
            name: {m: asdict(s) | ({} if signal == ALL else {"verdict": s.learns(least)}) for m, s in by_metric.items()}
            for name, by_metric in table.items()
        }
        for signal, table in scores.items()
    }
