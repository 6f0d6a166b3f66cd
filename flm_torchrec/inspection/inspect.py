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

from flm_torchrec.data.schema import Schema, sparsity
from flm_torchrec.data.times import LATEST, year
from flm_torchrec.errors import DataError
from flm_torchrec.pages import Bars, Curves, PageTable, Section
from flm_torchrec.prepare import sql

TOP = 10
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
    schema = Schema.load(folder / "schema.yaml")
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
            for entity in ("items", "users"):
                rows = sql.read_parquet([folder / f"{entity}.parquet"])
                connection.execute(f"CREATE VIEW {entity} AS SELECT * FROM {rows}")
            yield Inspection(folder, schema, connection)
        except duckdb.Error as error:
            raise DataError(f"{folder}: not readable ({str(error).splitlines()[0]}); prepare the data again") from error
        finally:
            connection.close()


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
    parts: list[PageTable | Curves | Bars] = []
    quantiles = []
    for entity in ("user", "item"):
        histogram = data.rows(
            f"SELECT n, count(*) FROM (SELECT count(*) AS n FROM events GROUP BY {entity}_id) GROUP BY n ORDER BY n"
        )
        counts, holders = (np.array(column, float) for column in zip(*histogram, strict=True))
        quantiles.append([f"events of {'a user' if entity == 'user' else 'an item'}", *_quantiles(counts, holders)])
        parts.append(_by_powers(f"{entity}s, by number of events", counts, holders))
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
        labels = [_seconds(2 ** int(power - 1)) if power else "0 s" for power, _ in gaps]
        parts.append(Bars("events, by time since the user's last (from)", labels, [n for _, n in gaps]))
        if gaps and gaps[0][0] == 0 and gaps[0][1] > sum(n for _, n in gaps) / 2:
            data.findings.append(
                "most events of a user share their timestamp with the one before, so their order is not known:"
                " prepare with finer timestamps"
            )
    data.sections.append(Section("Distributions", parts=parts))


def look_at_top(data: Inspection) -> None:
    """The items and users with the most events."""
    title = sql.name(data.schema.title) if data.schema.title else "item_key"
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


def _events(data: Inspection) -> list[PageTable | Curves | Bars]:
    counts = data.counts("SELECT event, count(*) FROM events GROUP BY event")
    names = data.schema.events
    for code in counts:
        if not 0 <= code < len(names):
            data.findings.append(f"event code {code} is none of schema.yaml: prepare the data again")
    heights = [counts.get(code, 0) for code in range(len(names))]
    return [Bars("events, by type", names, heights)] if len(names) > 1 else []


def _values(data: Inspection) -> list[PageTable | Curves | Bars]:
    least, most, broken = data.one("SELECT min(value), max(value), count(*) FILTER (NOT isfinite(value)) FROM events")
    if broken:
        data.findings.append(f"{broken} events have a value that is no number: clean them and prepare again")
        return []
    if least == most:
        return []
    width = (most - least) / 20
    bins = f"SELECT least(19, floor((value - {least}) / {width}))::INT AS bin, count(*) FROM events GROUP BY bin"
    heights = data.counts(bins)
    labels = [f"{least + width * edge:.3g}" for edge in range(20)]
    return [Bars("events, by value (from)", labels, [heights.get(edge, 0) for edge in range(20)])]


def _quantiles(counts: np.ndarray, holders: np.ndarray) -> list[str]:
    reached = np.cumsum(holders)
    positions = [np.searchsorted(reached, q * reached[-1]) for q in (0, 0.25, 0.5, 0.75, 0.99, 1)]
    mean = (counts * holders).sum() / reached[-1]
    return [*(f"{counts[min(p, len(counts) - 1)]:.0f}" for p in positions), f"{mean:.1f}"]


def _by_powers(title: str, counts: np.ndarray, holders: np.ndarray) -> Bars:
    power = np.floor(np.log2(counts)).astype(int)
    heights = np.bincount(power, holders)
    labels = [str(2**p) if p == 0 else f"{2**p}–{2 ** (p + 1) - 1}" for p in range(len(heights))]
    return Bars(title, labels, heights.tolist())


def _lorenz(counts: np.ndarray, holders: np.ndarray) -> Curves:
    x = np.concatenate([[0], np.cumsum(holders) / holders.sum()])
    y = np.concatenate([[0], np.cumsum(counts * holders) / (counts * holders).sum()])
    gini = 1 - (np.diff(x) * (y[1:] + y[:-1])).sum()
    lines = {"items": (x.tolist(), y.tolist()), "all alike": ([0, 1], [0, 1])}
    return Curves(f"share of events (Lorenz), Gini {gini:.2f}", "share of items, least popular first", lines)


def _seconds(amount: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount} s"


def _date(seconds: int) -> str:
    return str(np.datetime64(seconds, "s")).replace("T", " ")
