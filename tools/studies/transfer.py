"""Does pretraining on other domains pay? Fine-tune on shares of a target, beside the same from scratch: table and plot.

    python -m tools.studies.transfer --sources data/sports-words --target data/beauty-words \\
        --output runs/sports-to-beauty --shares 0.01 0.1 1 --steps 100 200 800 --seeds 0 1 2 \\
        --pretrain "--train.epochs 9" -- --model.dim 128 --model.dropout 0.3 --loss.negatives all

For each seed, one run is pretrained on the sources. For each share of the target's users, `flm finetune` goes on from
that run and trains its control from new weights with the same steps. The target's split is cold-start, so that warm
events, held-out items and held-out users have rows of their own. Each row also has what features alone reach without
training (content-kNN), which both should pass. Options after `--` are those of both trainings.
Where a key means the same person in the sources and in the target, `--shared-users` adds rows for the users whom a
source has and for the others, whether or not they are in the share.
Finished runs are not trained again. An interval is that of a paired bootstrap over the test users of one seed,
as of `flm evaluate --against`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flm_torchrec.api.evaluation import Evaluated, EvaluateOptions, evaluate_run, write_evaluation
from flm_torchrec.data.keys import are_tombstones
from flm_torchrec.errors import FlmError
from flm_torchrec.evaluation.evaluate import Evaluation
from flm_torchrec.evaluation.metrics import RankCounts
from flm_torchrec.evaluation.paired import differences
from tools.studies.finetune_study import Results, plot, run_flm, told

ALL, SHARED, OTHER = "all", "shared user", "other user"
KINDS = {"warm": "fused", "cold user": "fused", "cold item": "content alone"}
"""Kinds of events, as `flm evaluate` names them, with the row of its table that is shown."""
ROWS = {ALL: "fused", **KINDS, SHARED: "fused", OTHER: "fused"}
METRICS = ("hr@10", "ndcg@10")
LESS = "fused ndcg@10 less scratch"
"""Entry of the evaluation of a fine-tuning: by kind of user, the difference and its interval."""
KNN = "content-kNN"
"""Baseline that learns from nothing."""


@dataclass(frozen=True)
class TransferStudy:
    """Where the study works, and what it compares."""

    folder: Path
    sources: Sequence[str]
    target: str
    steps: dict[float, int]
    """By share of the target's users, the steps of fine-tuning and of its control."""
    seeds: Sequence[int]
    pretrain: Sequence[str]
    """Options of pretraining alone."""
    options: Sequence[str]
    """Options of both trainings."""
    shared: np.ndarray | None = None
    """[users] bool: users of the target whom a source has too; None: the keys of sources and target mean others."""

    def source(self, seed: int) -> Path:
        """The run pretrained with a seed."""
        return self.folder / f"source-{seed}"

    def tuned(self, share: float, seed: int) -> Path:
        """The folder of a fine-tuning and its control."""
        return self.folder / f"{share:g}-{seed}"

    def train_source(self, seed: int) -> str | None:
        """Pretrain with a seed, or go on where that was stopped → what went wrong, or None."""
        run = self.source(seed)
        settings = ["--train.run", str(run), "--train.seed", str(seed), "--train.existing", "resume"]
        return _flm("train", run, "--data.path", *self.sources, *settings, *self.options, *self.pretrain)

    def tune(self, share: float, seed: int) -> str | None:
        """Fine-tune on a share with a seed, and train the control, unless done → what went wrong, or None."""
        folder = self.tuned(share, seed)
        if (folder / "finetune.json").is_file():
            return None
        steps = str(self.steps[share])
        settings = {
            "--finetune.source": self.source(seed),
            "--finetune.share": share,
            "--data.path": self.target,
            "--data.split": "cold-start",
            "--train.run": folder,
            "--train.seed": seed,
            "--train.epochs": steps,
            "--train.max_steps": steps,
            "--train.existing": "replace",
        }
        given = [str(part) for pair in settings.items() for part in pair]
        return _flm("finetune", folder, *given, *self.options)

    def compare(self, share: float, seed: int) -> str | None:
        """Rank the test events of a fine-tuning and of its control, unless done → what went wrong, or None."""
        folder = self.tuned(share, seed)
        done = 1 if self.shared is None else 2  # kinds of users that are told apart at least
        if not (folder / "finetune.json").is_file() or len(differences_of(folder)) >= done:
            return None
        options = EvaluateOptions(overrides=[f"eval.baselines=[{KNN}]"])
        try:
            scratch, tuned = (
                evaluate_run(folder / start, options, keep_ranks=True) for start in ("scratch", "pretrained")
            )
            kinds = kinds_of(tuned, self.shared)
            write_evaluation(folder / "scratch", with_kinds(scratch, kinds))
            mine, theirs = (found.evaluation.ranks["fused"] for found in (tuned, scratch))
            user = tuned.examples.user
            less = {
                kind: asdict(differences(mine[c], theirs[c], user[c], (10,))["ndcg@10"]) for kind, c in kinds.items()
            }
            write_evaluation(folder / "pretrained", with_kinds(tuned, kinds), {LESS: less})
        except FlmError as error:
            return f"{folder}: {error}"
        return None

    def finished(self) -> Iterator[tuple[float, int, Path]]:
        """Share, seed and folder of each fine-tuning that was compared."""
        for share in self.steps:
            for seed in self.seeds:
                if differences_of(self.tuned(share, seed)):
                    yield share, seed, self.tuned(share, seed)


def _flm(verb: str, run: Path, *arguments: str) -> str | None:
    """Run a command with its output in RUN.VERB.log → what went wrong, or None."""
    log = run.parent / f"{run.name}.{verb}.log"
    return None if run_flm([verb, *arguments], log) else f"{run}: flm {verb} failed, see {log}"


def differences_of(folder: Path) -> dict[str, dict[str, float]]:
    """By kind of user, how much better a fine-tuning is than its control; nothing where they were not compared yet."""
    file = folder / "pretrained/evaluation-test.json"
    return json.loads(file.read_text(encoding="utf-8")).get(LESS, {}) if file.is_file() else {}


def shared_users(sources: Sequence[str], target: str) -> np.ndarray:
    """[users] bool: users of the target whose key a source has too. Who was forgotten is shared with nobody."""
    theirs = pa.chunked_array([chunk for source in sources for chunk in _user_keys(source).chunks], pa.string())
    return pc.is_in(_user_keys(target), value_set=theirs, skip_nulls=True).to_numpy()


def _user_keys(folder: str) -> pa.ChunkedArray:
    users = pq.read_table(Path(folder) / "users.parquet", columns=["user_id", "user_key"])
    keys = users["user_key"].cast(pa.string())
    return pc.if_else(are_tombstones(keys, users["user_id"]), None, keys)


def kinds_of(found: Evaluated, shared: np.ndarray | None) -> dict[str, np.ndarray]:
    """By kind of user that has examples, those examples [E] bool: all and, where `shared` is known, its two kinds."""
    kinds = {ALL: np.ones(len(found.examples), bool)}
    if shared is not None:
        kinds |= {SHARED: shared[found.examples.user], OTHER: ~shared[found.examples.user]}
    return {kind: chosen for kind, chosen in kinds.items() if chosen.any()}


def with_kinds(found: Evaluated, kinds: Mapping[str, np.ndarray]) -> Evaluation:
    """The evaluation, and a segment for each kind of user."""
    ranks = found.evaluation.ranks
    tables = {
        kind: {row: RankCounts(np.bincount(r[chosen] - 1), {}).metrics(found.ks) for row, r in ranks.items()}
        for kind, chosen in kinds.items()
        if kind != ALL
    }
    return replace(found.evaluation, segments={**found.evaluation.segments, **tables})


def collect(study: TransferStudy) -> Results:
    """By share, first weights and "KIND METRIC", one value for each finished seed."""
    results: Results = {}
    for share, _, folder in study.finished():
        for start in ("pretrained", "scratch"):
            for name, value in _metrics(folder / start, ROWS):
                results.setdefault((share, start, name), []).append(value)
        for name, value in _metrics(folder / "scratch", dict.fromkeys(ROWS, KNN)):
            results.setdefault((share, KNN, name), []).append(value)
    return results


def _metrics(run: Path, rows: dict[str, str]) -> Iterator[tuple[str, float]]:
    """`KIND METRIC` and value, of each kind of event that the run's test examples have, by the row given for it."""
    found = json.loads((run / "evaluation-test.json").read_text(encoding="utf-8"))
    tables = {ALL: found["table"], **found["segments"]}
    for kind, row in rows.items():
        if row in tables.get(kind, {}):  # an evaluation of before content-kNN lacks it
            yield from ((f"{kind} {metric}", tables[kind][row][metric]) for metric in METRICS)


def markdown(study: TransferStudy, results: Results) -> str:
    """A row for each share and kind of event: from the sources, from scratch, how many times as good, untrained."""
    heads = [f"{metric} {start}" for metric in METRICS for start in ("pretrained", "from scratch", "ratio", KNN)]
    lines = [f"| share | events | row | seeds | {' | '.join(heads)} |", "|---" * (4 + len(heads)) + "|"]
    for share, (kind, row) in product(study.steps, ROWS.items()):
        cells = [f"{share:.0%}", kind, row]
        for metric in METRICS:
            tuned, scratch, near = (
                results.get((share, start, f"{kind} {metric}"), []) for start in ("pretrained", "scratch", KNN)
            )
            if tuned:
                counted = [] if len(cells) > 3 else [str(len(tuned))]
                cells += [*counted, told(tuned), told(scratch), _ratio(tuned, scratch), told(near[:1]) if near else "-"]
        if len(cells) > 3:
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def intervals(study: TransferStudy) -> str:
    """For each share, seed and kind of user, how much better the fused row is with the sources than from scratch."""
    lines = ["| share | seed | events | fused ndcg@10, pretrained less scratch |", "|---|---|---|---|"]
    for share, seed, folder in study.finished():
        for kind, d in differences_of(folder).items():
            lines.append(f"| {share:.0%} | {seed} | {kind} | {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] |")
    return "\n".join(lines)


def _ratio(mine: Sequence[float], others: Sequence[float]) -> str:
    return f"{np.mean(mine) / np.mean(others):.2f}" if np.mean(others) > 0 else "-"


def read_study() -> tuple[TransferStudy, int]:
    """The study that the command line describes, and how many runs train at once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sources", nargs="+", required=True, metavar="DATA", help="prepared data to pretrain on")
    parser.add_argument("--target", required=True, metavar="DATA", help="prepared data to fine-tune on")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="(default: 0.01 0.1 1)")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 800], help="one for each share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    parser.add_argument(
        "--shared-users",
        action="store_true",
        help="keys of users mean the same people in sources and target: rows for those whom a source has",
    )
    parser.add_argument("--pretrain", default="", metavar="OPTIONS", help="options of pretraining alone, in one string")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="options of both trainings")
    args = parser.parse_args()
    if len(args.steps) != len(args.shares):
        parser.error(f"--steps: {len(args.steps)} numbers for {len(args.shares)} shares; give one for each share")
    for folder in (*args.sources, args.target):
        if not (Path(folder) / "schema.yaml").is_file():
            parser.error(f"{folder}: no schema.yaml; give folders that 'flm prepare --output' wrote")
    shared = shared_users(args.sources, args.target) if args.shared_users else None
    if shared is not None and not shared.any():
        parser.error(
            f"--shared-users: no user of {args.target} is in a source; prepare all with the keys of the same people"
        )
    steps = dict(zip(args.shares, args.steps, strict=True))
    pretrain = shlex.split(args.pretrain)
    study = TransferStudy(args.output, args.sources, args.target, steps, args.seeds, pretrain, args.options, shared)
    return study, args.jobs


def main() -> int:
    """Train what is missing, print the tables, write the plot; 1 if a run failed."""
    study, jobs = read_study()
    with ThreadPoolExecutor(jobs) as pool:
        failures = [failed for failed in pool.map(study.train_source, study.seeds) if failed]
        if not failures:
            tunings = [(share, seed) for share in study.steps for seed in study.seeds]
            failures = [failed for failed in pool.map(lambda one: study.tune(*one), tunings) if failed]
            failures += [failed for one in tunings if (failed := study.compare(*one))]
    results = collect(study)
    print(f"{markdown(study, results)}\n\n{intervals(study)}")
    if results:
        plot(results, list(study.steps), [f"{kind} ndcg@10" for kind in KINDS], study.folder / "transfer.svg")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
