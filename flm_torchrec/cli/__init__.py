"""The command line: one file a subcommand."""

from flm_torchrec.cli.main import main

__all__ = ["main"]
