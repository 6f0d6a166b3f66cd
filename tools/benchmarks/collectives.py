"""Two ranks that send vectors and gradients as fp32 and as bf16, in turn, over connections of a given speed. Linux.

    python tools/benchmarks/collectives.py --data data/beauty --megabits 0 1000 100 -- loss.negatives=2048

The ranks are two processes of one thread on this host, over the loopback device. The kernel paces each TCP connection
to so many megabits a second (0: as fast as it can); a network's latency is not imitated. Prints sequences a second, and
the median of the ratio of bf16 to fp32 over the rounds. What stands after `--` are settings of both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.benchmarks.ranks import result, start  # noqa: E402

SOURCE = Path(__file__).with_name("paced_sockets.c")


def ratios(megabits: int, library: str, settings: Sequence[str], rounds: int, steps: int) -> list[float]:
    """Of each round, the sequences a second of bf16 over those of fp32; prints both."""
    paced = {"LD_PRELOAD": library, "PACED_BYTES": str(megabits * 125_000)} if megabits else {}
    found = []
    for _ in range(rounds):
        rates = {}
        for sent in ("fp32", "bf16"):
            rates[sent], stages = result(start(2, steps, [*settings, f"distributed.collectives={sent}"], paced))
            print(f"{megabits} Mbit/s, {sent}: {rates[sent]:.0f} sequences/s {stages}", flush=True)
        found.append(rates["bf16"] / rates["fp32"])
    return found


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/beauty", help="prepared folder (default: %(default)s)")
    parser.add_argument("--megabits", type=int, nargs="+", default=[0, 1000, 100], help="speeds (default: 0 1000 100)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn (default: %(default)s)")
    parser.add_argument("settings", nargs="*", help="after --: settings as section.field=value")
    args = parser.parse_args()
    settings = [f"data.path={Path(args.data).resolve()}", "distributed.threads=1", "distributed.device=cpu"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/paced_sockets.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", str(SOURCE), "-o", library, "-ldl"], check=True)
        for megabits in args.megabits:
            found = ratios(megabits, library, [*settings, *args.settings], args.rounds, args.steps)
            each = ", ".join(f"{r:.2f}" for r in found)
            print(f"{megabits} Mbit/s: bf16 / fp32: median {statistics.median(found):.2f} of {each}", flush=True)


if __name__ == "__main__":
    main()
