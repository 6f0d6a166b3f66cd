"""Packages the user tower: a trained model → three programs of torch.export with their tables as int8 rows.

`tower/user.pt2` makes representations of histories; `tower/item.pt2` and `tower/profile.pt2` make content vectors of
items and users from features. `tower/tower.json` describes the inputs. `tower/histories.parquet` has the last events of
known users. The programs run with torch alone, without the model's code, TorchRec or FBGEMM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.export import Dim

from flm_torchrec.data.dataset import EntityFeatures, PreparedData, spans
from flm_torchrec.data.event_files import context_columns
from flm_torchrec.data.feature_values import describe
from flm_torchrec.data.order_statistics import order_statistics
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.data.sketch import Sketches, kept_bytes
from flm_torchrec.errors import RunError
from flm_torchrec.export.memory import check_fits
from flm_torchrec.export.tower.layout import DESCRIPTION, FOLDER, HISTORIES, ITEM, PROFILE, USER, history_types
from flm_torchrec.export.tower.programs import (
    ContentProgram,
    PackagedTable,
    Precision,
    SketchProgram,
    UserInputs,
    UserProgram,
)
from flm_torchrec.model.tower import Tower

ENTITIES = ("item", "user", "event")
"""What features are of, in the order of `tower.json`."""
BLOCK = 16_384
"""Rows that are read and written at once."""


class TowerSource(Protocol):
    """The trained model whose tower is packaged."""

    @property
    def dense(self) -> Tower:
        """The dense tower with all its weights, on the CPU."""

    @property
    def settings(self) -> dict[str, Any]:
        """Values for `tower.json` that a reader needs to make the programs' inputs."""

    item_known: np.ndarray  # [items] float32: 1 where the id was trained
    user_known: np.ndarray  # [users] float32

    def rows(self, name: str, ids: np.ndarray, entity: str = "") -> Tensor:
        """[n] ids of a table of items, of "user_id", "event" or "gap", or codes of an entity's feature → [n, D].

        Of a feature of events, rows, of which row 0 is an unknown value. Collective.
        """


def check_memory(schema: Schema, dim: int, precision: Precision) -> None:
    """Check that the packaged tables, and the sketches of the items that are encoded before, fit into the free memory.

    Raises:
        RunError: they do not.
    """
    needed = (4 * schema.items + 2 * schema.users) * (dim + 8 if precision == "int8" else 4 * dim)
    rows = f"{schema.items:,} items and {schema.users:,} users"
    needed += kept_bytes(schema.items, dim)
    check_fits(needed, f"--tower {precision}", rows, "--tower none, or on a larger machine")


def write_tower(data: PreparedData, model: TowerSource, main: bool, precision: Precision, folder: Path) -> None:
    """Write `folder/tower`; collective. Rank 0 alone has the packaged tables in memory, and writes.

    With int8, these take 4 (D + 8) bytes for each item and 2 (D + 8) for each user.

    Args:
        main: this is rank 0.

    Raises:
        RunError: torch.export refuses a part of the tower.
    """
    dim = int(model.settings["dim"])
    with torch.no_grad():
        item, item_content = _content(data, model, "item", dim, precision)
        profile, user_profile = _content(data, model, "user", dim, precision)
        schema = data.schema

        def by_id(name: str, rows: int, known: np.ndarray | None, stored: Precision) -> PackagedTable:
            return PackagedTable(_rows(model, name, rows, known, main), rows if main else 0, dim, stored)

        def by_content(contents: Iterator[Tensor], rows: int) -> PackagedTable:
            return PackagedTable(contents if main else (), rows if main else 0, dim, precision)

        contexts, first = _contexts(data, model, dim, precision)
        # Events and gaps have a few dozen rows, so int8 would save nothing.
        tables = {
            **{
                name: by_id(name, schema.items, model.item_known, precision)
                for name in ("item_id", "item_source", "item_context")
            },
            "item_content": by_content(item_content, schema.items),
            "user_id": by_id("user_id", schema.users, model.user_known, precision),
            "profile": by_content(user_profile, schema.users),
            "event": by_id("event", len(schema.events) + 1, None, "fp32"),
            "gap": by_id("gap", model.settings["gaps"], None, "fp32"),
            **contexts,
        }
        if not main:
            return
        target = folder / FOLDER
        target.mkdir()
        user = UserProgram(model.dense, tables, schema.items, first)
        _export_user(user, dim, model.settings["max_history"], target / USER)
        for program, entity, file in ((item, "item", ITEM), (profile, "user", PROFILE)):
            _export_content(program, data, entity, target / file)
    _write_histories(data, model.settings["max_history"] + 1, target / HISTORIES)
    description = {
        **model.settings,
        "precision": precision,
        "items": schema.items,
        "events": list(schema.events),
        **({} if data.targets is None else {"targets": np.array(schema.events)[data.targets].tolist()}),
        "timestamps": schema.timestamps,
        "usual_gap": _usual_gap(data),
        "features": [describe(data.path, f) for entity in ENTITIES for f in _ordered(data, entity)],
        "title": next(
            (f.name for f in schema.of("item", sparse=True) if f.kind == "text" and f.name == schema.title), ""
        ),
    }
    (target / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def _rows(model: TowerSource, name: str, rows: int, known: np.ndarray | None, main: bool) -> Iterator[Tensor]:
    """The rows of a table in blocks, zeros where an id is not known; collective. Ranks other than 0 get none."""
    for block in _blocks(rows):
        found = model.rows(name, block)
        if main:
            yield found if known is None else found * torch.from_numpy(known[block])[:, None]


def _contexts(
    data: PreparedData, model: TowerSource, dim: int, precision: Precision
) -> tuple[dict[str, PackagedTable], list[int]]:
    """The table of all features of events, by name, and where the rows of each begin; nothing without features."""
    features = data.schema.of("event", sparse=True)
    sizes = [f.cardinality + 1 for f in features]  # row 0 of each is an unknown value
    rows = [
        model.rows(f.name, block, "event") for f, size in zip(features, sizes, strict=True) for block in _blocks(size)
    ]
    table = {"context": PackagedTable(rows, sum(sizes), dim, precision)} if features else {}
    return table, [sum(sizes[:position]) for position in range(len(sizes))]


def _content(
    data: PreparedData, model: TowerSource, entity: str, dim: int, precision: Precision
) -> tuple[ContentProgram, Iterator[Tensor]]:
    """The content program of items or users, and the contents of all of these in the data, block by block.

    The contents of known items and users are made of unrounded rows, then rounded once.
    """
    features = data.schema.of(entity, sparse=True)  # type: ignore[arg-type]
    sizes = [f.cardinality for f in features]
    offset = [sum(sizes[:position]) for position in range(len(sizes))]
    blocks = [model.rows(f.name, block, entity) for f in features for block in _blocks(f.cardinality)]
    layers = model.dense.item_content if entity == "item" else model.dense.user_content

    sketches = Sketches(data, dim if entity == "item" else 0)

    def program(precision: Precision) -> ContentProgram:
        sketch = _sketch(sketches, features, dim, precision) if entity == "item" else None
        return ContentProgram(layers, PackagedTable(blocks, sum(sizes), dim, precision), offset, sketch)

    exact = program("fp32")
    source = data.items if entity == "item" else data.users
    count = data.schema.items if entity == "item" else data.schema.users

    def contents() -> Iterator[Tensor]:
        for block in _blocks(count):
            yield exact(_padded_codes(source, features, block), torch.from_numpy(source.dense[block]))

    return program(precision), contents()


def _sketch(sketches: Sketches, features: tuple[Feature, ...], dim: int, precision: Precision) -> SketchProgram:
    rows = [torch.from_numpy(sketches.rows(f.name, block)) for f in features for block in _blocks(f.cardinality)]
    # Never empty, as `SketchProgram` says.
    table = PackagedTable([*rows, torch.zeros(1, dim)], sum(f.cardinality for f in features) + 1, dim, precision)
    return SketchProgram(table, torch.from_numpy(sketches.dense))


def _padded_codes(source: EntityFeatures, features: tuple[Feature, ...], rows: np.ndarray) -> Tensor:
    """[n] rows of items or users → [n, features, C] int64, -1 where there is no code."""
    taken = [source.sparse[f.name].take(rows) for f in features]
    longest = max([1, *(int(t.lengths.max(initial=0)) for t in taken)])
    codes = np.full((len(rows), len(features), longest), -1, np.int64)
    for position, ragged in enumerate(taken):
        codes[:, position][np.arange(longest) < ragged.lengths[:, None]] = ragged.values
    return torch.from_numpy(codes)


def _export_user(program: UserProgram, dim: int, max_history: int, file: Path) -> None:
    features = len(program.first) if "context" in program.tables else 0
    batch, added = Dim("batch", min=1), Dim("added", min=1)
    # A length that can only be 1 is no dimension of its own.
    lengths = {1: Dim("length", min=1, max=max_history)} if max_history > 1 else {}
    sequence, one = {0: batch, **lengths}, {0: batch}
    b, n, m = 3, min(5, max_history), 2
    items, event, gap, time = (torch.zeros(b, n, dtype=torch.int64) for _ in range(4))
    arguments = UserInputs(
        items=items,
        event=event,
        gap=gap,
        value=torch.zeros(b, n),
        time=time,
        lengths=torch.ones(b, dtype=torch.int64),
        added=torch.zeros(m, dim),
        user=torch.zeros(b, dtype=torch.int64),
        profile=torch.zeros(b, dim),
        given=torch.zeros(b, dtype=torch.bool),
        context=torch.zeros(b, n, features, dtype=torch.int64) if features else None,
    )
    given = tuple(tensor for tensor in arguments if tensor is not None)
    shapes = (*[sequence] * 5, one, {0: added}, one, one, one, sequence)
    _save(program, given, (shapes[: len(given)],), file)  # the program has one parameter, `*inputs`


def _export_content(program: ContentProgram, data: PreparedData, entity: str, file: Path) -> None:
    width = sum(f.width for f in data.schema.of(entity, sparse=False))  # type: ignore[arg-type, misc]
    rows, codes = Dim("rows", min=1), Dim("codes", min=1)
    arguments = torch.full((3, program.features, 2 if program.features else 1), -1), torch.zeros(3, width)
    shapes = {0: rows, 2: codes} if program.features else {0: rows}, {0: rows}
    _save(program, arguments, shapes, file)


def _save(program: nn.Module, arguments: tuple[Tensor, ...], shapes: tuple[Any, ...], file: Path) -> None:
    program.eval().requires_grad_(False)
    try:
        exported = torch.export.export(program, arguments, dynamic_shapes=shapes, strict=False)
    except (torch._dynamo.exc.UserError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{file}: torch.export refuses the tower ({reason}); export with --tower none") from error
    torch.export.save(exported, file)


def _write_histories(data: PreparedData, most: int, file: Path) -> None:
    """Write each user's last `most` events: a row for each user in order of id, oldest event first."""
    columns = {"item": data.item, "event": data.event, "value": data.value, "timestamp": data.timestamp}
    contexts = context_columns(data.schema)
    types = history_types(contexts)
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in types.items()])
    with pq.ParquetWriter(file, schema) as writer:
        for block in _blocks(data.schema.users):
            end = data.offsets[block + 1]
            lengths = np.minimum(end - data.offsets[block], most)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            indices = spans(end - lengths, lengths)
            values = {name: column[indices] for name, column in columns.items()}
            if contexts:
                values |= dict(zip(contexts, data.context[indices].T, strict=True))
            lists = [
                pa.ListArray.from_arrays(offsets, pa.array(values[name]).cast(kind)) for name, kind in types.items()
            ]
            writer.write_table(pa.table(lists, schema=schema))


def _usual_gap(data: PreparedData) -> int:
    """Median seconds between two events of a user: the gap of an event without a time."""
    count = len(data.timestamp) - int(np.count_nonzero(np.diff(data.offsets)))

    def gaps() -> Iterator[np.ndarray]:
        for block in data.blocks():
            yield np.diff(data.timestamp[block.rows])[block.users[1:] == block.users[:-1]]

    if not count:
        return 0
    return int(np.mean(order_statistics(gaps, [(count - 1) // 2, count // 2])))


def _ordered(data: PreparedData, entity: str) -> Iterator[Feature]:
    """Sparse features, then dense ones, each in the schema's order: the order of the programs' inputs."""
    for sparse in (True, False):
        yield from data.schema.of(entity, sparse=sparse)  # type: ignore[arg-type]


def _blocks(size: int) -> Iterator[np.ndarray]:
    for start in range(0, size, BLOCK):
        yield np.arange(start, min(size, start + BLOCK))
