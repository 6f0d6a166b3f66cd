"""Printing of what comes from data: no markup is interpreted, and no control character takes effect."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from flm_torchrec.safe_text import visible


class PlainConsole(Console):
    """A rich console that prints every string as it is: `[red]` and `:smile:` are text like any other.

    Style is given by `rich.text.Text` objects or by the `style` of what is printed, never by markup in a string.
    """

    def render_str(self, text: str, **how: Any) -> Text:  # type: ignore[override]
        """The one place where rich turns strings into text: cells, titles and printed lines all come through here."""
        return Text(visible(text), how.get("style", ""), justify=how.get("justify"), overflow=how.get("overflow"))

    def on_broken_pipe(self) -> None:
        """Nobody reads the output any more: `cli.main` ends the command. Rich alone would end it with exit code 1."""
        raise BrokenPipeError
