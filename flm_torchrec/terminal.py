"""Prints text from data: markup is not interpreted, and control characters have no effect."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from flm_torchrec.safe_text import visible


class PlainConsole(Console):
    """A rich console that prints every string as it is: `[red]` and `:smile:` are ordinary text.

    Styles come from `rich.text.Text` objects or from `style` arguments, never from markup in a string.
    """

    def render_str(self, text: str, **how: Any) -> Text:  # type: ignore[override]
        """The string as visible text. Rich calls this for every cell, title and printed line."""
        return Text(visible(text), how.get("style", ""), justify=how.get("justify"), overflow=how.get("overflow"))

    def on_broken_pipe(self) -> None:
        """Nobody reads the output any more: `cli.main` ends the command. Rich alone would end it with exit code 1."""
        raise BrokenPipeError
