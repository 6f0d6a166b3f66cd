"""Run the commands of README.md in order, as they are typed there, in a copy of the repository.

That is a new user's first hour, in an environment without extras: data of one's own, the Python API, the code of a
notebook, serving, fine-tuning.

    python tools/check_readme.py             # by the python of an environment without extras, as make check-base does
    python tools/check_readme.py --list      # what would be run, and what would not and why

Every fence marked `sh` is run. Exceptions are listed at the top of this file, each with its reason; an entry that no
command begins with is an error. Prints one line for each command; exits 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {
    "make test": "it is what calls this check",
    "make docs": "make check-base builds the site next, by tests/test_site.py, with requirements/docs.txt alone",
    "python tools/faults/two_hosts.py": "tests/launch/test_launch.py runs it",
    "torchx run dist.ddp -j 1x2": "make test-slow runs it, in tests/launch/test_launch.py",
    "torchx run dist.ddp -j 2x1": "tests/launch/test_launch.py runs it",
    "torchx run dist.ddp -j 2x8": "starts 16 processes",
}
FAILS = {"flm plan --spec configs/plans/ten_billion.yaml": 2}
"""Exit codes other than 0 that README announces."""
SERVERS = {"flm serve": "http://127.0.0.1:8000/health"}
"""Commands that run until they are stopped: started, waited for until the address answers, stopped at the end."""
STATE = ("source ", "export ", "cd ")
"""Commands that change the shell. They are repeated before each later command."""
SHORT = {"configs/synthetic.yaml": ("train", {"max_steps": 5, "eval_users": 200})}
"""Settings changed in the copy, so that a training takes seconds, not minutes. The commands stay as they are typed."""
LONGEST = 600
"""Maximum of seconds for one command."""


def fences(text: str) -> Iterator[str]:
    """The fenced blocks that hold shell commands.

    Raises:
        SystemExit: a fence does not say what it holds.
    """
    for kind, body in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        if kind not in ("sh", "text"):
            raise SystemExit(f"error: README.md: a fence begins ```{kind}; write ```sh or, for no commands, ```text")
        if kind == "sh":
            yield body


def commands(block: str) -> Iterator[str]:
    """The commands of a block, each with its continued lines and its here-document; comments are left out."""
    lines = iter(block.splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        command = line
        while command.endswith("\\"):
            command += "\n" + next(lines)
        if end := re.search(r"<<'?(\w+)'?", line):
            while command.splitlines()[-1] != end[1]:
                command += "\n" + next(lines)
        yield command


def entry(table: dict, command: str) -> str | None:
    """The key of a table of exceptions that the command begins with; None if there is none."""
    return next((key for key in table if command.startswith(key)), None)


def copy_of_repository(folder: Path, environment: Path) -> Path:
    """The files that git tracks or would track, shortened, with a link to the environment in the place of .venv."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    copy = folder / "flm_torchrec"
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(environment)
    for name, (section, settings) in SHORT.items():
        config = yaml.safe_load((copy / name).read_text())
        config[section] |= settings
        (copy / name).write_text(yaml.safe_dump(config))
    for command in (["git", "init", "--quiet"], ["git", "add", "--all"]):
        subprocess.run(command, cwd=copy, check=True)
    return copy


class Shell:
    """Runs commands in one folder. Changes of the shell stay for later commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: list[str] = []
        self.servers: list[subprocess.Popen] = []
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")}

    def start(self, command: str, log: Path) -> subprocess.Popen:
        """Start a command in a session of its own, with its output in a file."""
        script = "\n".join(["set -o pipefail", *self.state, command])
        with log.open("w") as out:
            return subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, command: str, log: Path) -> bool:
        """Whether the command did what README says."""
        process = self.start(command, log)
        if server := entry(SERVERS, command):
            self.servers.append(process)
            return self._answers(process, SERVERS[server])
        try:
            code = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            return False
        finally:
            stop(process)
        if command.startswith(STATE):
            self.state.append(command)
        return code == FAILS.get(entry(FAILS, command) or "", 0)

    @staticmethod
    def _answers(process: subprocess.Popen, address: str) -> bool:
        until = time.monotonic() + LONGEST
        while process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(address, timeout=5):
                    return process.poll() is None
            except OSError:
                time.sleep(0.5)
        return False


def stop(process: subprocess.Popen) -> None:
    """End a command and all processes that it started."""
    for kind, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        if process.poll() is None:
            os.killpg(process.pid, kind)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def check(typed: list[str], environment: Path) -> int:
    """Run the commands in a copy of the repository; 1 if one fails, or if they leave files that git would track."""
    with tempfile.TemporaryDirectory(prefix="readme-") as folder:
        shell = Shell(copy_of_repository(Path(folder), environment))
        try:
            succeeded = all(_run_and_report(shell, command, Path(folder) / "log") for command in typed)
        finally:
            for server in shell.servers:
                stop(server)
        return _left_untracked(shell.folder) if succeeded else 1


def _run_and_report(shell: Shell, command: str, log: Path) -> bool:
    """Run one command unless it is an exception, and print its line; whether it succeeded."""
    began, first = time.monotonic(), command.splitlines()[0]
    if reason := SKIPPED.get(entry(SKIPPED, command) or ""):
        print(f"skipped         {first}: {reason}", flush=True)
        return True
    done = shell.run(command, log)
    print(f"{'done' if done else 'FAILED'} {time.monotonic() - began:8.1f} s  {first}", flush=True)
    if not done:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
    return done


def _left_untracked(copy: Path) -> int:
    """1 if the commands left files that .gitignore does not cover, else 0."""
    others = ["git", "ls-files", "--others", "--exclude-standard"]
    new = subprocess.run(others, cwd=copy, capture_output=True, text=True, check=True).stdout.split()
    if new:
        print(f"error: README.md's commands leave {', '.join(new[:5])} beside the tracked files; use an ignored folder")
    return int(bool(new))


def main() -> int:
    """Run or list the commands; the exit code.

    Raises:
        SystemExit: an exception matches no command, or the environment holds an extra.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the commands, run none")
    args = parser.parse_args()
    typed = [command for block in fences((ROOT / "README.md").read_text()) for command in commands(block)]
    stale = [key for key in (*SKIPPED, *FAILS, *SERVERS) if not any(command.startswith(key) for command in typed)]
    if stale:
        raise SystemExit(f"error: {__file__}: no command of README.md begins with {stale[0]!r}; remove the entry")
    if args.list:
        for command in typed:
            print(f"{'skip' if entry(SKIPPED, command) else 'run'}\t{command.splitlines()[0]}")
        return 0
    extras = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "extras.txt").read_text(), re.MULTILINE)
    installed = {canonicalize_name(package.name) for package in metadata.distributions()}
    if there := [name for name in extras if canonicalize_name(name) in installed]:
        raise SystemExit(f"error: {sys.prefix} holds {there[0]}, an extra; remove it, then run make check-base")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    return check(typed, Path(sys.prefix))


if __name__ == "__main__":
    sys.exit(main())
