"""Proof that a change moves no result: a small pipeline run by two checkouts, every number and file compared.

    python tools/proof.py --against main                # this tree, changes included, beside the commit `main`

The data are synthetic, and each rank has one thread, so that bits repeat. Compared: metrics of trainings (each fusion,
both blocks, streamed, fine-tuned, two ranks), tables of evaluations, files of exports. The exported tower is left out,
because its programs hold line numbers of the source. Exits 1 if something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
DATA = ["--data.path", "data"]
SHORT = (
    "--model.dim 16 --train.batch_size 32 --distributed.threads 1 --train.max_steps 40 --train.eval_every 15"
    " --train.log_every 5"
)
RUNS = {
    "sum": "",
    "gated": "--model.block transformer --model.relative_bias true --model.fusion gated --loss.fused 1"
    " --loss.negatives all",
    "concat": "--model.fusion concat --loss.fused 0.5 --model.similarity dot --loss.temperature 1 --loss.negatives 64"
    " --loss.collaborative 0 --loss.precision bf16",
    "streamed": "--data.stream true --train.eval_users 100",
}
EXPORTED = ("sum", "gated", "concat")
OF_TIME = ("seconds", "samples_per_second", "input_wait")
"""Values of metrics.jsonl that depend on the machine."""


def pipeline(source: Path, folder: Path) -> None:
    """Prepare, train, fine-tune, evaluate and export with the package of a checkout, in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def flm(*arguments: str, ranks: int = 1) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
        start = [sys.executable, *(launcher if ranks > 1 else []), "-m", "flm_torchrec", *(["--"] if ranks > 1 else [])]
        done = subprocess.run([*start, *arguments], env=environment, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{source}: flm {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")

    made_up = ["--synthetic-users", "300", "--synthetic-items", "150", "--synthetic-events", "12"]
    flm("prepare", "--source", "synthetic", *made_up, "--output", "data")
    for run, settings in RUNS.items():
        flm("train", *DATA, *f"{SHORT} {settings}".split(), "--train.run", run)
    flm("train", *DATA, *SHORT.split(), "--train.run", "two-ranks", ranks=2)
    flm("finetune", "--finetune.source", "sum", "--train.run", "finetuned", "--finetune.tower", "partial")
    for run in EXPORTED:
        flm("evaluate", "--run", run)
        flm("export", "--run", run, "--output", f"export-{run}")


def digests(folder: Path) -> dict[str, str]:
    """Digests of the results in a folder, by name of the result."""
    by_name = {}
    for file in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kept = [{name: value for name, value in line.items() if name not in OF_TIME} for line in lines]
        by_name[str(file.relative_to(folder))] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    files = [*folder.glob("data/**/*.parquet"), *folder.glob("*/evaluation*.json"), *folder.glob("export-*/**/*")]
    for file in sorted(file for file in files if file.is_file() and "tower" not in file.parts):
        if file.name != "manifest.json":  # it holds the digests of the tower
            by_name[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return by_name


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A temporary worktree of a commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    done = subprocess.run([*git, "add", "--detach", str(folder), commit], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"--against {commit}: {done.stderr.strip().splitlines()[-1]}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> int:
    """Print what differs, and 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="commit to compare this tree with")
    args = parser.parse_args()
    with TemporaryDirectory() as folder, checkout(args.against, Path(folder) / "tree") as other:
        results = []
        for name, source in (("now", ROOT), ("before", other)):
            (Path(folder) / name).mkdir()
            pipeline(source, Path(folder) / name)
            results.append(digests(Path(folder) / name))
    now, before = results
    differing = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(now) - len(differing)} of {len(now)} results are the same as those of {args.against}")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
