"""What to say, and when to stop, where so many rows are dropped that the result may be wrong."""

from __future__ import annotations

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import EXCLUDED, Dropped

WARN_ABOVE = 0.2
"""Dropped share of the rows read above which a warning is given."""

ASKED = {
    EXCLUDED: "that is what --exclude-users asks for: shorten its list to keep more",
    "value below": "that is what --min-value asks for: lower it to keep more",
    "duplicate": "that is what --dedup asks for: choose another to keep more",
    "outside the": "that is what --k-core, --min-user-events and --min-item-events ask for: lower them to keep more",
}
"""What to do, by the start of a reason why an option takes rows out on purpose."""
MENDS = {
    "no user": "name the column or field of the user in --columns",
    "no item": "name the column or field of the item in --columns",
    "timestamp": "check --columns and --time-unit, or leave timestamp out of --columns: the order of rows then counts",
    "negative timestamp": "check --columns and --time-unit",
    "value missing": "leave value out of --columns, or check --decimal, --thousands and --currency",
    "malformed: a quote": "give --multiline if quoted fields hold line breaks, or mend the quotes",
    "malformed: not UTF-8": "give the --encoding of the file",
    "malformed: a zero byte": "give the --encoding of the file, such as utf-16",
    "malformed: not a JSON object": "give the --source of the file: jsonl has an object a line",
    "malformed: not": "check --separator and --encoding",
}
"""What to do, by the start of any other reason; the first that fits counts."""


def check_share_dropped(name: str, rows_read: int, dropped: Dropped, max_dropped: float) -> None:
    """Check that at most the share `max_dropped` of the rows cannot be read or lacks what an event needs.

    Rows that an option takes out on purpose do not count.

    Raises:
        DataError: names the main reason, a row, and what to do.
    """
    unasked = {reason: n for reason, n in dropped.counts.items() if not reason.startswith(tuple(ASKED))}
    unusable = sum(unasked.values())
    if unusable > max_dropped * rows_read:
        reason = max(unasked, key=unasked.__getitem__)
        raise DataError(
            f"{name}: {unusable} of {rows_read} rows ({unusable / rows_read:.1%}) cannot be used, most: {reason}"
            f" (e.g. {dropped.examples[reason][0]}); {how_to_mend(reason)}; to go on with the rest,"
            f" raise --max-dropped {max_dropped}"
        )


def warnings_of(rows_read: int, rows_kept: int, dropped: Dropped) -> list[str]:
    """One line if more than the share `WARN_ABOVE` of the rows is dropped; else none."""
    lost = rows_read - rows_kept
    if lost <= WARN_ABOVE * rows_read:
        return []
    reason = max(dropped.counts, key=dropped.counts.__getitem__)
    return [
        f"{lost} of {rows_read} rows ({lost / rows_read:.1%}) were dropped, most ({dropped.counts[reason]}): {reason}"
        f"{dropped.example(reason)}; {how_to_mend(reason)}"
    ]


def how_to_mend(reason: str) -> str:
    """What to do about rows that were dropped for a reason."""
    fitting = [text for start, text in {**ASKED, **MENDS}.items() if reason.startswith(start)]
    return fitting[0] if fitting else "mend the file, or check --columns"
