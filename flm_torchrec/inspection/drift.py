"""How the events of each period differ from all before them."""

from __future__ import annotations

import math

import numpy as np

from flm_torchrec.charts import Curves
from flm_torchrec.inspection.inspect import Inspection
from flm_torchrec.pages import PageTable, Part, Section

DAY = 86400
LAST_DAY = 2_932_897
"""Days from 1970 to the year 10,000, which charts of dates do not reach."""
WHOSE = {"user": "by a user", "item": "of an item"}
PERIODS = 60
"""At most; in a longer log a period has several days."""
SHIFTED = 0.25
"""Population stability index from which a shift is called a major one (Siddiqi, Credit Risk Scorecards, 2006)."""
DIVERGED = 0.4
"""Jensen-Shannon divergence of item popularity (1 bit at most) above which it is a problem."""
ENOUGH_AN_ITEM = 5
"""Events for each item of a period below which the divergence is mostly chance."""
ENOUGH = 1000
"""Events of a period below which it is not judged."""
QUIET = 0.1
"""Share of the median period's events below which a period is taken for a hole in the log."""


def look_at_drift(data: Inspection) -> None:
    """By period: events, divergence of item popularity and event types, share of events by new users and items."""
    if not data.schema.timestamps:
        data.sections.append(Section("Drift", ["no timestamps, so no periods to compare"]))
        return
    first, last = data.one("SELECT min(timestamp) // $d, max(timestamp) // $d FROM events".replace("$d", str(DAY)))
    days = max(1, math.ceil((last - first + 1) / PERIODS))
    count = (last - first) // days + 1
    if count < 2:
        data.sections.append(Section("Drift", ["all events are of one day, so there is nothing to compare"]))
        return
    data.connection.execute(
        f"CREATE TEMP VIEW periods AS SELECT *, ((timestamp // {DAY} - {first}) // {days})::INT AS period FROM events"
    )
    events = _by_period(data, "SELECT period, count(*) FROM periods GROUP BY period", count)
    popularity = _by_period(data, _divergence(), count)
    types = _stability(data, count)
    new = {
        entity: _by_period(
            data,
            f"SELECT period, count(*) FILTER (period = earliest) / count(*) FROM (SELECT period, min(period) OVER"
            f" (PARTITION BY {entity}_id) AS earliest FROM periods) GROUP BY period",
            count,
        )
        for entity in ("user", "item")
    }
    labels = [str(np.datetime64(int(first + p * days), "D")) for p in range(count)]
    _find_shifts(data, labels, events, popularity, types)
    x = np.array([first + period * days for period in range(count)])
    dated = x[-1] < LAST_DAY  # times in milliseconds are years that no date can name
    x = x.astype("datetime64[D]") if dated else np.arange(count)
    lines: dict[str, tuple[np.ndarray, list[float]]] = {
        "item popularity (Jensen-Shannon, bits)": (x[1:], popularity[1:].tolist())
    }
    if len(data.schema.events) > 1:
        lines["event types (population stability index)"] = (x[1:], types[1:].tolist())
    length = "day" if days == 1 else f"{days} days"
    began = ("date, UTC" if days == 1 else f"first of {length}, UTC") if dated else f"number of the {length}"
    rows = [
        (label, f"{n:,.0f}", f"{d:.3f}", f"{t:.3f}", f"{u:.1%}", f"{i:.1%}")
        for label, n, d, t, u, i in zip(labels, events, popularity, types, new["user"], new["item"], strict=True)
    ]
    header = ("from", "events", "item popularity", "event types", "by new users", "of new items")
    note = "Each period beside all before it: 0 is the same, 1 shares nothing. Few events diverge by chance alone."
    first_met = {f"{WHOSE[entity]} not met before": (x, share.tolist()) for entity, share in new.items()}
    parts: list[Part] = [
        Curves(f"events, by {length}", began, "events", {"events": (x, events.tolist())}),
        Curves("divergence from all before", began, "divergence", lines),
        Curves("share of events", began, "share of events", first_met),
        PageTable(f"by {length}", header, rows),
    ]
    data.sections.append(Section("Drift", [note], parts))


def _by_period(data: Inspection, query: str, count: int) -> np.ndarray:
    """[count] float: the value of each period, 0 where the query has none."""
    values = np.zeros(count)
    for period, value in data.rows(query):
        values[period] = value
    return values


def _divergence() -> str:
    """Jensen-Shannon divergence of items in a period and before it (Lin, IEEE Trans. Inf. Theory 1991), in bits.

    An item that occurs only before adds half its share, so only the items of the period need a row.
    """
    return """
        WITH counts AS (SELECT period, item_id, count(*) AS n FROM periods GROUP BY ALL),
        totals AS (SELECT period, sum(n) AS here, coalesce(sum(sum(n)) OVER (ORDER BY period
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS earlier FROM counts GROUP BY period),
        shares AS (SELECT period, n / here AS p, coalesce(sum(n) OVER (PARTITION BY item_id ORDER BY period
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) / earlier AS q
            FROM counts JOIN totals USING (period))
        SELECT period, (1 - sum(q)) / 2 + sum(p / 2 * log2(2 * p / (p + q))
            + CASE WHEN q > 0 THEN q / 2 * log2(2 * q / (p + q)) ELSE 0 END)
            FROM shares WHERE isfinite(q) GROUP BY period"""


def _stability(data: Inspection, count: int) -> np.ndarray:
    """[count] population stability index of event types: sum of (p - q) ln(p / q), half an event added to each."""
    table = np.full((count, len(data.schema.events)), 0.5)
    for period, event, n in data.rows("SELECT period, event, count(*) FROM periods GROUP BY ALL"):
        if 0 <= event < table.shape[1]:
            table[period, event] += n
    before = np.cumsum(table, 0)[:-1]
    p, q = (part / part.sum(1, keepdims=True) for part in (table[1:], before))
    return np.concatenate([[0.0], ((p - q) * np.log(p / q)).sum(1)])


def _find_shifts(
    data: Inspection, labels: list[str], events: np.ndarray, popularity: np.ndarray, types: np.ndarray
) -> None:
    """Report holes in the log, and periods that differ from all before them. Arrays are [periods]."""
    busy = np.flatnonzero(events >= QUIET * np.median(events[events > 0]))  # a log may begin and end slowly
    quiet = [labels[p] for p in range(busy[0], busy[-1]) if p not in busy]
    if quiet:
        data.findings.append(f"few or no events in {len(quiet)} periods, first from {quiet[0]}: is the log whole?")
    shifted = [labels[p] for p in np.flatnonzero((types > SHIFTED) & (events >= ENOUGH))]
    if shifted:
        data.findings.append(
            f"event types shift in {len(shifted)} periods, first from {shifted[0]}: was the way of logging changed?"
            " If so, leave out what is older"
        )
    items = _by_period(data, "SELECT period, count(DISTINCT item_id) FROM periods GROUP BY period", len(labels))
    enough = (events >= ENOUGH) & (events >= ENOUGH_AN_ITEM * items)
    diverged = [labels[p] for p in np.flatnonzero((popularity > DIVERGED) & enough)]
    if diverged:
        data.findings.append(
            f"item popularity shifts in {len(diverged)} periods, first from {diverged[0]}: test with --data.split time,"
            " and train on newer events"
        )
