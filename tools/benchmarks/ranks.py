"""Two ranks of one thread each beside one: sequences a second, measured in turn in one run.

    python tools/benchmarks/ranks.py --data data/beauty --rounds 5 -- loss.precision=bf16

In each round one rank trains, then two ranks, then two jobs of one rank at once that do not know of each other: what
they reach together is what this machine can give to two processes. Prints the speeds, the median of their ratios over
the rounds, and where a step spends its time. What stands after `--` are settings of all.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.benchmarks.train import ENVIRONMENT  # noqa: E402


def start(
    ranks: int, steps: int, settings: Sequence[str], more: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A job that takes some steps and prints its sequences a second and its stages.

    Args:
        more: of its environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "tools.benchmarks.train_ours"]
    spec = json.dumps({"config": "", "settings": list(settings)})
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", **(more or {})}
    return subprocess.Popen(
        [*command, spec, str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def result(job: subprocess.Popen[str]) -> tuple[float, str]:
    """Sequences a second and stages.

    Raises:
        SystemExit: the job failed, with the end of what it said.
    """
    told, errors = job.communicate()
    if job.returncode:
        raise SystemExit(f"a job failed:\n{errors[-2000:]}")
    rate, _, stages = told.strip().splitlines()[-1].partition(" ")
    return float(rate), stages


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/beauty", help="prepared folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--each", action="store_true", help="each rank has so many sequences, instead of all together")
    parser.add_argument("settings", nargs="*", help="after --: settings as section.field=value")
    args = parser.parse_args()
    settings = [f"data.path={Path(args.data).resolve()}", "distributed.threads=1", "distributed.device=cpu"]
    settings += args.settings
    batch = {ranks: args.batch_size * (ranks if args.each else 1) for ranks in (1, 2)}
    rates: dict[str, list[float]] = {"one rank": [], "two ranks": [], "two jobs of one rank": []}
    for _ in range(args.rounds):
        found = {}
        for name, ranks in (("one rank", 1), ("two ranks", 2)):
            found[name] = result(start(ranks, args.steps, [*settings, f"train.batch_size={batch[ranks]}"]))
        pair = [start(1, args.steps, [*settings, f"train.batch_size={batch[1]}"]) for _ in range(2)]
        found["two jobs of one rank"] = (sum(result(job)[0] for job in pair), "")
        for name, (rate, stages) in found.items():
            rates[name].append(rate)
            print(f"{name}: {rate:.0f} sequences/s {stages}", flush=True)
    for name in list(rates)[1:]:
        ratios = [many / one for many, one in zip(rates[name], rates["one rank"], strict=True)]
        print(f"{name} / one rank: median {statistics.median(ratios):.2f} of {', '.join(f'{r:.2f}' for r in ratios)}")


if __name__ == "__main__":
    main()
