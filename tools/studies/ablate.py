"""Train variants of a config with several seeds, evaluate each, print mean ± std as a Markdown table.

    python -m tools.studies.ablate configs/studies/heads.yaml --output runs/heads --seeds 0 1 2

A study is a YAML file: `config`, the file that all variants start from (or --config); `settings`, overrides for all of
them; and `variants`, overrides by name. `without: PIECE` in a variant leaves a piece out of the model that no setting
leaves out, see `tools/studies/without.py`. Finished runs are not trained again: call it again after an interruption, or
with more seeds or variants. A run that was made with other settings than the study has now is refused.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flm_torchrec.config import Config, load_config
from flm_torchrec.config.heads import HEADS
from flm_torchrec.config.schema import BASELINES, LossConfig
from flm_torchrec.documents import Unreadable, read_json, read_yaml
from flm_torchrec.errors import ConfigError, FlmError, RunError
from flm_torchrec.names import nearest
from flm_torchrec.tuning.process import FLM, threads_of, train_command
from tools.studies.without import PIECES

WITHOUT = "without"
"""Key of a variant that is no setting."""
LACKING = "tools.studies.without"
FINISHED = "finished"
"""File of a trained run; its text is the piece that the model lacks."""


@dataclass(frozen=True)
class StudyRun:
    """One variant with one seed."""

    variant: str
    seed: int
    config: Config
    without: str | None = None
    """A piece that the model lacks, of `without.PIECES`."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.train.run)


def read_study(
    file: Path, config: str | None, given: Sequence[str], output: Path, seeds: Sequence[int], only: Sequence[str]
) -> list[StudyRun]:
    """All runs of a study, every config checked; `config` in place of the file's own.

    Args:
        given: KEY=VALUE, in place of the study's settings, not of a variant's.

    Raises:
        ConfigError: the file, a variant or a setting in it is wrong.
    """
    try:
        study = read_yaml(file)
        start, shared, variants = config or study["config"], study.get("settings") or {}, study["variants"]
        set_here = {pair.partition("=")[0]: pair for pair in given}
        shared = {key: value for key, value in shared.items() if key not in set_here}
        variants = {name: {**shared, **(changes or {})} for name, changes in variants.items()}
    except (Unreadable, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{file}: not a study ({reason}); it needs 'config' and 'variants', see tools/studies/ablate.py"
        ) from error
    for name in only:
        if name not in variants:
            raise ConfigError(f"--only '{name}': no such variant in {file}; {nearest(name, variants)}")
    runs = []
    for name in only or variants:
        for seed in seeds:
            folder = output / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{seed}"
            changes = variants[name].copy()
            without = changes.pop(WITHOUT, None)
            if without is not None and without not in PIECES:
                raise ConfigError(
                    f"{file}: {name}: {WITHOUT}: {without!r} is no piece; {nearest(str(without), PIECES)}"
                )
            settings = {**changes, "train.seed": seed, "train.run": str(folder), "train.existing": "replace"}
            overrides = [pair for key, pair in set_here.items() if key not in settings]
            overrides += [
                f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
                for key, value in settings.items()
            ]
            runs.append(StudyRun(name, seed, load_config(start, overrides), without))
    folders = [run.folder for run in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"{file}: two variants have names that differ in signs alone; rename one")
    return runs


def result_of(run: StudyRun, split: str) -> dict[str, Any] | None:
    """The evaluation of a finished run, or None.

    Raises:
        RunError: the run was made with other settings.
    """
    file = run.folder / f"evaluation-{split}.json"
    if not file.is_file():
        return None
    if not _as_configured(run):
        raise RunError(
            f"{run.folder}: made with other settings than the study has now; remove it or give another --output"
        )
    return read_json(file)


def _as_configured(run: StudyRun) -> bool:
    """Whether the folder was made with the run's settings and pieces, on however many threads."""
    made = load_config(run.folder / "config.yaml")
    lacks = (run.folder / FINISHED).read_text(encoding="utf-8")
    return replace(made, distributed=run.config.distributed) == run.config and lacks == (run.without or "")


def execute(run: StudyRun, split: str, threads: int) -> str | None:
    """Train and evaluate in processes of their own → what went wrong, or None."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    steps = [train_command(run.config, run.folder.with_suffix(".yaml"), threads)]
    if (run.folder / FINISHED).is_file() and _as_configured(run):
        steps = []
    steps.append([*FLM, "evaluate", "--run", str(run.folder), "--split", split])
    program = FLM if run.without is None else (sys.executable, "-m", LACKING, run.without)
    log = run.folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        for step in steps:
            command = [*program, *step[len(FLM) :]]
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
                return f"{run.variant}, seed {run.seed}: failed, see {log}"
            if step[len(FLM)] == "train":
                (run.folder / FINISHED).write_text(run.without or "", encoding="utf-8")
    return None


def table(runs: Sequence[StudyRun], split: str, metrics: Sequence[str]) -> str:
    """Markdown with a row for each variant and scorer: mean ± sample standard deviation over the seeds."""
    lines = [
        f"| variant | row | seeds | {' | '.join(m.upper() for m in metrics)} |",
        "|---|---|---" + "|---" * len(metrics) + "|",
    ]
    shown: set[str] = set()
    tables_of: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        result = result_of(run, split)
        if result is not None:
            tables_of.setdefault(run.variant, []).append(result["table"])
    for variant, tables in tables_of.items():
        loss = next(run.config.loss for run in runs if run.variant == variant)
        # Where validation chose a mixture with some seeds and a sum with others, only those have a row of one vector.
        for row in dict.fromkeys(row for table in tables for row in table):
            if row in shown or not _is_of_use(loss, row):
                continue
            name = "" if row in BASELINES else variant
            if row in BASELINES:
                shown.add(row)
            values = [[t[row][m] for t in tables if row in t] for m in metrics]
            cells = [_cell(v if row not in BASELINES else v[:1]) for v in values]
            lines.append(f"| {name} | {row} | {len(values[0]) if name else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_of_use(loss: LossConfig, row: str) -> bool:
    """Whether a row is of use: not that of a head that was not trained, nor that of a fusion of one head."""
    trained = [head for head in HEADS if getattr(loss, head) > 0]
    return row in trained or (len(trained) > 1 if row == "fused" else row not in HEADS)


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def main() -> int:
    """Train what is missing and print the table; 1 if a run failed, 2 if the study is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", type=Path, help="YAML file of variants")
    parser.add_argument("--config", metavar="FILE", help="config to start from (default: the study's)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all variants, but for their own"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the runs (required)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="these variants alone (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, cores shared (default: 1)")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="examples to rank (default: valid)")
    parser.add_argument(
        "--metrics", nargs="+", default=["hr@10", "ndcg@10"], metavar="NAME", help="columns (default: hr@10 ndcg@10)"
    )
    parser.add_argument("--table", action="store_true", help="train nothing: print the table of what is there")
    args = parser.parse_args()
    try:
        if args.jobs < 1:
            raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
        runs = read_study(args.study, args.config, args.set, args.output, args.seeds, args.only)
        todo = [] if args.table else [run for run in runs if result_of(run, args.split) is None]
        threads = threads_of(args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            failures = [f for f in pool.map(lambda run: execute(run, args.split, threads), todo) if f]
        print(table(runs, args.split, args.metrics))
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
