"""Kill and delay ranks, damage checkpoints, fill a disk, and check that training loses nothing.

    python tools/faults/chaos.py --data data/synthetic --output runs/chaos

A disturbed training must end with the state, best model and metrics of the same run undisturbed, bit for bit. Each
rank has one thread, since with more even two undisturbed runs differ. Prints a line a trial; exits 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from flm_torchrec.config import load_config
from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.training.checkpoint.manager import BEST, CHECKPOINTS, Checkpoints, load_checkpoint
from flm_torchrec.training.checkpoint.state import leaves, names
from flm_torchrec.training.checkpoint.storage import read_all
from flm_torchrec.training.job import Job, open_job

SETTINGS = [
    "model.dim=16",
    "model.layers=1",
    "data.max_history=20",
    "train.batch_size=64",
    "train.epochs=1000",
    "train.checkpoint_every=20",
    "train.log_every=5",
    "train.eval_users=200",
    "train.patience=0",
    "distributed.threads=1",
]
OF_TIME = ("seconds", "samples_per_second", "input_wait")
"""Metrics that differ between two equal runs."""
LONGEST = 900.0
"""Seconds after which a trial counts as failed."""


class Skipped(Exception):
    """A trial that this machine does not allow."""


@dataclass(frozen=True)
class Study:
    """What all trials share."""

    data: str
    folder: Path
    ranks: int
    steps: int
    rng: random.Random
    jobs: list[subprocess.Popen[bytes]]

    def end(self) -> None:
        """Kill the jobs that a trial left."""
        for job in self.jobs:
            if job.poll() is None:
                for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                    process.kill()

    def settings(self, run: Path) -> list[str]:
        """The settings of a run, as `section.field=value`."""
        validate = f"train.eval_every={max(1, self.steps // 2)}"
        return [*SETTINGS, f"data.path={self.data}", f"train.run={run}", f"train.max_steps={self.steps}", validate]

    def launch(self, run: Path, restarts: int = 0, *more: str) -> Trial:
        """Start a training under torchrun; `more` are settings."""
        options = [
            part for o in (*self.settings(run), *more) for part in (f"--{o.partition('=')[0]}", o.partition("=")[2])
        ]
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(self.ranks), "--max_restarts", str(restarts)),
            *("-m", "flm_torchrec", "--", "train", *options),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        log = self.folder / f"{run.name}.log"
        with log.open("ab") as output:
            job = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.jobs.append(job)
        return Trial(run, job, log)


@dataclass(frozen=True)
class Trial:
    """A job under torchrun."""

    run: Path
    job: subprocess.Popen[bytes]
    log: Path

    def step(self) -> int:
        """The newest step that the run has recorded."""
        try:
            return json.loads((self.run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError):
            return 0

    def ranks(self) -> list[int]:
        """Process ids of the ranks; waits while they are being started.

        Raises:
            RunError: the job ended.
        """
        until = time.monotonic() + LONGEST
        while self.job.poll() is None and time.monotonic() < until:
            children = [c for c in psutil.Process(self.job.pid).children() if c.status() != psutil.STATUS_ZOMBIE]
            if children:
                return sorted(child.pid for child in children)
            time.sleep(0.02)
        raise RunError(f"{self.log}: the job ended before it was to be disturbed; give more --steps")

    def until_step(self, step: int) -> None:
        """Wait until the run has recorded a step.

        Raises:
            RunError: the job ended before.
        """
        while self.step() < step:
            self.ranks()
            time.sleep(0.02)

    def finish(self) -> int:
        """Exit code, at the end of the job."""
        try:
            return self.job.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.job.kill()
            raise RunError(f"{self.log}: not done after {LONGEST:g} s") from None

    def succeed(self) -> None:
        """Wait for the end of the job.

        Raises:
            RunError: it failed.
        """
        if code := self.finish():
            raise RunError(f"{self.log}: ended with {code}")


def kills(study: Study, calm: Path, times: int) -> str:
    """SIGKILL to random ranks: two of three at a random moment of training, the others while ranks are started."""
    trial = study.launch(study.folder / "killed", restarts=times)
    starting = 0
    for _ in range(times):
        if study.rng.random() < 2 / 3:
            trial.until_step(trial.step() + 1)
            time.sleep(study.rng.uniform(0, 2))
        else:
            time.sleep(study.rng.uniform(0, 5))
            starting += 1
        ranks = trial.ranks()
        os.kill(study.rng.choice(ranks), signal.SIGKILL)
        while ranks[0] in trial.ranks():
            time.sleep(0.02)
    trial.succeed()
    resumed = (trial.run / "train.log").read_text().count("resuming after step")
    return (
        f"{times} kills, {starting} of them after a random wait from the restart; resumed {resumed} times; "
        + compare(calm, trial.run, study.steps)
    )


def delay(study: Study, calm: Path) -> str:
    """A rank that stands still for some seconds."""
    trial = study.launch(study.folder / "delayed")
    trial.until_step(study.steps // 4)
    rank = study.rng.choice(trial.ranks())
    os.kill(rank, signal.SIGSTOP)
    time.sleep(5)
    os.kill(rank, signal.SIGCONT)
    trial.succeed()
    return "a rank stopped for 5 s; " + compare(calm, trial.run, study.steps)


def full_disk(study: Study, calm: Path) -> str:
    """A disk of 40 MiB that is filled while training runs; then there is room again."""
    disk = study.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("mounting a small disk needs root")
    try:
        trial = study.launch(disk / "run")
        trial.until_step(study.steps // 4)
        with (disk / "filler").open("wb", buffering=0) as filler:
            while _written(filler):
                pass
        code = trial.finish()
        if code == 0:
            raise RunError(f"{trial.log}: did not notice that its disk was full")
        message = next(
            (x for x in trial.log.read_text().splitlines() if x.startswith("error: ") and "No space" in x), ""
        )
        if not message:
            raise RunError(f"{trial.log}: ended with {code}, but does not say that the disk was full")
        (disk / "filler").unlink()
        again = study.launch(disk / "run", 0, "train.existing=resume")
        again.succeed()
        return f"'{message[:100]}…', resumed with room; " + compare(calm, trial.run, study.steps)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _written(file) -> bool:  # type: ignore[no-untyped-def]
    try:
        return bool(file.write(bytes(1 << 16)))
    except OSError:
        return False


def corruptions(study: Study, calm: Path, times: int) -> str:
    """A bit flipped in, the end cut off, or a whole file missing of the newest state: the one before must be loaded."""
    older, newer = sorted((calm / CHECKPOINTS).glob("step-*"))[-2:]
    expected = read_all(older)
    config = load_config(None, study.settings(study.folder / "damaged"))
    kinds: dict[str, int] = {}
    missed = []
    with open_job(config) as job:
        for _ in range(times):
            run = study.folder / "damaged"
            shutil.copytree(older, run / CHECKPOINTS / older.name)
            shutil.copytree(calm / BEST, run / BEST)
            newer_copy = Path(shutil.copytree(newer, run / CHECKPOINTS / newer.name))
            kind, what = damage(newer_copy, study.rng)
            restored = Checkpoints(run, job.model, job.optimizer, job.comm, job.data.fingerprint).restore()
            loaded = None if restored is None or restored[1] != [newer_copy] else f"step-{restored[0].step:09d}"
            if loaded != older.name or not _holds(job, expected):
                missed.append(what)
            kinds[kind] = kinds.get(kind, 0) + 1
            shutil.rmtree(run)
        missed += _damaged_best(job, calm / BEST, study.folder / "damaged", times, study.rng)
    if missed:
        raise RunError(f"{len(missed)} of {times} not found: {'; '.join(missed[:3])}")
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return (
        f"{times} of {times} found ({listed}), the state before loaded each time; {times} of {times} of the best model"
    )


def _holds(job: Job, expected: dict[str, torch.Tensor]) -> bool:
    """Whether model and optimizer of this only rank are those expected."""
    state = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()["state"]}
    held = dict(zip(names(state), leaves(state), strict=True))
    wanted = {name: tensor for name, tensor in expected.items() if not name.startswith("rng.")}
    return held.keys() == wanted.keys() and all(torch.equal(_whole(held[n]), t) for n, t in wanted.items())


def _whole(tensor: torch.Tensor | ShardedTensor) -> torch.Tensor:
    if isinstance(tensor, ShardedTensor):
        return torch.cat([shard.tensor for shard in tensor.local_shards()])
    return tensor


def _damaged_best(job: Job, best: Path, run: Path, times: int, rng: random.Random) -> list[str]:
    """Damage that loading the best model did not notice."""
    missed = []
    for _ in range(times):
        _, what = damage(Path(shutil.copytree(best, run)), rng)
        try:
            load_checkpoint(run, job.model, job.comm)
            missed.append(what)
        except RunError:
            pass  # as it should be
        shutil.rmtree(run)
    return missed


def damage(folder: Path, rng: random.Random) -> tuple[str, str]:
    """Damage a random file of a folder → the kind of damage, and a line that says where."""
    file = rng.choice(sorted(folder.iterdir()))
    content = file.read_bytes()
    position = rng.randrange(len(content))
    kind = rng.choice(["bits flipped", "files cut off", "files missing"])
    if kind == "bits flipped":
        flipped = content[position] ^ (1 << rng.randrange(8))
        file.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
    elif kind == "files cut off":
        file.write_bytes(content[:position])
    else:
        file.unlink()
    return kind, f"{kind}: {file.name} at {position}"


def compare(run: Path, other: Path, steps: int) -> str:
    """Say that two finished runs are the same.

    Raises:
        RunError: they differ, and in what.
    """
    count = 0
    for name in (f"{CHECKPOINTS}/step-{steps:09d}", BEST):
        one, two = read_all(run / name), read_all(other / name)
        if one.keys() != two.keys():
            raise RunError(f"{other / name} holds other tensors than {run / name}")
        if unequal := [key for key in one if not torch.equal(one[key], two[key])]:
            most = max(float((one[key].double() - two[key].double()).abs().max()) for key in unequal)
            raise RunError(
                f"{other / name}: {len(unequal)} of {len(one)} tensors differ from {run}, by up to {most:.1e}"
            )
        count += len(one)
    lines = [_recorded(run), _recorded(other)]
    if lines[0] != lines[1]:
        raise RunError(f"{other}/metrics.jsonl differs from that of {run}")
    return f"{count} tensors and {len(lines[0])} lines of metrics the same to the last bit"


def _recorded(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_TIME} for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all trials; 1 if one failed, 2 if none could start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder written by 'flm prepare'")
    parser.add_argument("--output", type=Path, required=True, help="new folder for runs and logs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000, help="of each run (default: 1000)")
    parser.add_argument("--kills", type=int, default=20, help="in one run (default: 20)")
    parser.add_argument("--corruptions", type=int, default=100, help="of checkpoints (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of ranks, moments and bytes")
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise RunError(f"{args.output}: exists; give another --output")
        args.output.mkdir(parents=True)
        study = Study(args.data, args.output, args.ranks, args.steps, random.Random(args.seed), [])
        calm = study.launch(args.output / "calm")
        calm.succeed()
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trials: dict[str, Callable[[], str]] = {
        "corruptions": lambda: corruptions(study, calm.run, args.corruptions),
        "delay": lambda: delay(study, calm.run),
        "full disk": lambda: full_disk(study, calm.run),
        "kills": lambda: kills(study, calm.run, args.kills),
    }
    failed = False
    for name, trial in trials.items():
        began = time.monotonic()
        try:
            result = f"ok      {name}: {trial()}"
        except RunError as error:
            result, failed = f"FAILED  {name}: {error}", True
        except Skipped as reason:
            result = f"skipped {name}: {reason}"
        finally:
            study.end()
        print(f"{result}  ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
