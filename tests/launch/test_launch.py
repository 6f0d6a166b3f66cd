"""Launching by torchx: the documented lines as typed, and what would be submitted to clusters."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from torchx.specs.finder import ComponentValidationException

from flm_torchrec.data.dataset import PreparedData
from launch.components import pretrain
from tests.conftest import ROOT
from tests.processes import Forked, forked


def torchx(*arguments: str) -> subprocess.CompletedProcess[str]:
    folder = str(Path(sys.executable).parent)
    process = Forked([f"{folder}/torchx", "run", *arguments], PATH=f"{folder}:{os.environ['PATH']}")
    out, err = process.communicate(timeout=280)
    return subprocess.CompletedProcess(arguments, process.poll() or 0, out, err)


@pytest.mark.parametrize("shape", [pytest.param("1x2", marks=pytest.mark.slow), "2x1"])
def test_the_line_of_the_readme_works_as_typed(small: PreparedData, tmp_path: Path, shape: str) -> None:
    """One agent with two ranks, and two agents with one rank each that find each other by rendezvous."""
    options = ["--data.path", str(small.path), "--train.run", str(tmp_path / "run"), "--train.max_steps", "3"]
    options += ["--train.eval_users", "20"]
    small_model = ["--model.dim", "16", "--train.batch_size", "32", "--data.max_history", "8", "--model.layers", "1"]
    done = torchx("dist.ddp", "-j", shape, "flm_torchrec/train.py", "--", *options, *small_model)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "2 ranks on cpu" in (tmp_path / "run" / "train.log").read_text()
    assert json.loads((tmp_path / "run" / "checkpoints" / "best" / "meta.json").read_text())["step"] == 3


def test_a_wrong_option_ends_the_job_with_its_line(tmp_path: Path) -> None:
    done = torchx("dist.ddp", "-j", "1x1", "flm_torchrec/train.py", "--", "--train.batchsize", "3")
    assert done.returncode != 0
    assert "did you mean '--train.batch_size'" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("scheduler", "config", "expected"),
    [
        ("slurm", "partition=gpu", [r"--cpus-per-task=96", r"--mem=1024000", r"--gpus-per-task=8", r"partition=gpu"]),
        (
            "kubernetes",
            "queue=research",
            [r"nvidia\.com/gpu: '8'", r"memory: 1024000M", r"queue: research", r"image: mine:1"],
        ),
        (
            "aws_batch",
            "queue=research",
            [r"type: GPU value: '8'", r"type: MEMORY value: 1024000", r"numNodes: 2", r"queue: research"],
        ),
    ],
)
def test_what_clusters_would_get(scheduler: str, config: str, expected: list[str]) -> None:
    done = torchx(
        "-s", scheduler, "-cfg", config, "--dryrun", "launch/components.py:pretrain", "--nodes", "2",
        "--nproc_per_node", "8", "--image", "mine:1", "--max_restarts", "3", "--", "--config", "configs/beauty.yaml",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for pattern in [
        *expected,
        r"BASH_ENV",
        r"PET_MAX_RESTARTS\W+(value: )?3",
        r"launch/env\.sh",
        r"--nnodes 2",
        r"--nproc_per_node 8",
        r"configs/beauty\.yaml",
    ]:
        assert re.search(pattern, re.sub(r"['\s]+", " ", done.stdout).replace(": 8 ", ": '8' ")), pattern


def test_more_ranks_than_gpus_are_refused_in_a_line() -> None:
    done = torchx("-s", "slurm", "--dryrun", "launch/components.py:pretrain", "--nproc_per_node", "9")
    assert done.returncode != 0 and "a rank takes one GPU" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("nodes", 0), ("nodes", -2), ("nproc_per_node", 0), ("gpu", -1), ("memory_gib", 10**30), ("rdzv_port", 70000)],
)
def test_numbers_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ComponentValidationException, match=f"--{name} {value}: give "):
        pretrain(**{name: value})  # type: ignore[arg-type]


def test_no_nodes_are_refused_in_a_line() -> None:
    done = torchx("-s", "slurm", "--dryrun", "launch/components.py:pretrain", "--nodes", "0")
    assert done.returncode != 0 and "--nodes 0: give 1 to" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_two_jobs_of_two_agents_meet_apart_on_one_machine() -> None:
    """Locally agents meet on this machine, so each job has a port of its own."""
    ports = set()
    for _ in range(2):
        role = pretrain(nodes=2, nproc_per_node=1, gpu=0).roles[0]
        ports |= {role.port_map["c10d"]}
        assert f":{role.port_map['c10d']} " in role.args[1]
    assert len(ports) == 2 and 29500 not in ports
    assert pretrain(nodes=2, gpu=8, rdzv_port=29500).roles[0].port_map == {"c10d": 29500}


def test_variables_of_ones_own_do_not_lose_the_environment() -> None:
    assert pretrain(env={"A": "1"}).roles[0].env.items() >= {"A": "1", "BASH_ENV": "launch/env.sh"}.items()
    assert pretrain(env={"BASH_ENV": "mine.sh"}).roles[0].env["BASH_ENV"] == "mine.sh"


class Agent:
    """In the place of the `subprocess.Popen` of an agent. It is forked, unless it is to run in a network of its own."""

    def __init__(self, command: list[str], stdout: IO[str], stderr: int, env: dict[str, str], cwd: Path) -> None:
        assert stderr == subprocess.STDOUT and cwd == ROOT
        self.log = Path(stdout.name)
        alone = command[0] == sys.executable
        start = partial(subprocess.Popen, stdout=stdout, stderr=stderr)
        self.process = forked(command, **env) if alone else start(command, env=env)

    def wait(self) -> int:
        out, err = self.process.communicate(timeout=280)
        if isinstance(self.process, Forked):
            self.log.write_text(out + err)
        return self.process.returncode or 0


def test_two_hosts_train_one_job(
    small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In network namespaces where this machine allows them, else on two loopback addresses, as the tool then says."""
    options = ["--data.path", str(small.path), "--train.max_steps", "4", "--train.log_every", "4", "--model.dim", "16"]
    options += ["--train.eval_users", "20"]
    monkeypatch.setattr(sys, "argv", ["two_hosts.py", "--output", str(tmp_path), "--", *options])
    tool = runpy.run_path(str(ROOT / "tools" / "faults" / "two_hosts.py"))
    started = SimpleNamespace(Popen=Agent, STDOUT=subprocess.STDOUT, run=subprocess.run)
    monkeypatch.setitem(tool["main"].__globals__, "subprocess", started)
    tool["main"]()
    told = capsys.readouterr().out
    assert re.search("^two (network namespaces|agents on two loopback addresses)", told, re.MULTILINE)
    agent = r"agent on (\S+): .*group_rank=(\d), group_world_size=2, .*global_ranks=\[(\d)\]"
    agents = re.findall(agent, told)
    assert len({address for address, _, _ in agents}) == 2
    assert {(group, rank) for _, group, rank in agents} == {("0", "0"), ("1", "1")}
    assert told.endswith("equal\n")
