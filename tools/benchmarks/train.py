"""This project's trainer beside others, on the same data, settings and threads, in turn; prints Markdown.

    python tools/benchmarks/train.py --data data/beauty --recbole-python /tmp/recbole/bin/python --quality --roofline

The others: SASRec in plain PyTorch (tools/benchmarks/train_plain.py), and RecBole's SASRec in its own environment:

    python -m venv /tmp/recbole && /tmp/recbole/bin/pip install torch==2.13.0    # the CPU build
    /tmp/recbole/bin/pip install --no-deps recbole==1.2.1                        # its ray is not needed
    /tmp/recbole/bin/pip install numpy==1.26.4 pandas==2.2.3 scipy==1.17.1 scikit-learn==1.9.1 pyyaml tqdm \\
        colorlog==4.7.2 colorama==0.4.4 tensorboard==2.21.0 thop tabulate plotly texttable psutil

Each trainer is a process that waits for its turn. Compared are sequences per second and targets per second, because
RecBole learns one target per sequence, and the others learn one target per position.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.splits import split
from flm_torchrec.data.windows import windows

ROOT = Path(__file__).resolve().parents[2]
OURS, PLAIN, RECBOLE = (f"tools.benchmarks.train_{name}" for name in ("ours", "plain", "recbole"))
"""Modules of the trainers."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ALONE = ["data.features=none", "model.block=transformer", "loss.content=0", "loss.collaborative=0", "loss.attribute=0"]
"""Settings for our sequential head alone, without anything that SASRec lacks."""


@dataclass
class Answer:
    """The answer to a request."""

    result: Any
    seconds: float
    peak_mib: float


class TrainerProcess:
    """A process that runs a trainer and answers requests; see `tools.benchmarks.train_peer`."""

    def __init__(self, name: str, python: str, module: str, spec: dict[str, Any], folder: Path | None = None) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
            cwd=folder,
        )

    def ask(self, do: str, **arguments: int) -> Answer:
        """Call a method of the trainer.

        Raises:
            SystemExit: the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended; to see why, run {' '.join(self.process.args)!r}")  # type: ignore[arg-type]
        answer = json.loads(line)
        return Answer(answer["result"], answer["seconds"], answer["peak_mib"])

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def our_settings(args: argparse.Namespace, data: str, *more: str) -> list[str]:
    """Overrides of our config that correspond to the options of this benchmark, and further ones."""
    settings = {
        "data.path": data,
        "data.max_history": args.length,
        "model.dim": args.dim,
        "model.layers": args.layers,
        "model.attention_heads": args.heads,
        "model.dropout": args.dropout,
        "model.embedding_dropout": args.dropout,
        "train.batch_size": args.batch_size,
        "distributed.threads": args.threads,
        "distributed.device": "cpu",
        "loss.negatives": "all",
        "train.epochs": args.epochs,
    }
    return [*(f"{key}={value}" for key, value in settings.items()), *more]


def write_for_others(data: PreparedData, length: int, folder: Path) -> None:
    """Write the same training sequences and validation events as arrays, and as an atomic file of RecBole."""
    splits = split(data, "leave-one-out", 0.1)
    spans = windows(data, splits, length)
    train = np.concatenate([data.item[a:b] for a, b in zip(spans.start, spans.end, strict=True)]) + np.int64(1)
    first = data.offsets[splits.valid.user]
    valid = np.concatenate([data.item[a : b + 1] for a, b in zip(first, splits.valid.end, strict=True)]) + np.int64(1)
    np.savez(
        folder / "plain.npz",
        items=data.schema.items,
        train=train,
        train_offsets=np.concatenate([[0], np.cumsum(spans.end - spans.start)]),
        valid=valid,
        valid_offsets=np.concatenate([[0], np.cumsum(splits.valid.end + 1 - first)]),
    )
    (folder / "bench").mkdir()
    position = np.arange(len(data.item)) - data.offsets[data.event_users()]
    rows = np.stack([data.event_users(), data.item, position], 1)
    header = "user_id:token\titem_id:token\ttimestamp:float"
    np.savetxt(folder / "bench" / "bench.inter", rows, "%d", "\t", header=header, comments="")


def trainers(args: argparse.Namespace, path: str, folder: Path) -> list[TrainerProcess]:
    """Start all trainers."""
    shared = ("threads", "length", "dim", "layers", "heads", "dropout", "batch_size", "lr")
    spec = {name: getattr(args, name) for name in shared}
    spec |= {"seed": 0, "file": str(folder / "plain.npz"), "folder": str(folder)}

    def ours(name: str, *more: str) -> TrainerProcess:
        return TrainerProcess(name, sys.executable, OURS, {"config": "", "settings": our_settings(args, path, *more)})

    started = [
        ours("ours, sequential head alone, bf16", *ALONE, "loss.precision=bf16"),
        ours("ours, sequential head alone, fp32", *ALONE, "loss.precision=fp32"),
        ours("ours, three heads, bf16", "loss.precision=bf16"),
        *(
            TrainerProcess(f"plain PyTorch, {p}", sys.executable, PLAIN, {**spec, "precision": p})
            for p in ("fp32", "bf16")
        ),
    ]
    if args.recbole_python:
        # RecBole writes logs into its working folder, so it runs in the temporary one.
        started.append(TrainerProcess("RecBole, fp32", os.path.abspath(args.recbole_python), RECBOLE, spec, folder))
    return started


def speed(args: argparse.Namespace, running: list[TrainerProcess]) -> None:
    """Print the speed and memory of all trainers, measured in turn."""
    rates: dict[str, list[float]] = {t.name: [] for t in running}
    targets: dict[str, list[float]] = {t.name: [] for t in running}
    peaks: dict[str, float] = {}
    for trainer in running:
        trainer.ask("steps", count=2)
    for _ in range(args.rounds):
        for trainer in running:
            answer = trainer.ask("steps", count=args.steps)
            rates[trainer.name].append(answer.result[0] / answer.seconds)
            targets[trainer.name].append(answer.result[1] / answer.seconds)
            peaks[trainer.name] = answer.peak_mib
    others = [t.name for t in running if not t.name.startswith("ours")]
    print("| trainer | sequences/s | targets/s | peak MiB |", *(f"× {name} |" for name in others))
    print("|---" * (4 + len(others)) + "|")
    for name in rates:
        ratios = [statistics.median(a / b for a, b in zip(rates[name], rates[o], strict=True)) for o in others]
        numbers = [statistics.median(rates[name]), statistics.median(targets[name]), peaks[name]]
        cells = [*(f"{number:.0f}" for number in numbers), *(f"{ratio:.2f}" for ratio in ratios)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def quality(args: argparse.Namespace, running: list[TrainerProcess]) -> None:
    """Print the seconds of training until validation NDCG@10 reaches the target, without the time of validations."""
    print(f"\n| trainer | seconds to NDCG@10 = {args.target} | sequences | targets | NDCG@10 |\n" + "|---" * 5 + "|")
    for trainer in running:
        seconds, sequences, learnt, score = 0.0, 0, 0, 0.0
        while score < args.target and seconds < args.limit:
            answer = trainer.ask("steps", count=args.validate_every)
            seconds += answer.seconds
            sequences, learnt = sequences + answer.result[0], learnt + answer.result[1]
            score = trainer.ask("validate").result
        reached = f"{seconds:.1f}" if score >= args.target else f"not in {seconds:.0f}"
        print(f"| {trainer.name} | {reached} | {sequences} | {learnt} | {score:.4f} |", flush=True)


def inside(args: argparse.Namespace, running: list[TrainerProcess]) -> None:
    """Print the stages of our steps, and the dense part beside its roofline."""
    for trainer in (t for t in running if t.name.startswith("ours")):
        print(f"\n{trainer.name}:")
        stages = trainer.ask("stages", count=args.steps).result
        total = sum(ms for name, ms in stages.items() if not name.startswith("all-to-all"))
        print("stages, ms: " + ", ".join(f"{name} {ms:.1f} ({ms / total:.0%})" for name, ms in stages.items()))
        roof = trainer.ask("roofline", count=args.rounds).result
        print("dense part: " + ", ".join(f"{name} {value:.4g}" for name, value in roof.items()))
        parts = roof["products ms"], roof["traffic at copy rate ms"]
        rest = roof["dense ms"] - roof["native softmax ms"]
        overlapping, in_turn = max(parts) / rest, sum(parts) / rest
        print(
            f"all but native code: share of the roofline {overlapping:.0%};"
            f" if products and traffic cannot overlap, {in_turn:.0%}",
            flush=True,
        )


def growth(args: argparse.Namespace, path: str) -> None:
    """Print the time of our step, three heads, as length and batch grow."""
    cases = [f"data.max_history={n}" for n in (12, 25, 50, 100, 200)]
    cases += [f"train.batch_size={n}" for n in (64, 128, 256, 512)]
    with ExitStack() as stack:
        running = []
        for setting in cases:
            spec = {"config": "", "settings": our_settings(args, path, "loss.precision=bf16", setting)}
            running.append(TrainerProcess(setting, sys.executable, OURS, spec))
            stack.callback(running[-1].close)
        for trainer in running:
            trainer.ask("steps", count=2)  # warm-up
        steps: dict[str, list[tuple[float, int]]] = {t.name: [] for t in running}
        for trainer in running * args.rounds:
            answer = trainer.ask("steps", count=2)
            steps[trainer.name].append((1e3 * answer.seconds / 2, answer.result[1] // 2))
    print("\n| setting | ms a step | targets a step | µs a target |\n" + "|---" * 4 + "|")
    for name, turns in steps.items():
        each = statistics.median(1e3 * ms / targets for ms, targets in turns)
        ms, targets = (statistics.median(part) for part in zip(*turns, strict=True))
        print(f"| {name} | {ms:.1f} | {targets:.0f} | {each:.1f} |", flush=True)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["data/beauty"], help="prepared folders (default: %(default)s)")
    parser.add_argument("--recbole-python", default="", help="python of RecBole's environment; empty: without it")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each trainer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each trainer (default: %(default)s)")
    for name, value in {"dim": 64, "layers": 2, "heads": 2, "length": 50, "batch_size": 256, "epochs": 10}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the others' Adam (default: %(default)s)")
    parser.add_argument("--quality", action="store_true", help="time to the target too")
    parser.add_argument("--target", type=float, default=0.030, help="validation NDCG@10 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="most seconds to it (default: %(default)s)")
    parser.add_argument("--validate-every", type=int, default=40, help="steps between (default: %(default)s)")
    parser.add_argument("--roofline", action="store_true", help="stages and roofline of our steps too")
    parser.add_argument("--growth", action="store_true", help="cost by length and batch too")
    args = parser.parse_args()
    for path in args.data:
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            write_for_others(load_prepared(path), args.length, Path(name))
            running = trainers(args, path, Path(name))
            for trainer in running:
                stack.callback(trainer.close)
            print(f"\n{path}, {args.threads} threads, batch {args.batch_size}, length {args.length}:\n")
            speed(args, running)
            if args.quality:
                quality(args, running)
            if args.roofline:
                inside(args, running)
        if args.growth:
            growth(args, path)


if __name__ == "__main__":
    main()
