"""Memory of `flm serve` by its number of processes, as the kernel counts it (/proc/PID/smaps_rollup).

    python tools/benchmarks/serve_memory.py --items 200000 --users 500000 --cache /tmp/made-up --workers 1 2 4

PSS is the memory of a process, where pages that n processes share count 1/n each: the sum over the processes is what
the server takes. USS is what a process has for itself. Both are read after the same requests of known users.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from http_load import KEY
from serve import load, made_up_export

EVENTS = 20
"""Of each user."""
REQUESTS = 2000
"""Different known users that ask before the memory is read."""


def started(folder: Path, port: int, workers: int, events: Path) -> subprocess.Popen[str]:
    """The server, once it answers."""
    options = ["--export", str(folder), "--port", str(port), "--workers", str(workers), "--events", str(events)]
    command = [sys.executable, "-m", "flm_torchrec", "serve", *options]
    environment = {**os.environ, "FLM_SERVE_KEYS": f"admin {KEY}", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("http"):
            return process
    raise SystemExit("the server did not start; see above")


def memory(pid: int) -> dict[str, float]:
    """PSS and USS of a process in MB, and the part of them that no file stands behind."""
    kilobytes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        kilobytes[name] = int(rest.split()[0])
    uss = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return {"pss": kilobytes["Pss"] / 1024, "uss": uss / 1024, "anonymous": kilobytes["Pss_Anon"] / 1024}


def measure(folder: Path, port: int, workers: int, bodies: list[bytes]) -> dict[str, float]:
    """Start a server, ask, and print the memory of each of its processes; their sums."""
    with tempfile.TemporaryDirectory() as events:
        began = time.monotonic()
        process = started(folder, port, workers, Path(events) / "events.sqlite")
        try:
            seconds = time.monotonic() - began
            load(port, bodies, 8, 10.0)
            own = psutil.Process(process.pid)
            found = [memory(one.pid) for one in (own, *own.children())]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    for one, name in zip(found, ["supervisor" if workers > 1 else "server", *["worker"] * workers], strict=False):
        print(f"    {name:10} PSS {one['pss']:6.0f} MB, USS {one['uss']:6.0f} MB", flush=True)
    sums = {name: sum(one[name] for one in found) for name in found[0]}
    print(
        f"{workers} workers: together {sums['pss']:.0f} MB, {sums['anonymous']:.0f} of them anonymous;"
        f" ready after {seconds:.1f} s",
        flush=True,
    )
    return sums


def main() -> None:
    """Measure each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--index", choices=("flat", "hnsw"), default="flat")
    parser.add_argument("--cache", type=Path, default=Path("made-up"), help="folder of made-up exports")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--port", type=int, default=8768)
    args = parser.parse_args()
    folder = made_up_export(args.cache, args.items, args.index, args.users, EVENTS)
    step = max(1, args.users // REQUESTS)
    bodies = [json.dumps({"user": str(user)}).encode() for user in range(0, args.users, step)]
    sums = [measure(folder, args.port, workers, bodies)["pss"] for workers in args.workers]
    if len(sums) > 1:
        more = (sums[-1] - sums[0]) / (args.workers[-1] - args.workers[0])
        print(f"each further worker takes {more:.0f} MB")


if __name__ == "__main__":
    main()
