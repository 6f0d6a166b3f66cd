"""`flm`: prepare → train → evaluate → export → recommend → serve."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.names import nearest
from flm_torchrec.told import tell

ON_RANKS = ("train", "finetune", "evaluate", "export")
"""Commands that share their work among ranks; each of the others is one process."""


class _Parser(argparse.ArgumentParser):
    """Names the nearest option when one is not known."""

    def error(self, message: str) -> NoReturn:
        tell(f"{message} (see '{self.prog} --help')")
        sys.exit(2)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown option '{unknown[0]}'; {nearest(unknown[0].split('=')[0], options)}")
        return namespace, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0 on success, else one line on standard error.

    2 where the user can mend it, 75 where training was asked to stop (SIGTERM, Ctrl-C) and can go on,
    130 where Ctrl-C ended anything else.
    """
    try:
        args = _parser().parse_args(argv)
        _check_ranks(args.command)
        args.run(args)
    except FlmError as error:
        tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("error: interrupted; what was not finished is not kept", file=sys.stderr, flush=True)
        return 130  # 128 + SIGINT, as shells have it
    return 0


def _parser() -> argparse.ArgumentParser:
    # Imported here: it takes a second, in which Ctrl-C should be one line too.
    from flm_torchrec.data import command as data_command
    from flm_torchrec.data import inspect_command
    from flm_torchrec.distributed import command as distributed_command
    from flm_torchrec.evaluation import command as evaluation_command
    from flm_torchrec.export import command as export_command
    from flm_torchrec.report import command as report_command
    from flm_torchrec.serve import command as serve_command
    from flm_torchrec.training import command as training_command
    from flm_torchrec.training import forget_command

    parser = _Parser(prog="flm", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    stages = (data_command, distributed_command, training_command, evaluation_command, export_command, serve_command)
    for command in (*stages, inspect_command, report_command, forget_command):
        command.add_parser(subparsers)
    return parser


def _check_ranks(command: str) -> None:
    """Raise RunError where a launcher started several processes of a command that is one process."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if command not in ON_RANKS and ranks != "1":
        raise RunError(
            f"flm {command}: runs as one process, not as {ranks} ranks (WORLD_SIZE); start it without torchrun"
        )
