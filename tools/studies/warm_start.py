"""Go on with yesterday's run, train anew, or do neither: NDCG@10 of old and new items, and the steps that each needs.

    python tools/studies/warm_start.py --input ../shared/data/ml-100k --output runs/warm-start-study
    python tools/studies/warm_start.py --source amazon-s3rec --input ../shared/data/beauty --output runs/beauty-study

MovieLens 100K by time: yesterday ends when the newest tenth of the users begins, and lacks a random tenth of the items.
Beauty, which has no times: yesterday lacks a random tenth of the users and of the items. Today has all events. The last
event of each user is test, the one before it validation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from flm_torchrec.config import Config, load_config
from flm_torchrec.evaluation.evaluate import EvaluationTask, evaluate
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import movielens, s3rec
from flm_torchrec.prepare.sources.source_data import SourceData
from flm_torchrec.training.checkpoint.manager import Checkpoints, states_of
from flm_torchrec.training.job import Job, open_job
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.restore import restore
from flm_torchrec.training.trainer import pretrain
from flm_torchrec.training.warm_start import WarmStart, warm_config

SOURCES = {"movielens": movielens.read, "amazon-s3rec": s3rec.read}
METRIC, HEAD = "ndcg@10", "sequential"
SETTINGS = (
    "loss.negatives=all",
    "train.batch_size=64",
    "train.patience=0",
    "distributed.threads=1",
    f"train.select={HEAD}/{METRIC}",
    "eval.baselines=[]",
    "train.existing=replace",
)


@dataclass(frozen=True)
class WarmStudy:
    """Where the study works, and how long it trains."""

    folder: Path
    epochs: int
    """Of yesterday's training, and of training anew."""
    more: int
    """Epochs of the warm start."""
    every: int
    """Steps between two validations."""
    seed: int
    settings: tuple[str, ...]
    """More settings, as SECTION.FIELD=VALUE."""

    def data(self, day: str) -> Path:
        """Prepared data of a day."""
        return self.folder / f"data-{day}"

    def run(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / name

    def overrides(self, day: str, run: str, epochs: int) -> list[str]:
        """Settings of a training."""
        length = [f"train.epochs={epochs}", f"train.eval_every={self.every}", f"train.seed={self.seed}"]
        return [*SETTINGS, *self.settings, *length, f"data.path={self.data(day)}", f"train.run={self.run(run)}"]

    def warm(self, run: str) -> Config:
        """The config of a warm start from yesterday's run."""
        source = self.run("yesterday")
        return warm_config(source, [*self.overrides("today", run, self.more), f"train.warm_start={source}"])


def prepare_days(raw: SourceData, share: float, study: WarmStudy) -> None:
    """Prepare the data of yesterday and of today."""
    assert isinstance(raw.interactions, pl.DataFrame)
    events = raw.interactions
    new = {name: held_out(events[name], share, study.seed) for name in ("user", "item")}
    there = ~pl.col("item").is_in(new["item"].implode())
    if raw.timestamps:
        begins = events.group_by("user").agg(pl.col("timestamp").min()).sort("timestamp")["timestamp"]
        there &= pl.col("timestamp") < begins[round((1 - share) * len(begins))]
    else:
        there &= ~pl.col("user").is_in(new["user"].implode())
    before = events.filter(there)
    for day, of_day in (("yesterday", before), ("today", events)):
        prepare(replace(raw, interactions=of_day, oracle=None), study.data(day), PrepareOptions(), overwrite=True)


def held_out(keys: pl.Series, share: float, seed: int) -> pl.Series:
    """A random share of the keys."""
    distinct = keys.unique().sort()
    return distinct.sample(round(share * len(distinct)), seed=seed)


def by_group(job: Job, study: WarmStudy) -> dict[str, float]:
    """NDCG@10 on test, of all examples, and by whether yesterday had the next item and the user."""
    old = {e: set(pl.read_parquet(study.data("yesterday") / f"{e}s.parquet")[f"{e}_key"]) for e in ("user", "item")}
    examples, data = job.events.splits.test, job.data
    items = np.array([key in old["item"] for key in data.item_keys])[data.item[examples.end]]
    users = np.array([key in old["user"] for key in data.user_keys])[examples.user]
    found: dict[str, float] = {}
    for kind, known in (("item", items), ("user", users)):
        labelled = replace(examples, label=np.where(known, f"old {kind}s", f"new {kind}s"))
        task = EvaluationTask(data, labelled, "test", job.events.seen)
        result = evaluate(task, job.encoder(labelled), job.comm, job.config.eval)
        found |= {"all": result.table[HEAD][METRIC], **{g: t[HEAD][METRIC] for g, t in result.segments.items()}}
    return found


def untrained(study: WarmStudy) -> dict[str, float]:
    """Of yesterday's weights, moved to the data of today."""
    with open_job(study.warm("moved")) as job, RunLogger(None, 0) as logger:
        checkpoints = Checkpoints(study.run("moved"), job.model, job.optimizer, job.comm, job.data.fingerprint)
        WarmStart.of(job).load(job, checkpoints, logger)
        return by_group(job, study)


def trained(study: WarmStudy, run: str) -> dict[str, float]:
    """Of a run's best model."""
    with restore(study.run(run)) as restored:
        return by_group(restored.job, study)


def last(study: WarmStudy, run: str) -> dict[str, float]:
    """Of a run's last step."""
    with restore(study.run(run)) as restored:
        job = restored.job
        checkpoints = Checkpoints(study.run(run), job.model, job.optimizer, job.comm, job.data.fingerprint)
        checkpoints.load(states_of(study.run(run))[0])
        return by_group(job, study)


def validations(run: Path) -> list[tuple[int, float]]:
    """Steps and the metric of each validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[f"valid/{HEAD}/{METRIC}"]) for line in lines if f"valid/{HEAD}/{METRIC}" in line]


def reached(found: Sequence[tuple[int, float]], wanted: float) -> str:
    """The first step at which validation is at least as good, as text."""
    steps = [step for step, value in found if value >= wanted]
    return str(steps[0]) if steps else f"not in {found[-1][0]}"


def report(rows: dict[str, dict[str, float]], study: WarmStudy) -> str:
    """Tables as Markdown."""
    groups = list(next(iter(rows.values())))
    lines = [f"| {METRIC} on test, {HEAD} head | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[g]:.4f}' for g in groups)} |" for name, row in rows.items()]
    found = {name: validations(study.run(name)) for name in ("warm", "anew")}
    best = max(value for _, value in found["anew"])
    lines += ["", "| steps to reach, on validation | warm start | training anew |", "|---|---|---|"]
    for share in (0.95, 0.99, 1.0):
        steps = " | ".join(reached(each, share * best) for each in found.values())
        lines.append(f"| {share:.0%} of the best when trained anew ({share * best:.4f}) | {steps} |")
    return "\n".join(lines)


def main() -> int:
    """Prepare, train, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", choices=sorted(SOURCES), default="movielens", help="(default: movielens)")
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="folder of the data set (required)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of data and runs (required)")
    parser.add_argument("--share", type=float, default=0.1, help="of users and items that are new (default: 0.1)")
    parser.add_argument("--epochs", type=int, default=16, metavar="N", help="trained anew (default: 16)")
    parser.add_argument("--more", type=int, default=4, metavar="N", help="epochs of the warm start (default: 4)")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="steps between validations (default: 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("settings", nargs="*", metavar="SECTION.FIELD=VALUE", help="settings, such as model.dim=32")
    args = parser.parse_args()
    study = WarmStudy(args.output, args.epochs, args.more, args.every, args.seed, tuple(args.settings))
    prepare_days(SOURCES[args.source](args.input), args.share, study)
    pretrain(load_config(None, study.overrides("yesterday", "yesterday", args.epochs)))
    pretrain(load_config(None, study.overrides("today", "anew", args.epochs)))
    pretrain(study.warm("warm"))
    rows = {"not trained": untrained(study)}
    for name, run in (("warm start", "warm"), ("anew", "anew")):
        rows |= {f"{name}, best on validation": trained(study, run), f"{name}, last step": last(study, run)}
    print(report(rows, study))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
