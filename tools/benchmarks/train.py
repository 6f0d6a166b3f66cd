"""This project's trainer beside others, on the same data, settings and threads, in turn; prints Markdown.

    python tools/benchmarks/train.py --data data/beauty --recbole-python /tmp/recbole/bin/python \\
        --rectools-python /tmp/rectools/bin/python --implicit-python /tmp/implicit/bin/python \\
        --quality --peer-rates 0.001 0.003 0.01 --roofline

The others: SASRec in plain PyTorch (tools/benchmarks/train_plain.py); and, each in an environment of its own and only
if its python is given, RecBole's SASRec, RecTools' SASRec and eSASRec, and implicit's ALS and BPR:

    python -m venv /tmp/recbole && /tmp/recbole/bin/pip install torch==2.13.0    # the CPU build
    /tmp/recbole/bin/pip install --no-deps recbole==1.2.1                        # its ray is not needed
    /tmp/recbole/bin/pip install numpy==1.26.4 pandas==2.2.3 scipy==1.17.1 scikit-learn==1.9.1 pyyaml tqdm \\
        colorlog==4.7.2 colorama==0.4.4 tensorboard==2.21.0 thop tabulate plotly texttable psutil
    python -m venv /tmp/rectools && /tmp/rectools/bin/pip install torch==2.13.0  # the CPU build
    /tmp/rectools/bin/pip install 'rectools[torch]==0.19.0'
    python -m venv /tmp/implicit && /tmp/implicit/bin/pip install implicit==0.7.3

Each trainer is a process that waits for its turn. Compared are sequences per second and targets per second, because
RecBole learns one target per sequence, and the others learn one target per position. ALS and BPR know no sequences.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.splits import split
from flm_torchrec.data.windows import windows

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("recbole", "rectools", "implicit")
"""Packages of the trainers that have environments of their own."""
PRECISIONS = ("fp32", "bf16")
SAMPLED = 2048
"""Negatives of our default softmax."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ALONE = ["data.features=none", "model.block=transformer", "loss.content=0", "loss.collaborative=0", "loss.attribute=0"]
"""Settings for our sequential head alone, without anything that SASRec lacks."""


@dataclass
class Answer:
    """The answer to a request."""

    result: Any
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Entrant:
    """A trainer that can be started."""

    name: str
    kind: str
    """Its module is tools/benchmarks/train_KIND.py."""
    spec: dict[str, Any]
    python: str = sys.executable
    folder: Path | None = None
    """Where it runs; None: here."""
    validate_every: int | None = None
    """Steps between two validations; None: as asked for."""


class TrainerProcess:
    """A process that runs a trainer and answers requests; see `tools.benchmarks.train_peer`."""

    def __init__(self, entrant: Entrant) -> None:
        self.name = entrant.name
        self.process = subprocess.Popen(
            [entrant.python, "-m", f"tools.benchmarks.train_{entrant.kind}", json.dumps(entrant.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
            cwd=entrant.folder,
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


def versions(args: argparse.Namespace) -> dict[str, str]:
    """Versions of the other libraries whose python is given.

    Raises:
        SystemExit: one of these cannot be run, or lacks the library.
    """
    found = {}
    for package in OTHERS:
        if python := getattr(args, f"{package}_python"):
            asked = f"import importlib.metadata as m; print(m.version({package!r}))"
            try:
                done = subprocess.run([python, "-c", asked], capture_output=True, text=True)
            except OSError as error:
                raise SystemExit(f"--{package}-python {python}: {error.strerror}; name the python to run") from None
            if done.returncode:
                raise SystemExit(f"--{package}-python {python}: lacks {package}; --help says how it is installed")
            found[package] = done.stdout.strip()
    return found


def trainers(args: argparse.Namespace, path: str, items: int, folder: Path) -> list[Entrant]:
    """All trainers that take part."""

    def ours(name: str, *more: str) -> Entrant:
        return Entrant(f"ours, {name}", "ours", {"config": "", "settings": our_settings(args, path, *more)})

    found = [
        ours("sequential head alone, bf16", *ALONE, "loss.precision=bf16"),
        ours("sequential head alone, fp32", *ALONE, "loss.precision=fp32"),
        ours("three heads, bf16", "loss.precision=bf16"),
    ]
    if items > SAMPLED:
        found.append(ours("three heads, bf16, 2,048 negatives", "loss.precision=bf16", f"loss.negatives={SAMPLED}"))
    shared = ("threads", "length", "dim", "layers", "heads", "dropout", "batch_size")
    spec = {name: getattr(args, name) for name in shared}
    spec |= {"seed": 0, "file": str(folder / "plain.npz"), "folder": str(folder)}
    found += [Entrant(f"plain PyTorch, {p}", "plain", {**spec, "lr": args.lr, "precision": p}) for p in PRECISIONS]

    def other(name: str, package: str, every: int | None = None, **more: Any) -> None:
        if python := getattr(args, f"{package}_python"):
            # They write logs into their working folder, so they run in the temporary one.
            found.append(Entrant(name, package, {**spec, **more}, os.path.abspath(python), folder, every))

    other("RecBole's SASRec, fp32", "recbole", lr=args.lr)
    for model in ("SASRec", "eSASRec"):
        other(f"RecTools' {model}, fp32", "rectools", lr=args.lr, model=model)
    other("implicit's ALS, fp32", "implicit", every=1, model="ALS")
    other("implicit's BPR, fp32", "implicit", model="BPR", lr=args.lr)
    return found


def speed(args: argparse.Namespace, running: list[TrainerProcess]) -> None:
    """Print the speed and memory of all trainers, measured in turn."""
    rates: dict[str, list[tuple[float, float]]] = {t.name: [] for t in running}  # sequences/s, targets/s
    peaks: dict[str, float] = {}
    for trainer in running:
        trainer.ask("steps", count=2)
    for _ in range(args.rounds):
        for trainer in running:
            answer = trainer.ask("steps", count=args.steps)
            rates[trainer.name].append((answer.result[0] / answer.seconds, answer.result[1] / answer.seconds))
            peaks[trainer.name] = answer.peak_mib
    print("| trainer | sequences/s | targets/s | peak MiB |\n" + "|---" * 4 + "|")
    for name, turns in rates.items():
        sequences, targets = (statistics.median(part) for part in zip(*turns, strict=True))
        print(f"| {name} | {f'{sequences:.0f}' if sequences else '–'} | {targets:.0f} | {peaks[name]:.0f} |")
    ours = [name for name in rates if name.startswith("ours")]
    print("\n| sequences/s and targets/s, in times those of |", *(f"{name} |" for name in ours))
    print("|---" * (1 + len(ours)) + "|")
    for name in rates:
        cells = (f"{_times(rates[one], rates[name], 0)}, {_times(rates[one], rates[name], 1)}" for one in ours)
        print(f"| {name} |", *(f"{cell} |" for cell in cells), flush=True)


def _times(ours: list[tuple[float, float]], others: list[tuple[float, float]], part: int) -> str:
    """Median over the turns of our rate over another's."""
    if not others[0][part]:
        return "–"
    return f"{statistics.median(a[part] / b[part] for a, b in zip(ours, others, strict=True)):.3g}"


class Attempt:
    """A trainer on its way to the target."""

    def __init__(self, entrant: Entrant, every: int) -> None:
        self.name, self.rate = entrant.name, entrant.spec.get("lr", "")
        self.process, self.every = TrainerProcess(entrant), entrant.validate_every or every
        self.seconds, self.sequences, self.targets, self.score = 0.0, 0, 0, 0.0

    def advance(self) -> None:
        """Train until the next validation, validate, and tell the result on standard error."""
        answer = self.process.ask("steps", count=self.every)
        self.seconds += answer.seconds
        self.sequences += answer.result[0]
        self.targets += answer.result[1]
        self.score = self.process.ask("validate").result
        counts = f"{self.sequences} sequences, {self.targets} targets, {self.seconds:.1f} s"
        print(f"{self.name} {self.rate}: {counts}, NDCG@10 {self.score:.4f}", file=sys.stderr, flush=True)


def race(args: argparse.Namespace, tried: list[Entrant]) -> tuple[Attempt, list[Attempt]]:
    """Train in turn until one reaches the target, or all have had their seconds; the best, and all."""
    with ExitStack() as stack:
        running = [Attempt(one, args.validate_every) for one in tried]
        for attempt in running:
            stack.callback(attempt.process.close)
        while max(a.score for a in running) < args.target and (going := [a for a in running if a.seconds < args.limit]):
            for attempt in going:
                attempt.advance()
    reached = [a for a in running if a.score >= args.target]
    return min(reached, key=lambda a: a.seconds) if reached else max(running, key=lambda a: a.score), running


def quality(args: argparse.Namespace, entrants: list[Entrant]) -> None:
    """Print the seconds of training until validation NDCG@10 reaches the target, without the time of validations.

    Each trainer is started anew. One that has a learning rate tries all of `--peer-rates` at once; the best is bold.
    """
    titles = ("trainer", "rate", f"seconds to NDCG@10 = {args.target}", "sequences", "targets", "NDCG@10")
    print(f"\n| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|")
    for one in entrants:
        tried = [replace(one, spec={**one.spec, "lr": rate}) for rate in args.peer_rates] if "lr" in one.spec else [one]
        best, attempts = race(args, tried)
        for a in attempts:
            name = f"**{a.name}**" if a is best else a.name
            reached = f"{a.seconds:.1f}" if a.score >= args.target else f"not in {a.seconds:.0f}"
            row = [name, a.rate, reached, a.sequences or "–", a.targets, f"{a.score:.4f}"]
            print("|", *(f"{cell} |" for cell in row), flush=True)


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
        rest = roof["dense ms"] - roof["native code ms"]
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
            running.append(TrainerProcess(Entrant(setting, "ours", spec)))
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


def compare(args: argparse.Namespace, path: str) -> None:
    """Print the tables of one prepared folder."""
    with tempfile.TemporaryDirectory() as name:
        data = load_prepared(path)
        write_for_others(data, args.length, Path(name))
        entrants = trainers(args, path, data.schema.items, Path(name))
        print(f"\n{path}, {args.threads} threads, batch {args.batch_size}, length {args.length}:\n")
        with ExitStack() as measured:
            running = [TrainerProcess(one) for one in entrants]
            for trainer in running:
                measured.callback(trainer.close)
            speed(args, running)
            if args.roofline:
                inside(args, running)
        if args.quality:
            quality(args, entrants)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["data/beauty"], help="prepared folders (default: %(default)s)")
    for name in OTHERS:
        parser.add_argument(f"--{name}-python", default="", help=f"python of {name}'s environment; empty: without it")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each trainer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each trainer (default: %(default)s)")
    for name, value in {"dim": 64, "layers": 2, "heads": 2, "length": 50, "batch_size": 256, "epochs": 10}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the others (default: %(default)s)")
    parser.add_argument("--quality", action="store_true", help="time to the target too")
    parser.add_argument("--target", type=float, default=0.030, help="validation NDCG@10 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="most seconds to it (default: %(default)s)")
    parser.add_argument("--validate-every", type=int, default=40, help="steps between (default: %(default)s)")
    parser.add_argument("--roofline", action="store_true", help="stages and roofline of our steps too")
    parser.add_argument("--growth", action="store_true", help="cost by length and batch too")
    help_rates = "learning rates that each of the others tries on its way to the target (default: --lr)"
    parser.add_argument("--peer-rates", type=float, nargs="+", help=help_rates)
    args = parser.parse_args()
    args.peer_rates = args.peer_rates or [args.lr]
    print("; ".join(f"{name} {version}" for name, version in versions(args).items()))
    for path in args.data:
        compare(args, path)
        if args.growth:
            growth(args, path)


if __name__ == "__main__":
    main()
