"""Are so many rows dropped that the result may be wrong: what to say of it, and when to stop."""

from __future__ import annotations

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.clean import Dropped

LOUD = 0.2
"""Share of the rows read; a warning tells of more."""

ASKED = {
    "value below": "that is what --min-value asks for: lower it to keep more",
    "duplicate": "that is what --dedup asks for: choose another to keep more",
    "outside the": "that is what --k-core, --min-user-events and --min-item-events ask for: lower them to keep more",
}
"""By the start of a reason, of rows that an option takes out on purpose: the mend."""
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
"""By the start of a reason, the first that fits: the mend."""


def check_losses(name: str, rows_read: int, dropped: Dropped, most: float) -> None:
    """Stop where more than the share `most` of the rows cannot be read or lack what an event needs.

    Rows that an option takes out on purpose do not count.

    Raises:
        DataError: names the main reason, a row of it, and the mend.
    """
    unasked = {reason: n for reason, n in dropped.counts.items() if not reason.startswith(tuple(ASKED))}
    lost = sum(unasked.values())
    if lost > most * rows_read:
        reason = max(unasked, key=unasked.__getitem__)
        raise DataError(
            f"{name}: {lost} of {rows_read} rows ({lost / rows_read:.1%}) cannot be used, most: {reason}"
            f" (e.g. {dropped.examples[reason][0]}); {mend(reason)}; to go on with the rest, raise --max-dropped {most}"
        )


def warning_of(rows_read: int, rows_kept: int, dropped: Dropped) -> list[str]:
    """A line where more rows are dropped than may go without a word; else none."""
    lost = rows_read - rows_kept
    if lost <= LOUD * rows_read:
        return []
    reason = max(dropped.counts, key=dropped.counts.__getitem__)
    return [
        f"{lost} of {rows_read} rows ({lost / rows_read:.1%}) were dropped, most ({dropped.counts[reason]}): {reason}"
        f" (e.g. {dropped.examples[reason][0]}); {mend(reason)}"
    ]


def mend(reason: str) -> str:
    """What to do about rows dropped for it."""
    fitting = [text for start, text in {**ASKED, **MENDS}.items() if reason.startswith(start)]
    return fitting[0] if fitting else "mend the file, or check --columns"
