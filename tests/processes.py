"""Processes of tests, forked from a server that has imported PyTorch and TorchRec once: the import takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from subprocess import TimeoutExpired
from unittest import mock

import torch.distributed as dist

from tests.conftest import ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("torchrec", "tensorboard", "pandas", "pyarrow.dataset", "torch.distributed.run"),
        *("flm_torchrec.training.trainer", "flm_torchrec.export.write", "flm_torchrec.prepare.prepare"),
        *("flm_torchrec.cli.train", "flm_torchrec.cli.evaluate"),
    ]
)
TORCHRUN = str(ROOT / "tests" / "torchrun.py")
"""A script that is torchrun with forked ranks."""
POLL = 0.05
"""Seconds between two looks at processes."""
GRACE = 5.0
"""Seconds that ranks have to end by themselves after one has failed: they agree first who tells the error."""


class Forked:
    """`python ARGUMENTS`, where the arguments are a script or `-m` with a module. Used as a `subprocess.Popen`.

    It starts in the folder of this repository. Standard output and standard error go to files, so that no process
    waits for a reader.
    """

    def __init__(self, arguments: list[str], **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        always = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with mock.patch.dict(os.environ, always):  # libraries read them when they are imported
            forkserver.ensure_running()
        given = {**os.environ, **always, **environment}
        self._process = FORKS.Process(target=begin, args=(arguments, given, self._files), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        refuse_polars_threads()

    @property
    def returncode(self) -> int | None:
        """Exit code; the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; standard output and standard error.

        Raises:
            TimeoutExpired: it has not ended after `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self._process.name, timeout or 0)
        out, err = (file.read_text(errors="replace") for file in self._files)
        return out, err


def refuse_polars_threads() -> None:
    """Fail where the server has run a query of Polars: its forks would wait for ever for threads that they lack."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    names = [file.read_text() for file in Path(f"/proc/{server}/task").glob("*/comm")]
    assert not any(name.startswith("polars-0") for name in names), "a module runs a query of Polars when it is imported"


class Peer:
    """`subprocess.Popen` of a `python -m …` that is asked on standard input and answers on standard output; forked."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        assert command[:2] == [sys.executable, "-m"]
        self.args = command
        self._folder = tempfile.TemporaryDirectory()
        asked, answers, error = (Path(self._folder.name) / name for name in ("in", "out", "err"))
        os.mkfifo(asked)
        os.mkfifo(answers)
        self._process = FORKS.Process(target=begin, args=(command[1:], env, [answers, error], asked), daemon=True)
        self._process.start()
        self.stdout, self.stdin = answers.open(), asked.open("w")  # in the order in which `begin` opens them
        self.wait = self._process.join


def begin(
    arguments: list[str], environment: dict[str, str], files: Sequence[Path] = (), stdin: Path | None = None
) -> None:
    """Become what `python ARGUMENTS` would be, with standard output and standard error into files if they are given."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if stdin:
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    warnings.simplefilter("ignore")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def forked(command: list[str], **environment: str) -> Forked:
    """What a tool would start as a command line of Python; torchrun forks its ranks too."""
    assert command[0] == sys.executable
    arguments = command[3:] if command[1] == "-W" else command[1:]
    if arguments[:2] == ["-m", "torch.distributed.run"]:
        arguments = [TORCHRUN, *arguments[2:]]
    return Forked(arguments, **environment)


def start_ranks(count: int, command: list[str], **environment: str) -> list[Forked]:
    """The same command as ranks of one job on this machine, which meet as `MASTER_ADDR` and `MASTER_PORT` say."""
    given = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **environment}
    return [Forked(command, RANK=str(rank), LOCAL_RANK=str(rank), **given) for rank in range(count)]


def launch_ranks(count: int, command: list[str], timeout: float = 240) -> str:
    """Run a command as gloo ranks, with a store for them as torchrun gives one; their standard output.

    If a rank fails, or all take too long, they are ended, and an AssertionError has what they told.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = start_ranks(count, command, **address, TORCHELASTIC_RESTART_COUNT="0")
    until = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            if any(process.poll() for process in processes):
                until = min(until, time.monotonic() + GRACE)
            time.sleep(POLL)
    finally:
        for process in processes:
            process.kill()
    told = [process.communicate() for process in processes]
    codes = [process.poll() for process in processes]
    assert not any(codes), f"{command} ended with {codes}: {''.join(err for _, err in told)[-4000:]}"
    return "".join(out for out, _ in told)
