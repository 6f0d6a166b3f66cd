"""`flm train`, `flm finetune` and `flm follow`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.config import (
    add_config_arguments,
    add_data_path,
    add_overrides,
    config_from_arguments,
    given_overrides,
    load_config,
    sections,
)
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest

FROM_SOURCE = "that of the source"
FINETUNE_DEFAULTS = {
    **dict.fromkeys(("data", "model", "loss", "distributed", "train", "eval"), FROM_SOURCE),
    "data.stream": "False",
    "distributed.plan": "none",
    "distributed.replicas": "1",
    "train.run": "none; must be given",
    "train.existing": "refuse",
    "train.select": f"{FROM_SOURCE}; label/auc for labels",
    "finetune.source": "none; must be given",
}
"""What `flm finetune` takes for a setting that is not given, where that is not the schema's default."""


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
    add_overrides(parser, sections(), FINETUNE_DEFAULTS)
    parser.set_defaults(run=run_finetune)
    parser = subparsers.add_parser(
        "follow",
        help="train a run further on new events as they come, from a folder or Kafka",
        description="Train a run's best model further on new events as they come: whole Parquet or JSONL files put into"
        " a folder, or JSON messages of a Kafka topic. Started again, it goes on where it was. Rows that cannot be"
        " learnt from are counted in OUTPUT/follow.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, dest="run_folder", type=Path, metavar="DIR", help="run of 'flm train'")
    parser.add_argument("--source", required=True, metavar="URL", help="folder, or kafka://HOST:PORT/TOPIC")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="run folder to write, or to go on in")
    parser.add_argument(
        "--columns", default="", metavar="FIELD=NAME,...",
        help="what the source calls user, item, timestamp, event, value (default: just so)",
    )  # fmt: skip
    parser.add_argument(
        "--time-unit", choices=("s", "ms", "us", "ns"), default="s",
        help="unit of numeric timestamps; dates are read as they are (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="end when there is nothing new (default: wait for more)")
    add_data_path(parser)
    parser.set_defaults(run=run_follow)


def run(args: argparse.Namespace) -> None:
    config = config_from_arguments(args)
    # Imported here: PyTorch takes seconds, and a wrong option should be told at once.
    from flm_torchrec.training.trainer import pretrain

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


def run_follow(args: argparse.Namespace) -> None:
    # Imported here: PyTorch takes seconds, and a wrong option should be told at once.
    from flm_torchrec.training.follow.events import FIELDS, RowForm
    from flm_torchrec.training.follow.follower import follow

    columns = {}
    for part in filter(None, args.columns.split(",")):
        field, equals, name = part.partition("=")
        if field not in FIELDS or not equals:
            raise ConfigError(f"--columns '{part}': write it as FIELD=NAME; {nearest(field, FIELDS)}")
        columns[field] = name
    rows = RowForm(columns, args.time_unit)
    found = follow(args.run_folder, args.source, args.output, rows, args.once, given_overrides(args))
    print(f"{args.output}: {found['events']} events learnt from, {found['refused']} rows refused")
