"""Train one job on two 'hosts' that find each other by c10d rendezvous, and the same job on one host; compare.

    python tools/faults/two_hosts.py --output /tmp/two-hosts -- --data.path data/synthetic --train.max_steps 20

The hosts are two network namespaces with a virtual cable between them: nothing but the network joins their
processes (they share the machine's cores and files). Making namespaces needs root; without it, or with --loopback, the
hosts are two agents on 127.0.0.1 and 127.0.0.2, and the tool says so. Everything after -- goes to 'flm train'.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
"""Relative difference of a loss: on two hosts the planner may place tables otherwise, and then sums run in another
order."""


@dataclass(frozen=True)
class Host:
    """Where an agent runs."""

    address: str
    interface: str
    prefix: list[str] = field(default_factory=list)
    """What to put before a command that is to run there."""


@contextmanager
def namespaces() -> Iterator[list[Host]]:
    """Two network namespaces joined by a veth pair; gone afterwards.

    Raises:
        PermissionError: this machine does not allow them.
    """
    names = [f"flm{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    commands = [["ip", "netns", "add", name] for name in names]
    ends = [["name", name, "netns", name] for name in names]
    commands.append(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]])
    for name, address in zip(names, addresses, strict=True):
        commands.append(["ip", "-n", name, "address", "add", f"{address}/24", "dev", name])
        commands += [["ip", "-n", name, "link", "set", device, "up"] for device in ("lo", name)]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise PermissionError(f"'{' '.join(command)}' fails: {done.stderr.strip()}")
        yield [Host(a, n, ["ip", "netns", "exec", n]) for a, n in zip(addresses, names, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def loopback() -> Iterator[list[Host]]:
    """Two addresses of this host."""
    yield [Host("127.0.0.1", "lo"), Host("127.0.0.2", "lo")]


def train_on(hosts: list[Host], ranks: int, run: Path, options: list[str]) -> dict[str, float]:
    """One agent with `ranks` ranks on each host, all one job → its last losses.

    Raises:
        SystemExit: an agent failed, with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shutil.rmtree(run, ignore_errors=True)
    agents = []
    for number, host in enumerate(hosts):
        command = [
            *(*host.prefix, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(len(hosts)), "--nproc_per_node", str(ranks)),
            *("--rdzv_backend", "c10d", "--rdzv_id", run.name),
            *("--rdzv_endpoint", f"{hosts[0].address}:{port}", "--local_addr", host.address),
            *("--rdzv_conf", f"is_host={int(number == 0)},join_timeout=60,connect_timeout=30"),
            *("-m", "flm_torchrec.train", "--train.run", str(run), *options),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "LOGLEVEL": "INFO",
            "GLOO_SOCKET_IFNAME": host.interface,
            "OMP_NUM_THREADS": "1",
        }
        log = run.with_name(f"{run.name}-agent-{number}.log")
        with log.open("w") as file:
            agent = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        agents.append((agent, log))
    failed = [log for agent, log in agents if agent.wait()]
    if failed:
        raise SystemExit(f"error: an agent failed; the end of {failed[0]}:\n{failed[0].read_text()[-2000:]}")
    for host, (_, log) in zip(hosts, agents, strict=True):
        print(f"  agent on {host.address}: {_met_as(log)}")
    return _last_losses(run)


def _met_as(log: Path) -> str:
    """Address and ranks that the agent logged once all agents had met."""
    fields = re.findall(r"(?:master_addr|group_rank|group_world_size)=\S+|global_ranks=\[[^]]*\]", log.read_text())
    return ", ".join(dict.fromkeys(fields))


def _last_losses(run: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if "loss/sequential" in r][-1]
    return {name: value for name, value in last.items() if name.startswith("loss/")}


def main() -> None:
    """Train both ways and print the last losses; exits with an error where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where runs and logs go (required)")
    parser.add_argument("--loopback", action="store_true", help="two agents on 127.0.0.1 and 127.0.0.2 (default: no)")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of 'flm train'")
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if args.loopback:
        two = _on_loopback(output, args.options)
    else:
        try:
            with namespaces() as hosts:
                print("two network namespaces, one rank each")
                two = train_on(hosts, 1, output / "two-hosts", args.options)
        except (PermissionError, FileNotFoundError) as error:
            print(f"no network namespaces here ({error})")
            two = _on_loopback(output, args.options)
    print("one host, two ranks")
    one = train_on([Host("127.0.0.1", "lo")], 2, output / "one-host", args.options)
    print(f"{'last loss':20}{'two hosts':>12}{'one host':>12}")
    for name, loss in two.items():
        print(f"{name:20}{loss:12.6f}{one[name]:12.6f}")
    if any(abs(loss - one[name]) > TOLERANCE * abs(one[name]) for name, loss in two.items()):
        raise SystemExit(f"error: the losses differ by more than {TOLERANCE} of their size")
    print("equal")


def _on_loopback(output: Path, options: list[str]) -> dict[str, float]:
    print("two agents on two loopback addresses, one rank each: one network, so not two hosts in earnest")
    with loopback() as hosts:
        return train_on(hosts, 1, output / "two-hosts", options)


if __name__ == "__main__":
    main()
