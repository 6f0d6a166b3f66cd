"""Is prepared data fit to learn from? Counts, distributions, features and splits, out of core by DuckDB.

Every query is an aggregate that DuckDB spills to disk beyond its memory limit; nothing here loads all events.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.charts import Curves, Histogram, wide
from flm_torchrec.data.schema import Schema, sparsity
from flm_torchrec.data.times import DAY_NUMBERS, LATEST, NO_SECONDS, year
from flm_torchrec.errors import DataError
from flm_torchrec.folders import SCHEMA
from flm_torchrec.inspection.bins import fitting
from flm_torchrec.pages import Bars, PageTable, Part, Section
from flm_torchrec.prepare import sql

TOP = 10
FEW = 20
"""Different values up to which each has a bar of its own."""
GREEDY = 0.01
"""Share of all events above which one user is taken for no person."""
GREEDY_EVENTS = 1000


@dataclass
class Inspection:
    """Prepared data, opened for queries, and the problems and tables so far."""

    folder: Path
    schema: Schema
    connection: duckdb.DuckDBPyConnection
    findings: list[str] = field(default_factory=list)
    """Problems, a line each, with what to do."""
    sections: list[Section] = field(default_factory=list)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    """By `items` or `users`: the names of the columns in the file, and what SQL calls them."""

    def column(self, entity: str, name: str) -> str:
        """What SQL calls a column of items.parquet or users.parquet.

        Raises:
            DataError: the file has no such column.
        """
        if name not in self.columns[entity]:
            raise DataError(f"{self.folder / entity}.parquet: has no column '{name}'; prepare the data again")
        return self.columns[entity][name]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self.connection.execute(query).fetchall()

    def one(self, query: str) -> tuple[Any, ...]:
        """The first row of a query."""
        return self.rows(query)[0]

    def counts(self, query: str) -> dict[Any, int]:
        """A query of two columns, the second by the first."""
        return dict(self.rows(query))


@contextmanager
def opened(folder: Path, memory: int) -> Iterator[Inspection]:
    """The data as views `events`, `items` and `users`; `row_index` of an event is its position in its file.

    Args:
        memory: bytes that DuckDB may fill before it goes to disk.

    Raises:
        DataError: no prepared data, or a file that is not readable.
    """
    schema = Schema.load(folder / SCHEMA)
    files = sorted((folder / "interactions").glob("*.parquet"))
    if not files:
        raise DataError(f"{folder / 'interactions'}: no Parquet file; prepare the data again")
    with TemporaryDirectory(prefix="flm-inspect-") as spill:
        connection = duckdb.connect(config={"memory_limit": f"{memory}B", "temp_directory": spill})
        try:
            events = sql.read_parquet(files, "file_row_number = true")
            connection.execute(
                f"CREATE VIEW events AS SELECT * EXCLUDE (file_row_number), file_row_number AS row_index FROM {events}"
            )
            columns = {entity: _view(connection, folder, entity) for entity in ("items", "users")}
            yield Inspection(folder, schema, connection, columns=columns)
        except duckdb.Error as error:
            raise DataError(f"{folder}: not readable ({str(error).splitlines()[0]}); prepare the data again") from error
        finally:
            connection.close()


def _view(connection: duckdb.DuckDBPyConnection, folder: Path, entity: str) -> dict[str, str]:
    """Make the view `items` or `users`; returns the names in the file, and those in the view.

    Names of features are the user's: they may be those of a query, or differ in case alone, which SQL takes for one.
    """
    file = folder / f"{entity}.parquet"
    rows = sql.read_parquet([file])
    try:
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: not readable ({str(error).splitlines()[0]}); prepare the data again") from error
    own = (f"{entity[:-1]}_id", f"{entity[:-1]}_key")
    columns = {name: name if name in own else f"c{place}" for place, name in enumerate(names)}
    connection.execute(f"CREATE VIEW {entity} AS SELECT * FROM {rows} AS stored({', '.join(columns.values())})")
    return columns


def look_at_counts(data: Inspection) -> None:
    """Sizes, compared with those of schema.yaml; ids, times and order of the events."""
    schema = data.schema
    events, users, items, least, most, first, last = data.one(
        "SELECT count(*), count(DISTINCT user_id), count(DISTINCT item_id), min(least(user_id, item_id)),"
        f" max(greatest(user_id - {schema.users}, item_id - {schema.items})), min(timestamp), max(timestamp)"
        " FROM events"
    )
    if events == 0:
        raise DataError(f"{data.folder / 'interactions'}: no rows; check the filters given to 'flm prepare'")
    if least < 0 or most >= 0:
        data.findings.append("interactions have ids outside users.parquet or items.parquet: prepare the data again")
    stored = {entity: data.one(f"SELECT count(*) FROM {entity}")[0] for entity in ("users", "items")}
    for name, count in {**stored, "interactions": events}.items():
        if count != getattr(schema, name):
            data.findings.append(
                f"{count} {name}, but schema.yaml says {getattr(schema, name)}: prepare the data again"
            )
    if schema.timestamps and last > LATEST:
        late = data.one(f"SELECT count(*) FROM events WHERE timestamp > {LATEST}")[0]
        data.findings.append(
            f"{late} of {events} events are later than the year {year(LATEST)}, the last in {year(last)}, so their"
            " times are not in seconds: prepare again with --time-unit ms, us or ns"
        )
    if schema.timestamps and data.one(f"SELECT bool_and({DAY_NUMBERS}) FROM events")[0]:
        data.findings.append(f"{NO_SECONDS}: write them as 2024-03-31 and prepare again")
    mixed = data.one(
        "SELECT count(*) FROM (SELECT timestamp < lag(timestamp) OVER (PARTITION BY user_id ORDER BY row_index) AS back"
        " FROM events) WHERE back"
    )[0]
    if mixed:
        data.findings.append(f"{mixed} events are older than the one before of the same user: prepare the data again")
    pairs = data.one("SELECT count(*) FROM (SELECT DISTINCT user_id, item_id FROM events)")[0]
    rows = [
        ("events", f"{events:,}"),
        ("users", f"{schema.users:,}, {schema.users - users:,} of them without events"),
        ("items", f"{schema.items:,}, {schema.items - items:,} of them without events"),
        ("sparsity", f"{sparsity(pairs, schema.users, schema.items):.4%}"),
    ]
    if schema.timestamps:
        rows += [("from", _date(first)), ("to", _date(last))]
    data.sections.append(Section("Counts", parts=[PageTable(f"{schema.name} ({schema.source})", ("", ""), rows)]))


def look_at_distributions(data: Inspection) -> None:
    """Events a user and an item, event types, values, gaps."""
    parts: list[Part] = []
    quantiles = []
    for entity in ("user", "item"):
        histogram = data.rows(
            f"SELECT n, count(*) FROM (SELECT count(*) AS n FROM events GROUP BY {entity}_id) GROUP BY n ORDER BY n"
        )
        counts, holders = (np.array(column, float) for column in zip(*histogram, strict=True))
        quantiles.append([f"events of {'a user' if entity == 'user' else 'an item'}", *_quantiles(counts, holders)])
        parts.append(_by_count(entity, counts, holders))
        if entity == "user":
            short = holders[counts < 3].sum()
            if short > holders.sum() / 2:
                data.findings.append(
                    f"{short:.0f} of {holders.sum():.0f} users have fewer than 3 events, so leave-one-out tests few:"
                    " use --data.split time, or prepare with --k-core 3"
                )
        else:
            parts.append(_lorenz(counts, holders))
    parts.insert(0, PageTable("how many", ("", "least", "25%", "50%", "75%", "99%", "most", "mean"), quantiles))
    parts += [*_events(data), *_values(data)]
    if data.schema.timestamps:
        gaps = data.rows(
            "SELECT CASE WHEN gap <= 0 THEN 0 ELSE 1 + floor(log2(gap)) END AS power, count(*) FROM (SELECT timestamp -"
            " lag(timestamp) OVER (PARTITION BY user_id ORDER BY row_index) AS gap FROM events) WHERE gap IS NOT NULL"
            " GROUP BY power ORDER BY power"
        )
        parts += _gaps({int(power): n for power, n in gaps})
        if gaps and gaps[0][0] == 0 and gaps[0][1] > sum(n for _, n in gaps) / 2:
            data.findings.append(
                "most events of a user share their timestamp with the one before, so their order is not known:"
                " prepare with finer timestamps"
            )
    data.sections.append(Section("Distributions", parts=parts))


def look_at_top(data: Inspection) -> None:
    """The items and users with the most events."""
    title = data.column("items", data.schema.title) if data.schema.title else "item_key"
    total = data.one("SELECT count(*) FROM events")[0]
    items = data.rows(
        f"SELECT item_key, {title}, n FROM (SELECT item_id, count(*) AS n FROM events GROUP BY item_id ORDER BY n DESC,"
        f" item_id LIMIT {TOP}) JOIN items USING (item_id) ORDER BY n DESC, item_id"
    )
    users = data.rows(
        "SELECT user_key, n FROM (SELECT user_id, count(*) AS n FROM events GROUP BY user_id ORDER BY n DESC, user_id"
        f" LIMIT {TOP}) JOIN users USING (user_id) ORDER BY n DESC, user_id"
    )
    for key, n in users:
        if n > GREEDY_EVENTS and n > GREEDY * total:
            data.findings.append(f"user '{key}' has {n / total:.1%} of all events: leave it out if it is no person")
    item_rows = [(str(key), str(shown or key), f"{n:,}", f"{n / total:.2%}") for key, shown, n in items]
    user_rows = [(str(key), f"{n:,}", f"{n / total:.2%}") for key, n in users]
    grids = [
        PageTable("items of most events", ("item", "title", "events", "share"), item_rows),
        PageTable("users of most events", ("user", "events", "share"), user_rows),
    ]
    data.sections.append(Section("Top ids", parts=grids))


def _events(data: Inspection) -> list[Part]:
    counts = data.counts("SELECT event, count(*) FROM events GROUP BY event")
    names = data.schema.events
    for code in counts:
        if not 0 <= code < len(names):
            data.findings.append(f"event code {code} is none of schema.yaml: prepare the data again")
    heights = [counts.get(code, 0) for code in range(len(names))]
    return [Bars("events, by type", names, heights, "type of event")] if len(names) > 1 else []


def _values(data: Inspection) -> list[Part]:
    least, most, broken = data.one("SELECT min(value), max(value), count(*) FILTER (NOT isfinite(value)) FROM events")
    if broken:
        data.findings.append(f"{broken} events have a value that is no number: clean them and prepare again")
        return []
    if least == most:
        return []
    # One more than is shown tells that there are more.
    few = data.rows(f"SELECT value, count(*) FROM events GROUP BY value ORDER BY value LIMIT {FEW + 1}")
    if len(few) <= FEW:
        return [Bars("events, by value", [f"{value:g}" for value, _ in few], [n for _, n in few], "value of the event")]
    whole, smallest, zeros = data.one(
        "SELECT bool_and(value = floor(value)), min(value) FILTER (value > 0), count(*) FILTER (value = 0) FROM events"
    )
    title, begin = "events, by value", least
    if least == 0 and wide([smallest, most]):  # 0 is on no logarithmic axis
        title, begin = f"{title}; {zeros:,} events of value 0 are left out", smallest
    bins = fitting(begin, most, whole)
    counts = ", ".join(f"count(*) FILTER (value::DOUBLE < {edge!r}::DOUBLE)" for edge in bins.edges.tolist())
    below = data.one(f"SELECT {counts} FROM events")
    return [Histogram(title, "value of the event", "events", bins.edges, np.diff(below), bins.log)]


def _gaps(by_power: dict[int, int]) -> list[Part]:
    """Time between a user's events: by power p, the events after 2^(p - 1) to below 2^p seconds; 0 of none at all."""
    apart = [power for power in by_power if power > 0]
    if not apart:
        return []
    powers = np.arange(min(apart), max(apart) + 1)
    heights = [by_power.get(power, 0) for power in powers.tolist()]
    edges = 2.0 ** np.append(powers - 1, powers[-1])
    title = "events, by time since the user's last"
    if by_power.get(0):
        title += f"; {by_power[0]:,} in the same second are left out"
    log = wide(edges)
    name = "time since the event before" if log else "seconds since the event before"
    return [Histogram(title, name, "events", edges, heights, log, seconds=log)]


def _quantiles(counts: np.ndarray, holders: np.ndarray) -> list[str]:
    reached = np.cumsum(holders)
    positions = [np.searchsorted(reached, q * reached[-1]) for q in (0, 0.25, 0.5, 0.75, 0.99, 1)]
    mean = (counts * holders).sum() / reached[-1]
    return [*(f"{counts[min(p, len(counts) - 1)]:.0f}" for p in positions), f"{mean:.1f}"]


def _by_count(entity: str, counts: np.ndarray, holders: np.ndarray) -> Histogram:
    """How many users or items have how many events: `holders` [n] of them have `counts` [n] events each."""
    bins = fitting(counts[0], counts[-1], whole=True)
    heights = np.histogram(counts, bins.edges, weights=holders)[0]
    title, name = f"{entity}s, by number of events", f"events of the {entity}"
    return Histogram(title, name, f"{entity}s", bins.edges, heights, bins.log)


def _lorenz(counts: np.ndarray, holders: np.ndarray) -> Curves:
    x = np.concatenate([[0], np.cumsum(holders) / holders.sum()])
    y = np.concatenate([[0], np.cumsum(counts * holders) / (counts * holders).sum()])
    gini = 1 - (np.diff(x) * (y[1:] + y[:-1])).sum()
    lines = {"items": (x.tolist(), y.tolist()), "if all were alike": ([0, 1], [0, 1])}
    title = f"how unequal items are (Lorenz), Gini {gini:.2f}"
    return Curves(title, "share of items, least popular first", "share of events", lines)


def _date(seconds: int) -> str:
    return str(np.datetime64(seconds, "s")).replace("T", " ")
