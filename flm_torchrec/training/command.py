"""`flm train` and `flm finetune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.config import (
    add_config_arguments,
    add_overrides,
    config_from_arguments,
    given_overrides,
    load_config,
    sections,
)
from flm_torchrec.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="pretrain a model on prepared data",
        description="Pretrain a model on prepared data. Leaves a run folder with config, plan, metrics and the best"
        " checkpoint. Any setting can be given as --section.field VALUE.",
        allow_abbrev=False,
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)
    parser = subparsers.add_parser(
        "finetune",
        help="train a pretrained run further: new users, a new domain, or telling labels",
        description="Train a pretrained run further, for the next item or for labels, on its data or on other data, and"
        " the same model from new weights as a control. Settings are those of the source unless given. Writes"
        " RUN/pretrained, RUN/scratch and RUN/finetune.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--no-control", action="store_true", help="leave the control out")
    add_overrides(parser, sections())
    parser.set_defaults(run=run_finetune)


def run(args: argparse.Namespace) -> None:
    config = config_from_arguments(args)
    # Imported here: PyTorch takes seconds, and a wrong option should be told at once.
    from flm_torchrec.training.job import pretrain

    pretrain(config)


def run_finetune(args: argparse.Namespace) -> None:
    overrides = given_overrides(args)
    source = load_config(None, overrides).finetune.source
    if not source:
        raise ConfigError("--finetune.source: name the run folder of the pretraining")
    # Imported here: PyTorch takes seconds, and a wrong option should be told at once.
    from flm_torchrec.training.finetune import finetune, source_config

    for start, test in finetune(source_config(Path(source), overrides), not args.no_control).items():
        shown = [name for name in test if name.startswith(("label/", "fused/"))]
        print(f"test, {start}: " + "  ".join(f"{name} {test[name]:.4f}" for name in shown))
