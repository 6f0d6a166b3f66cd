"""One training on a CPU and on a GPU: the largest differences of losses and metrics, and the sequences/s of each.

    python tools/studies/devices.py --config configs/ml_100k.yaml --steps 60 --output runs/devices

Without dropout both learn the same but for rounding. Other settings follow, as for 'flm train'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

SAME = [
    "--model.dropout=0",
    "--model.embedding_dropout=0",
    "--model.id_dropout=0",
    "--model.user_id_dropout=0",
    "--train.patience=0",
    "--train.checkpoint_every=0",
    "--train.existing=replace",
    "--train.log_every=1",
]


def lines_of(run: Path) -> list[dict[str, float]]:
    """Lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(device: str, args: argparse.Namespace, more: list[str]) -> list[dict[str, float]]:
    """Train on a device; the lines of its metrics."""
    run = args.output / device
    options = [f"--config={args.config}", f"--train.run={run}", f"--distributed.device={device}"]
    steps = [f"--train.max_steps={args.steps}", f"--train.eval_every={args.steps}"]
    subprocess.run([sys.executable, "-m", "flm_torchrec", "train", *options, *steps, *SAME, *more], check=True)
    return lines_of(run)


def main() -> None:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="YAML of a run")
    parser.add_argument("--steps", type=int, default=60, help="steps of each training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/devices"), help="folder of the two runs")
    args, more = parser.parse_known_args()
    found = {device: train(device, args, more) for device in ("cpu", "cuda")}
    differences: dict[str, float] = {}
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        for name in cpu:
            if name.startswith(("loss", "valid/")):
                relative = abs(cpu[name] - cuda[name]) / max(abs(cpu[name]), 1e-9)
                differences[name] = max(differences.get(name, 0.0), relative)
    for name, value in differences.items():
        print(f"{name}: largest relative difference {value:.2e}")
    for device, lines in found.items():
        rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
        print(f"{device}: {sum(rates[len(rates) // 2 :]) / max(1, len(rates) - len(rates) // 2):.0f} sequences/s")


if __name__ == "__main__":
    main()
