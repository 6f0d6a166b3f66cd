"""`flm train`."""

from __future__ import annotations

import argparse

from flm_torchrec.api.run import pretrain_run
from flm_torchrec.config import add_config_arguments, given_folders, given_overrides


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `train` to the subcommands."""
    parser = subparsers.add_parser(
        "train",
        help="pretrain a model on prepared data",
        description="Pretrain a model on prepared data. Leaves a run folder with config, plan, metrics and the best"
        " checkpoint. Any setting can be given as --section.field VALUE. With --train.warm_start RUN and no --config,"
        " settings are those of RUN unless given.",
        allow_abbrev=False,
    )
    add_config_arguments(parser, several_data=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Pretrain the run that the settings describe.

    Raises:
        FlmError: a setting, the data or the run folder is wrong.
    """
    pretrain_run(args.config, given_overrides(args), given_folders(args), args.preset)
