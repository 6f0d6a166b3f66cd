"""Runs the packaged user tower: histories and features → vectors, without the model's code and without TorchRec."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from flm_torchrec.data.feature_values import FeatureValues, codes_of, numbers_of
from flm_torchrec.data.history import CONTEXT, NO_CONTEXT, NO_EVENTS, CodedEvents, Events, HistoryCoding, previous_times
from flm_torchrec.documents import MOST_JSON_BYTES, read_text
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles
from flm_torchrec.export.parts import single_array
from flm_torchrec.export.tower.compiled import UserFunction, load_compiled
from flm_torchrec.export.tower.layout import (
    DESCRIPTION,
    FOLDER,
    HISTORIES,
    ITEM,
    PROFILE,
    USER,
    Description,
    history_types,
)
from flm_torchrec.export.vectors import unit
from flm_torchrec.names import nearest
from flm_torchrec.safe_text import first_line

MOST_APART = 1e-4
"""Absolute and relative difference of compiled code and program from which on the code is not trusted."""
LEAST_MAPPED = 65_536
"""Bytes of a table from which on a file is made for it."""


@dataclass(frozen=True)
class TowerQuery:
    """The user to represent."""

    history: Events = NO_EVENTS
    """The user's events, oldest first; items from the end of the catalogue on are added ones."""
    user: int = -1
    """Row of a known user, or -1."""
    profile: np.ndarray | None = None  # [D] the user's content vector, in place of the known user's


@dataclass(frozen=True)
class Represented:
    """The tower's output for one query."""

    heads: np.ndarray  # [heads + 1, S], fused last
    weights: np.ndarray  # [heads]: the fused h is the heads' sum by these; zeros where it is no sum


class PackagedTower:
    """The user tower of one export. Safe to call from several threads.

    Args:
        mapped: where its tables and the histories are mapped from files.

    Raises:
        RunError: the export has no tower, or it cannot be read.
    """

    def __init__(self, export: Path, mapped: MappedFiles = IN_MEMORY) -> None:
        folder = export / FOLDER
        if not (folder / DESCRIPTION).is_file():
            raise RunError(f"{folder}: not found; make the export with 'flm export --tower int8'")
        try:
            description = Description.model_validate_json(read_text(folder / DESCRIPTION, MOST_JSON_BYTES))
            program = torch.export.load(folder / USER)
            user, self.item, self.profile = (
                program.module(),
                *(torch.export.load(folder / name).module() for name in (ITEM, PROFILE)),
            )
            self.features = [FeatureValues.described(f.model_dump()) for f in description.features]
            self.contexts = [f for f in self.features if f.entity == "event"]
            """Features of events, in the order of their codes."""
            self.types = history_types([f"{CONTEXT}{f.name}" for f in self.contexts])
            self.histories = mapped.table("histories", lambda: _histories(folder / HISTORIES, self.types))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise RunError(f"{folder / DESCRIPTION}: {where}: {problem['msg']}; export again") from error
        except (ValueError, RuntimeError, OSError, BadZipFile, pa.ArrowException) as error:
            raise RunError(f"{folder}: cannot be read ({first_line(error)}); export again") from error
        for name, module in ((USER, user), (ITEM, self.item), (PROFILE, self.profile)):
            _map_tables(module, name, mapped)
        self.dim, self.space, self.items, self.max_history = (
            description.dim,
            description.space or description.dim,
            description.items,
            description.max_history,
        )
        self.cosine, self.fusion, self.events = description.cosine, description.fusion, description.events
        targets = self.events if description.targets is None else description.targets
        self.predicted = np.isin(self.events, targets)
        """[kinds of events] bool: events of these kinds say that the user has had the item."""
        self.timestamps, self.usual_gap = description.timestamps, description.usual_gap
        self.title = description.title
        self.coding = HistoryCoding(
            description.value_mean,
            description.value_scale,
            description.timestamps,
            description.gaps,
            len(self.contexts),
        )
        self._check_histories(folder / HISTORIES)
        self.nobody, _ = self._contents_of_nothing(folder)
        self.user: UserFunction = user
        self.compiled = False
        """Whether the user program runs as native code."""
        compiled, reason = load_compiled(program, user)
        if compiled is not None:
            reason = self._use(compiled)
        if reason:
            line = f"{folder / USER}: the compiled program is not used ({reason}); the portable one is, which is slower"
            mapped.once("tower-told", lambda: print(f"note: {line}", file=sys.stderr, flush=True))

    def _use(self, compiled: UserFunction) -> str:
        """Use compiled code if it gives what the program gives; else say why not."""
        rng = np.random.default_rng(0)
        for count, longest in ((1, 1), (1, self.max_history), (3, max(1, self.max_history // 2))):
            given = self._made_up(rng, count, longest)
            try:
                with torch.inference_mode():
                    pairs = list(zip(compiled(*given), self.user(*given), strict=True))
            except (RuntimeError, ValueError) as error:
                return f"it fails: {first_line(error)}"
            for one, other in pairs:
                if one.shape != other.shape or not torch.allclose(one, other, rtol=MOST_APART, atol=MOST_APART):
                    return "it gives other vectors"
        self.user, self.compiled = compiled, True
        return ""

    def _made_up(self, rng: np.random.Generator, count: int, longest: int) -> list[Tensor]:
        """Inputs of the user program with all that may come: known and added items, and cold users."""
        shape = count, longest
        arrays = (
            rng.integers(0, self.items + 1, shape),
            rng.integers(0, len(self.events) + 1, shape),
            rng.integers(0, self.coding.gap_rows, shape),
            rng.normal(size=shape).astype(np.float32),
            rng.integers(0, 10**6, shape).cumsum(1),
            rng.integers(0, longest + 1, count),
            rng.normal(size=(1, self.dim)).astype(np.float32),
            rng.integers(-1, max(1, len(self.histories)), count),
            rng.normal(size=(count, self.dim)).astype(np.float32),
            rng.random(count) < 0.5,
            *([self._made_up_contexts(rng, shape)] if self.contexts else []),
        )
        return [torch.from_numpy(array) for array in arrays]

    def _made_up_contexts(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return np.stack([rng.integers(0, len(f.values) + 1, shape) for f in self.contexts], 2)

    def _check_histories(self, file: Path) -> None:
        sizes = {"item": (0, self.items), "event": (0, len(self.events))}
        sizes |= {f"{CONTEXT}{f.name}": (-1, len(f.values)) for f in self.contexts}
        for name, (least, most) in sizes.items():
            codes = single_array(self.histories[name]).flatten().to_numpy()
            if len(codes) and not least <= codes.min() <= codes.max() < most:
                raise RunError(f"{file}: column '{name}' holds {codes.min()} … {codes.max()}, of {most}; export again")

    def _contents_of_nothing(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Content [D] of a user and of an item without features: checks that the programs fit the description."""
        try:
            return self.content("user", {})[0], self.content("item", {})[0]
        except (AssertionError, RuntimeError, ValueError) as error:  # AssertionError: the guards of torch.export
            reason = f"its programs do not take the features of {DESCRIPTION} ({first_line(error)})"
            raise RunError(f"{folder}: {reason}; export again") from error

    def known_history(self, user: int) -> Events:
        """The last events of a known user, one more than the tower reads, so that the first gap is known."""
        columns = {name: self.histories[name].chunk(0)[user].values.to_numpy() for name in self.types}
        contexts = [columns.pop(f"{CONTEXT}{f.name}") for f in self.contexts]
        context = np.stack(contexts, 1) if contexts else NO_CONTEXT
        return Events(**{**columns, "item": columns["item"].astype(np.int64)}, context=context)

    def had(self, events: Events) -> np.ndarray:
        """[n] rows of the items that recommendations leave out after these events."""
        return events.item[self.predicted[events.event]]

    def represent(self, queries: Sequence[TowerQuery], added: np.ndarray) -> list[Represented]:
        """The representations for each query, by each head and by fusion.

        Args:
            added: [M, D] content vectors, as of `content`, of the items that the catalogue lacks.
        """
        most = self.max_history
        shown = [q.history.take(slice(-most, None)) if len(q.history) > most else q.history for q in queries]
        lengths = np.array([len(h) for h in shown])
        events = Events.concat(shown) if len(shown) > 1 else shown[0]
        coded = self._coded([q.history for q in queries], events, lengths)
        there = np.arange(max(1, int(lengths.max()))) < lengths[:, None]  # [queries, longest]
        item, value = np.require(events.item, np.int64, "W"), coded.value.astype(np.float32, copy=False)
        columns = (item, coded.event, coded.gap, value, coded.time)
        # A cold user's row of the table is not used: the profile is given.
        profiles = [self.nobody if q.profile is None else q.profile for q in queries]
        given = [q.profile is not None or q.user < 0 for q in queries]
        arrays = (
            *(_padded(column, there) for column in columns), lengths,
            added if len(added) else np.zeros((1, self.dim), np.float32),
            np.array([q.user for q in queries]), np.array(profiles), np.array(given),
            *([_padded(coded.context, there)] if self.contexts else []),
        )  # fmt: skip
        with torch.inference_mode():
            heads, weights = self.user(*(torch.from_numpy(a) for a in arrays))
        return [Represented(h, w) for h, w in zip(heads.numpy(), weights.numpy(), strict=True)]

    def content(self, entity: str, given: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
        """Features of an item or a user → its content vector [D] for the tower, and one line for each left out value.

        A value that was not in training is left out, as `flm prepare` leaves out rare values.

        Raises:
            DataError: there is no such feature, or a value does not fit its kind.
        """
        features = self._known(entity, given, "features")
        left_out: list[str] = []
        sparse = [list(codes_of(f, given.get(f.name), left_out)) for f in features if not f.dense]
        numbers = [n for f in features if f.dense for n in numbers_of(f, given.get(f.name))]
        codes = torch.full((1, len(sparse), max([1, *(len(c) for c in sparse)])), -1)
        for position, of_feature in enumerate(sparse):
            codes[0, position, : len(of_feature)] = torch.tensor(of_feature, dtype=torch.int64)
        program = self.item if entity == "item" else self.profile
        with torch.inference_mode():
            content: Tensor = program(codes, torch.tensor([numbers], dtype=torch.float32))
        return content[0].numpy(), left_out

    def context(self, given: Mapping[str, Any], where: str, left_out: list[str]) -> list[int]:
        """The context of an event → the code of each feature of events, -1 where there is none.

        Args:
            given: by feature, its value; None: unknown.
            where: what messages call it, such as "context".
            left_out: gets one line for each value that was not in training.

        Raises:
            DataError: there is no such feature, or a value does not fit its kind.
        """
        features = self._known("event", given, where)
        return [next(codes_of(f, given.get(f.name), left_out, where), -1) for f in features]

    def context_values(self, events: Events) -> list[dict[str, str]]:
        """[n] by feature of events, the value; without those that are unknown."""
        rows = events.with_context(len(self.contexts)).tolist()
        return [{f.name: f.values[c] for f, c in zip(self.contexts, row, strict=True) if c >= 0} for row in rows]

    def _known(self, entity: str, given: Iterable[str], where: str) -> list[FeatureValues]:
        """The features of an entity; DataError where one of the given names is none of them."""
        features = [f for f in self.features if f.entity == entity]
        names = [f.name for f in features]
        for name in given:
            if name not in names:
                hint = nearest(name, names) if names else f"{entity}s have no features"
                raise DataError(f"{where}: no {entity} feature '{name}'; {hint}")
        return features

    def scored(self, contents: np.ndarray) -> np.ndarray:
        """[n, D] content vectors of items → [n, S], the vectors that representations are scored against."""
        if self.cosine:
            contents = unit(contents)
        return np.pad(contents, ((0, 0), (0, self.space - contents.shape[1])))

    def _coded(self, histories: Sequence[Events], shown: Events, lengths: np.ndarray) -> CodedEvents:
        """Events as the tower takes them.

        Args:
            shown: the last events of each history, one history after the other.
            lengths: [histories] how many of each.
        """
        previous = previous_times(shown.timestamp)
        if len(histories) == 1:
            (history,) = histories
            previous[:1] = history.timestamp[-len(shown) - 1 :][:1]
            return self.coding.code(shown, previous, shown.timestamp[:1])
        begins = np.cumsum(lengths) - lengths
        for history, begin, length in zip(histories, begins.tolist(), lengths.tolist(), strict=True):
            if length:
                previous[begin] = history.timestamp[max(0, len(history) - length - 1)]
        there = lengths > 0
        return self.coding.code(shown, previous, np.repeat(shown.timestamp[begins[there]], lengths[there]))


def _padded(column: np.ndarray, there: np.ndarray) -> np.ndarray:
    """[n, …] values → [queries, longest, …], zero where nothing is `there` [queries, longest]."""
    shape = *there.shape, *column.shape[1:]
    if len(column) == there.size:
        return np.ascontiguousarray(column).reshape(shape)
    made = np.zeros(shape, column.dtype)
    made[there] = column
    return made


def _map_tables(program: nn.Module, name: str, mapped: MappedFiles) -> None:
    """Put arrays in files in place of the program's tables in memory."""
    if mapped.folder is None:
        return
    for inside, module in program.named_modules():
        for own, table in module.named_buffers(recurse=False):
            if table.nbytes >= LEAST_MAPPED:
                array = mapped.array(f"{name}.{inside}.{own}", table.numpy)
                module.register_buffer(own, torch.from_numpy(array))


def _histories(file: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    """The users' last events: lists of these types and of one length for each user."""
    table = pq.read_table(file, columns=list(types)).combine_chunks()
    table.validate(full=True)
    if any(table[name].type != pa.list_(pa.field("element", kind)) for name, kind in types.items()):
        raise ValueError(f"{HISTORIES} has columns of other types")
    lengths = [single_array(column).value_lengths() for column in table.columns]
    if any(length.null_count or not length.equals(lengths[0]) for length in lengths):
        raise ValueError(f"{HISTORIES} has lists of unequal length, or none")
    return table
