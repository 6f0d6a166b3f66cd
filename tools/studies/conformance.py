"""Which planted signal can a recommender learn, and how much of what is attainable? A table over systems.

    python -m tools.studies.conformance write runs/conformance --users 3000 --items 600 --events 30
    python -m tools.studies.conformance run runs/conformance --adapters baselines flm
    python -m tools.studies.conformance run runs/conformance --adapters implicit --python /tmp/peer/bin/python
    python -m tools.studies.conformance score runs/conformance my-lists.parquet --name my-model
    python -m tools.studies.conformance table runs/conformance

The data are synthetic: each event follows one of three signals, and the probability of every item is known, so the
best possible ranking is too. docs/conformance.md says how to read the table, and what another system must write.
A peer runs in an environment of its own. What was run is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.claim import claim
from flm_torchrec.config.options import options_of
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.files import replacing, telling
from flm_torchrec.prepare.options import Recipe
from tools.studies.conformance_data import ANOTHER, Suite, write_json, write_suite
from tools.studies.conformance_score import as_json, markdown, read_lists, scores_of

ROOT = Path(__file__).resolve().parents[2]
LEAST = 0.25
"""Share of the ceiling from which a signal counts as learnt."""
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"


@dataclass(frozen=True)
class Adapter:
    """A program of tools/studies/conformance_adapters, and what its interpreter must have."""

    module: str
    packages: tuple[str, ...]
    """Distributions whose versions are told."""
    install: str
    """How to get them."""
    model: str = ""
    """Which model of the program; empty: all that it has."""
    seeded: bool = True
    """Another seed gives another result."""


OURS = "make venv"
RECTOOLS = Adapter(
    "run_rectools", ("rectools", "torch", "pyarrow"), "pip install 'rectools[torch]==0.19.0' pyarrow==21.0.0", "SASRec"
)
RECBOLE = Adapter(
    "run_recbole",
    ("recbole", "torch", "pyarrow"),
    "install it by the commands at the top of tools/benchmarks/train.py, and pip install pyarrow==21.0.0",
    "SASRec",
)
ADAPTERS = {
    "baselines": Adapter("run_baselines", ("flm_torchrec",), OURS, seeded=False),
    "flm": Adapter("run_flm", ("flm_torchrec", "torch", "torchrec"), OURS),
    "implicit": Adapter("run_implicit", ("implicit", "pyarrow"), "pip install implicit==0.7.3 pyarrow==21.0.0"),
    "rectools": RECTOOLS,
    "rectools-features": replace(RECTOOLS, model="SASRec, features"),
    "recbole": RECBOLE,
    "recbole-fm": replace(RECBOLE, model="FM"),
}


@dataclass(frozen=True)
class AdapterRun:
    """An adapter with a seed, on the data of a suite."""

    suite: Suite
    name: str
    seed: int
    python: str = sys.executable
    minutes: float = 6.0

    @property
    def adapter(self) -> Adapter:
        """What is run."""
        return ADAPTERS[self.name]

    @property
    def folder(self) -> Path:
        """Where the lists and `about.json` are once it has run."""
        return self.suite.runs / f"{self.name}-{self.seed}"

    def versions(self) -> dict[str, str]:
        """Of the packages in the interpreter.

        Raises:
            RunError: one is missing there.
        """
        command = [self.python, "-c", VERSIONS, *self.adapter.packages]
        try:
            found = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RunError(f"--python {self.python}: cannot be run ({error.strerror}); name an interpreter") from error
        if found.returncode:
            packages = ", ".join(self.adapter.packages)
            raise RunError(f"{self.name}: {self.python} lacks one of {packages}; {self.adapter.install}")
        return json.loads(found.stdout)

    def execute(self) -> None:
        """Run the adapter, check its lists, and keep them; nothing where that was done before.

        Raises:
            RunError: the adapter fails, or a list breaks a rule.
        """
        with claim(self.folder, ANOTHER):
            if self.folder.exists():
                return
            versions, log = self.versions(), self.folder.with_suffix(".log")
            with telling(self.folder, ANOTHER), replacing(self.folder) as fresh, tempfile.TemporaryDirectory() as work:
                seconds = self._started(fresh, Path(work), log)
                for file in _lists(fresh):
                    read_lists(file, self.suite)
                about = {"adapter": self.name, "seed": self.seed, "versions": versions}
                write_json(fresh / "about.json", {**about, "processor_seconds": round(seconds, 1)})

    def _started(self, output: Path, work: Path, log: Path) -> float:
        """Run it to its end → the processor seconds that it took."""
        module = f"tools.studies.conformance_adapters.{self.adapter.module}"
        given: dict[str, Any] = {"data": self.suite.data.resolve(), "output": output, "work": work, "seed": self.seed}
        given |= {"minutes": self.minutes, "model": self.adapter.model}
        options = [f"--{name}={value}" for name, value in given.items()]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **threads}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with log.open("w", encoding="utf-8") as stream:
            command = [self.python, "-m", module, *options]
            code = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, cwd=work, env=environment
            ).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if code or not _lists(output):
            raise RunError(f"{self.name}, seed {self.seed}: failed ({code}) or wrote no lists; see {log}")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _lists(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def keep(suite: Suite, lists: Path, name: str, seed: int) -> Path:
    """Check the lists of another system, and take them into the table as `NAME`.

    Raises:
        RunError: the lists break a rule, or there are some of that name and seed.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w. +-]{0,60}", name):
        raise RunError(f"--name '{name}': letters, digits, space and . + - _ alone, at most 61")
    folder = suite.runs / f"other {name}-{seed}"
    read_lists(lists, suite)
    with claim(folder, "give another --name"):
        if folder.exists():
            raise RunError(f"{folder}: there are lists of '{name}' with seed {seed}; give another --name or --seed")
        with telling(folder), replacing(folder) as fresh:
            shutil.copyfile(lists, fresh / f"{name}.parquet")
            write_json(
                fresh / "about.json", {"adapter": "other", "seed": seed, "versions": {}, "processor_seconds": None}
            )
    return folder


def collect(suite: Suite) -> tuple[dict[str, list[np.ndarray]], dict[str, list[dict[str, Any]]]]:
    """By model, the [users] ranks of each seed; by adapter, what it ran on.

    Raises:
        RunError: a list breaks a rule.
    """
    ranks: dict[str, list[np.ndarray]] = {}
    about: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(suite.runs.glob("*/about.json")):
        try:
            found = read_json(file)
            about.setdefault(found["adapter"], []).append(found)
        except (Unreadable, KeyError, TypeError) as error:
            raise RunError(f"{file}: unreadable ({error}); remove its folder and run the adapter again") from error
        for lists in _lists(file.parent):
            ranks.setdefault(f"{found['adapter']}/{lists.stem}", []).append(read_lists(lists, suite))
    return ranks, about


def show(suite: Suite, least: float) -> None:
    """Print the tables as Markdown, and write table.json."""
    ranks, about = collect(suite)
    scores = scores_of(suite, ranks)
    print(markdown(scores, {name: len(found) for name, found in ranks.items()}, least))
    print()
    for name, runs in about.items():
        versions = " ".join(f"{package} {version}" for package, version in runs[0]["versions"].items())
        seconds = [run["processor_seconds"] for run in runs if run["processor_seconds"]]
        if seconds:
            print(f"* {name}: {versions}; {np.mean(seconds):.0f} s of processor time for a seed")
    with telling(suite.folder):
        write_json(suite.folder / "table.json", {"least_share": least, "scores": as_json(scores, least), "runs": about})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    suite = argparse.ArgumentParser(add_help=False)
    suite.add_argument("folder", type=Path, metavar="FOLDER", help="of the suite")

    def verb(name: str, told: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=told, description=told, parents=[suite], allow_abbrev=False)

    write = verb("write", "draw the data")
    for name, value in vars(Recipe()).items():
        write.add_argument(f"--{name}", type=type(value), default=value, help=f"(default: {value})")
    run = verb("run", "run adapters that have not run yet")
    run.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), required=True)
    run.add_argument("--python", default=sys.executable, metavar="PATH", help="interpreter that has the peer")
    run.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    run.add_argument("--minutes", type=float, default=6.0, help="processor time that a peer's training may take")
    score = verb("score", "take the lists of another system into the table")
    score.add_argument("lists", type=Path, metavar="LISTS.parquet")
    score.add_argument("--name", required=True, help="of the model")
    score.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    table = verb("table", "print the tables, write FOLDER/table.json")
    table.add_argument("--share", type=float, default=LEAST, help=f"of the ceiling, to have learnt (default: {LEAST})")
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.verb == "write":
        recipe = options_of(Recipe, {name: getattr(args, name) for name in vars(Recipe())})
        print(write_suite(args.folder, recipe).folder)
        return
    suite = Suite.load(args.folder)
    if args.verb == "score":
        print(keep(suite, args.lists, args.name, args.seed))
    elif args.verb == "table":
        show(suite, args.share)
    else:
        python = os.path.abspath(shutil.which(args.python) or args.python)  # adapters run in another folder
        for name in args.adapters:
            for seed in args.seeds if ADAPTERS[name].seeded else args.seeds[:1]:
                AdapterRun(suite, name, seed, python, args.minutes).execute()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data, run adapters, or print what they reached; 2 where something is wrong."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
