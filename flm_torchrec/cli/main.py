"""`flm`: prepare → train → evaluate → export → recommend → serve."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from flm_torchrec._versions import installed, mend
from flm_torchrec.cli.error_line import tell
from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.names import nearest

ON_RANKS = ("train", "finetune", "follow", "evaluate", "export")
"""Commands that run on several ranks; the others are one process."""
STEPS = ("prepare", "train", "evaluate", "export", "recommend", "serve")
"""The main commands, in the order of use."""
BROKEN_PIPE = 128 + 13
"""The exit code that a shell shows for a process ended by SIGPIPE."""

STACK = ("torch", "torchrec", "fbgemm_gpu")
"""Packages that this one does not declare. Preparing and inspecting need none of them, serving needs torch alone."""


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest option, command or choice for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        tell(f"{message} (see '{self.prog} --help')")
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = nearest(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        """As argparse does, but an unknown option is an error."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown option '{unknown[0]}'; {nearest(unknown[0].split('=')[0], options)}")
        return namespace, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and give its exit code: 0, or another one after one line on standard error.

    2: an error that the user can mend. 75: training stopped on request (SIGTERM, Ctrl-C) and can resume. 130: Ctrl-C
    ended another command. 141: the reader of the output, such as `head`, has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # in an ASCII locale a name or a dash must not end the command
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # a closed pipe is handled here; Python's flush at exit would print an error
    except BrokenPipeError:
        if not _pipe_closed():
            raise
        return BROKEN_PIPE


def _run(argv: Sequence[str] | None) -> int:
    try:
        parser, subparsers = _parser()
        args = parser.parse_args(argv)
        if args.command is None and args.version:
            print("\n".join(f"{name} {version}" for name, version in installed().items()))
            return 0
        if args.command is None:
            print(_steps(subparsers), file=sys.stderr)
            return 2
        _check_ranks(args.command)
        args.run(args)
    except FlmError as error:
        tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("error: interrupted; what was not finished is not kept", file=sys.stderr, flush=True)
        return 130  # 128 + SIGINT, as in shells
    except ModuleNotFoundError as error:
        if error.name not in STACK:
            raise
        tell(f"flm {args.command}: needs {error.name}; run: {mend()}")
        return 2
    return 0


def _parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    # Imported here: it takes a second, and Ctrl-C should give one line then too.
    from flm_torchrec.cli import (
        apply_delta,
        evaluate,
        export,
        export_events,
        finetune,
        follow,
        forget,
        inspect,
        join,
        load,
        plan,
        prepare,
        pull,
        push,
        recommend,
        report,
        serve,
        train,
        tune,
    )

    parser = _Parser(prog="flm", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the versions of flm_torchrec and its libraries")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    steps = (prepare, join, plan, train, tune, finetune, follow, evaluate, export, apply_delta, load, recommend, serve)
    for command in (*steps, export_events, inspect, report, push, pull, forget):
        command.add_parser(subparsers)
    return parser, subparsers


def _check_ranks(command: str) -> None:
    """Raise RunError where a launcher started several processes of a command that is one process."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if command not in ON_RANKS and ranks != "1":
        raise RunError(
            f"flm {command}: runs as one process, not as {ranks} ranks (WORLD_SIZE); start it without torchrun"
        )


def _steps(subparsers: argparse._SubParsersAction) -> str:
    """The output of `flm` without a command: all commands, the main ones first and in order."""
    helps = {action.dest: action.help or "" for action in subparsers._choices_actions}
    order = [*(name for name in STEPS if name in helps), *(name for name in helps if name not in STEPS)]
    lines = [f"  {name:<12} {helps[name]}" for name in order]
    steps, others = "\n".join(lines[: len(STEPS)]), "\n".join(lines[len(STEPS) :])
    return (
        f"usage: flm COMMAND [OPTIONS]\n\nthe steps, in order:\n{steps}\n\nbesides:\n{others}\n\n"
        "'flm COMMAND --help' lists the options of a command; 'flm --version' the versions."
    )


def _pipe_closed() -> bool:
    """Whether standard output is a pipe without a reader. If so, send it to /dev/null, so that no later flush fails."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
        return True
    return False
