"""README.md of a hub folder: what the run itself says of its data, model and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec.api.seeds import check_seed
from flm_torchrec.config import load_config
from flm_torchrec.data.schema import Schema
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.report import markdown_metrics
from flm_torchrec.folders import CONFIG, SCHEMA
from flm_torchrec.safe_text import visible
from flm_torchrec.training.identity import VOCABULARY

if TYPE_CHECKING:
    from torch import Tensor

    from flm_torchrec.report.headline import Table

EVALUATION = "evaluation-test.json"
CARD = """---
library_name: flm_torchrec
license: unknown
tags: [recommendation, sequential-recommendation]
---

# {name}

A recommender with a content, a collaborative and a sequential head, and their fusion, made by flm_torchrec. It ranks
the items of one catalogue for users with a history.

## Data

{source}: {users:,} users, {items:,} items, {interactions:,} events. Item features: {item_features}. User features:
{user_features}. Features of events: {event_features}. Split: `{split}`. This folder has the keys of all users and
items, and no events.

## Model

{dim} dimensions, {layers} layers. Parameters: {dense:,} in the dense part, {tables:,} in tables. Best of the
validations by `{select}`, at step {step:,}.

## Metrics

{metrics}
{trainings}

## Intended use

Recommending these items to users of the same service, and fine-tuning on related data (`flm finetune`). Check the
numbers on events of your own before people see the recommendations.

## Limits

* Offline metrics reward what users found by themselves or were shown at the time. They do not say what users would
  like.
* Popular items may be recommended more often than their share of the events. Items without events are represented by
  their features alone.
* Vectors of users are made of their events. Treat them, and the keys in `vocabulary/`, as personal data.
* The licence is for the owner of the data to name: replace `unknown` above.

## Load it

```sh
flm pull FOLDER runs/{name}
flm evaluate --run runs/{name} --data.path DATA    # DATA: the data that 'flm prepare' made for this run
flm export --run runs/{name} --data.path DATA --output exports/{name}
```
"""


ONE = "They are those of one training. How much they vary between seeds is not known from one run."
SEVERAL = "Means ± sample standard deviation of {} trainings with different seeds. The model here is that of seed {}."


def model_card(run: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], seeds: Sequence[Path] = ()) -> str:
    """The card as Markdown.

    Args:
        meta: of the best checkpoint.
        tensors: of the model, by name.
        seeds: runs of the same settings with other seeds; the metrics are then means with their deviation.

    Raises:
        RunError: a run of `seeds` differs in more than its seed, or was not evaluated in the same way.
    """
    config = load_config(run / CONFIG)
    for other in seeds:
        check_seed(run, config, other)
    schema = Schema.load(run / VOCABULARY / SCHEMA)
    dense = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("model.dense."))
    return CARD.format(
        name=visible(run.resolve().name),
        source=visible(schema.name),
        users=schema.users,
        items=schema.items,
        interactions=schema.interactions,
        item_features=_names(schema, "item"),
        user_features=_names(schema, "user"),
        event_features=_names(schema, "event"),
        split=config.data.split,
        dim=config.model.dim,
        layers=config.model.layers,
        dense=dense,
        tables=sum(tensor.numel() for tensor in tensors.values()) - dense,
        select=visible(config.train.select),
        step=meta["step"],
        metrics=_of_seeds(run, seeds) if seeds else _metrics(run, meta),
        trainings=SEVERAL.format(len(seeds) + 1, config.train.seed) if seeds else ONE,
    )


def _names(schema: Schema, entity: str) -> str:
    return ", ".join(f"`{visible(feature.name)}`" for feature in schema.features if feature.entity == entity) or "none"


def _of_seeds(run: Path, seeds: Sequence[Path]) -> str:
    from flm_torchrec.report.headline import table_of

    file = run / EVALUATION
    try:
        first = read_json(file)
        tables = [_shown(table_of(other, "test", first)) for other in seeds]
        return _evaluated(first, tables)
    except (Unreadable, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"--seeds: {file} cannot be read; run 'flm evaluate --run {run}' first") from error


def _evaluated(found: Mapping[str, Any], seeds: Sequence[Table] = ()) -> str:
    """The table of an evaluation, whom it ranked for, and which default baselines it lacks."""
    from flm_torchrec.report.headline import not_ranked
    from flm_torchrec.report.pieces import ranked_for

    table = markdown_metrics(f"test: {visible(ranked_for(found))}", _shown(found["table"]), seeds)
    missing = not_ranked(found["table"])
    return f"{table}\n{missing}\n" if missing else table


def _shown(table: Table) -> Table:
    """A table with names that cannot change the text around them."""
    return {visible(name): {visible(metric): value for metric, value in row.items()} for name, row in table.items()}


def _metrics(run: Path, meta: Mapping[str, Any]) -> str:
    """The table of `flm evaluate` on the test events if there is one, else the validation of the fused head."""
    file = run / EVALUATION
    try:
        found = read_json(file) if file.is_file() else None
        if found is not None:
            return _evaluated(found)
    except (Unreadable, KeyError, TypeError, ValueError, AttributeError):
        pass  # the card then has the metrics of the checkpoint, as if nothing had been evaluated
    rows: Table = {}
    for name, value in meta["valid"].items():
        row, _, metric = name.rpartition("/")
        rows.setdefault(row, {})[metric] = value
    return markdown_metrics("validation", {"fused": rows["fused"]} if "fused" in rows else _shown(rows))
