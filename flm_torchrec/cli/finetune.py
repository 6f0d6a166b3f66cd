"""`flm finetune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_torchrec.config import add_overrides, given_options, given_overrides, load_config, sections
from flm_torchrec.errors import ConfigError, RunError

FROM_SOURCE = "that of the source"
FINETUNE_DEFAULTS = {
    **dict.fromkeys(("data", "model", "loss", "distributed", "train", "eval"), FROM_SOURCE),
    "distributed.plan": "none",
    "distributed.replicas": "1",
    "distributed.collectives": "fp32",
    "train.run": "none; must be given",
    "train.existing": "refuse",
    "train.select": f"{FROM_SOURCE}; label/auc for labels",
    "train.warm_start": "none; not to be given",
    "finetune.source": "none; must be given",
    "finetune.start": "each in turn; not to be given",
}
"""What `flm finetune` takes for a setting that is not given, where that is not the schema's default."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `finetune` to the subcommands."""
    parser = subparsers.add_parser(
        "finetune",
        help="train a pretrained run further: new users, a new domain, or telling labels",
        description="Train a pretrained run further, for the next item or for labels, on its data or on other data, and"
        " the same model from new weights as a control. Settings are those of the source unless given. Writes"
        " RUN/pretrained, RUN/scratch and RUN/finetune.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--no-control", action="store_true", help="leave the control out")
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="rank only N users of the test, drawn once, the same ones before and after training (default: all users)",
    )
    add_overrides(parser, sections(), FINETUNE_DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fine-tune a pretrained run beside its control, and print the test metrics of both.

    Raises:
        FlmError: an option, a setting, the source, the data or the run folder is wrong.
    """
    if args.sample is not None and args.sample < 1:
        raise RunError(f"--sample {args.sample}: give 1 user or more")
    overrides = given_overrides(args)
    source = load_config(None, [one for one in overrides if one.startswith("finetune.")]).finetune.source
    if not source:
        raise ConfigError("--finetune.source: name the run folder of the pretraining")
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.training.finetune import finetune, source_config

    config = source_config(Path(source), overrides)
    report = finetune(config, not args.no_control, args.sample or 0, given_options(args))
    ranked = report.get("ranked")
    if ranked and ranked["users"] < ranked["of"]:
        print(f"{ranked['users']} of {ranked['of']} test users are ranked, drawn once")
    for start, test in report.get("test", {}).items():
        shown = [name for name in test if name.startswith(("label/", "fused/"))]
        print(f"test, {start}: " + "  ".join(f"{name} {test[name]:.4f}" for name in shown))
