"""What validation and test share with training although they should not, and what no model can know about them."""

from __future__ import annotations

from typing import Literal

from flm_torchrec.errors import DataError
from flm_torchrec.inspection.inspect import Inspection
from flm_torchrec.pages import PageTable, Section

Split = Literal["leave-one-out", "time"]
COLD = 0.5
"""Share of test events with an unseen item, or of an unseen user, above which ranking says little."""
COPIES = 0.01
"""Share of users with the same complete history as another, above which they are taken for copies."""
FULL_HISTORY = 3
REPEATED = 0.1
"""Share of test events of an item that the user had before, above which figures and lists are of other items."""


def look_at_splits(data: Inspection, split: Split, holdout: float) -> None:
    """Leakage between the parts of a split, as `flm train` would draw it.

    Args:
        holdout: share of events, of time.

    Raises:
        DataError: a time split of data without timestamps.
    """
    if split == "time" and not data.schema.timestamps:
        raise DataError(f"{data.folder}: has no timestamps; use --split leave-one-out")
    part = _leave_one_out() if split == "leave-one-out" else _by_time(data, holdout)
    # Once for all questions below; DuckDB spills it.
    data.connection.execute(
        f"CREATE TEMP TABLE parts AS SELECT user_id, item_id, timestamp, again, {part} AS part FROM"
        " (SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY row_index DESC) AS back,"
        " row_number() OVER (PARTITION BY user_id, item_id ORDER BY row_index) > 1 AS again,"
        " count(*) OVER (PARTITION BY user_id) AS n FROM events)"
    )
    parts = ("train", "validation", "test")
    sizes = data.counts("SELECT part, count(*) FROM parts GROUP BY part")
    for name in parts:
        if not sizes.get(name):
            data.findings.append(f"a {split} split leaves no {name} events: choose another --data.split")
    rows = [("events", *(f"{sizes.get(name, 0):,}" for name in parts))]
    for label, counted in (_seen_again(data, split), _had_before(data), *_unseen(data), *_later(data)):
        shown = [f"{counted.get(n, 0):,} ({_share(counted.get(n, 0), sizes.get(n, 0)):.2%})" for n in parts[1:]]
        rows.append((label, "", *shown))
    _find_copies(data)
    data.sections.append(Section(f"Split: {split}", parts=[PageTable("", ("", *parts), rows)]))


def _leave_one_out() -> str:
    return "CASE WHEN n < 3 OR back > 2 THEN 'train' WHEN back = 2 THEN 'validation' ELSE 'test' END"


def _by_time(data: Inspection, holdout: float) -> str:
    """By the same two cuts as the split itself: the next greater timestamp at each quantile."""
    total = data.one("SELECT count(*) FROM events")[0]
    cuts = [
        data.one(
            "SELECT min(timestamp) FROM (SELECT timestamp, sum(count(*)) OVER (ORDER BY timestamp) AS reached FROM"
            f" events GROUP BY timestamp) WHERE reached > ceil({share} * {total - 1})"
        )[0]
        for share in (1 - 2 * holdout, 1 - holdout)
    ]
    return f"CASE WHEN timestamp < {cuts[0]} THEN 'train' WHEN timestamp < {cuts[1]} THEN 'validation' ELSE 'test' END"


def _seen_again(data: Inspection, split: str) -> tuple[str, dict[str, int]]:
    """Events to predict that were learnt from: same user, item and second."""
    label = "also in training: same user, item, time"
    if not data.schema.timestamps:
        return label, {}
    repeated = data.counts(
        "SELECT part, count(*) FROM parts AS held WHERE part <> 'train' AND EXISTS (FROM parts AS learnt WHERE"
        " learnt.part = 'train' AND learnt.user_id = held.user_id AND learnt.item_id = held.item_id AND"
        " learnt.timestamp = held.timestamp) GROUP BY part"
    )
    if any(repeated.values()):
        shown = ", ".join(f"{n} {part}" for part, n in sorted(repeated.items()))
        data.findings.append(
            f"leak: {shown} events of a {split} split also stand in training: prepare with --dedup exact"
        )
    return label, repeated


def _had_before(data: Inspection) -> tuple[str, dict[str, int]]:
    """Events to predict of an item that the user had before."""
    repeated = data.counts("SELECT part, count(*) FROM parts WHERE again AND part <> 'train' GROUP BY part")
    total = data.one("SELECT count(*) FROM parts WHERE part = 'test'")[0]
    share = _share(repeated.get("test", 0), total)
    if share > REPEATED:
        kinds = ", of whatever kind of event" if len(data.schema.events) > 1 else ""
        data.findings.append(
            f"{share:.0%} of test events have an item that the user had before{kinds}, which lists of flm recommend and"
            " flm serve leave out: read 'flm evaluate --by repeats', or prepare with --dedup first"
        )
    return "item that the user had before", repeated


def _unseen(data: Inspection) -> list[tuple[str, dict[str, int]]]:
    by_entity = []
    for entity in ("item", "user"):
        counted = data.counts(
            f"SELECT part, count(*) FROM parts AS held WHERE part <> 'train' AND NOT EXISTS (FROM parts AS learnt WHERE"
            f" learnt.part = 'train' AND learnt.{entity}_id = held.{entity}_id) GROUP BY part"
        )
        total = data.one("SELECT count(*) FROM parts WHERE part = 'test'")[0]
        if _share(counted.get("test", 0), total) > COLD:
            data.findings.append(
                f"{_share(counted['test'], total):.0%} of test events have a{'n item' if entity == 'item' else ' user'}"
                " never met in training, whose id tells nothing: prepare with --k-core, or split otherwise"
            )
        by_entity.append((f"{entity} not in training", counted))
    return by_entity


def _later(data: Inspection) -> list[tuple[str, dict[str, int]]]:
    """Events that were learnt from though they came after the one to predict."""
    if not data.schema.timestamps:
        return []
    own = data.counts(
        "SELECT part, count(*) FROM parts JOIN (SELECT user_id, max(timestamp) AS newest FROM parts WHERE"
        " part = 'train' GROUP BY user_id) USING (user_id) WHERE part <> 'train' AND newest > timestamp GROUP BY part"
    )
    if any(own.values()):
        data.findings.append(
            f"leak: {sum(own.values())} events to predict are older than training events of the same user:"
            " prepare the data again"
        )
    others = data.counts(
        "SELECT part, count(*) FROM parts WHERE part <> 'train' AND timestamp < (SELECT quantile_cont(timestamp, 0.9)"
        " FROM (FROM parts WHERE part = 'train' USING SAMPLE reservoir(100000 ROWS) REPEATABLE (0))) GROUP BY part"
    )
    return [
        ("older than the same user's training events", own),
        ("older than the newest tenth of training events", others),
    ]


def _find_copies(data: Inspection) -> None:
    """Users with the same items in the same order, by a sum of hashes of item and position.

    An item counts once, where the user first has it: many users have little else than the same item again and again.
    """
    users, copies = data.one(
        "SELECT coalesce(sum(n), 0), coalesce(sum(n - 1), 0) FROM (SELECT count(*) AS n FROM (SELECT count(*) AS long,"
        " sum(hash(item_id, nth)::HUGEINT) AS history FROM (SELECT user_id, item_id, row_number() OVER"
        " (PARTITION BY user_id ORDER BY first) AS nth FROM (SELECT user_id, item_id, min(row_index) AS first"
        " FROM events GROUP BY user_id, item_id)) GROUP BY user_id"
        f" HAVING long >= {FULL_HISTORY}) GROUP BY long, history)"
    )
    if _share(copies, users) > COPIES:
        data.findings.append(
            f"{copies} of {users} users with {FULL_HISTORY} items or more have another's very history, so what is"
            " tested stands in training: leave out accounts that are no persons"
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
