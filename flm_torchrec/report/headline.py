"""What a run is worth in three numbers: its best head, the best baseline, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.config.schema import BASELINES, EvalConfig
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.report import mean_and_deviation
from flm_torchrec.pages import Figure, Section
from flm_torchrec.report.pieces import Missing, ranked_for, record_of

Table = dict[str, dict[str, float]]
SPLITS = ("test", "valid")
"""The first of these that was evaluated counts."""
NO_BASELINE = "No baseline was ranked beside the heads: eval.baselines names those to rank."


def headline(run: Path, metric: str, seeds: Sequence[Path] = ()) -> Section:
    """The best head beside the best baseline, by one metric.

    Args:
        metric: such as ndcg@10; another one if the evaluation does not have it.
        seeds: runs of the same settings with other seeds; the numbers are then means, with their sample standard
            deviation.

    Raises:
        Missing: the run was not evaluated, or has no head's row.
        RunError: a run of another seed was not evaluated in the same way.
    """
    split = next((split for split in SPLITS if _file(run, split).is_file()), SPLITS[0])
    found = record_of(_file(run, split), f"'flm evaluate --run {run}' writes it")
    tables = [found["table"], *(table_of(other, split, found) for other in seeds)]
    scorers = {name: row for name, row in tables[0].items() if row}
    heads = [name for name in REPRESENTATIONS if name in scorers]
    if not heads:
        raise Missing(f"{_file(run, split)} has no row of a head")
    metric = metric if metric in scorers[heads[0]] else next(iter(scorers[heads[0]]))
    head = _best(heads, tables, metric)
    kind = f"{metric.upper()}, {'test' if split == 'test' else 'validation'}"
    kind += f", mean and deviation of {len(tables)} seeds" if seeds else ", one seed"
    figures = [Figure(f"best head: {head}", mean_and_deviation([table[head][metric] for table in tables]), kind)]
    names = [name for name in BASELINES if metric in scorers.get(name, {})]
    if names:
        baseline = _best(names, tables, metric)
        values = [[table[name][metric] for table in tables] for name in (head, baseline)]
        figures.append(Figure(f"best baseline: {baseline}", mean_and_deviation(values[1]), kind))
        ahead, behind = map(mean, values)
        part = f"{ahead / behind - 1:+.1%}" if behind else f"{ahead - behind:+.4f}"
        figures.append(Figure("difference", part, f"of {head} from {baseline}"))
    missing = not_ranked(found["table"]) if names else NO_BASELINE
    notes = [f"{split}: {ranked_for(found)}.", *([missing] if missing else [])]
    return Section("Result", notes, figures=figures)


def not_ranked(table: Table) -> str:
    """A sentence that names the default baselines without a row in the table; empty if all have one."""
    # Chance is ranked where items are held out, and not elsewhere.
    missing = [name for name in EvalConfig().baselines if name not in table and name != "random"]
    return f"Of the default baselines, not ranked: {', '.join(missing)}." if missing else ""


def _file(run: Path, split: str) -> Path:
    return run / f"evaluation-{split}.json"


def table_of(run: Path, split: str, first: dict[str, Any]) -> Table:
    """The table of a run of another seed.

    Args:
        first: the evaluation of the first seed.

    Raises:
        RunError: the run was not evaluated in the same way, or on other events.
    """
    try:
        found = record_of(_file(run, split), f"'flm evaluate --run {run} --split {split}' writes it")
    except Missing as error:
        raise RunError(f"--seeds: {error}") from error
    table = found.get("table")
    if not isinstance(table, dict) or {n: list(row) for n, row in table.items()} != {
        n: list(row) for n, row in first["table"].items()
    }:
        raise RunError(f"--seeds: {_file(run, split)} has other rows or metrics; evaluate both runs in the same way")
    if not found.get("examples") or found["examples"] != first.get("examples"):
        raise RunError(
            f"--seeds: {_file(run, split)} ranked other users or events than the first run did, or does not say which;"
            f" evaluate both runs anew, with the same options of 'flm evaluate --split {split}'"
        )
    return table


def _best(names: Sequence[str], tables: Sequence[Table], metric: str) -> str:
    return max(names, key=lambda name: mean(table[name][metric] for table in tables))
