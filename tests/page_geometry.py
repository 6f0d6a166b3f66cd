"""What is wrong with a page to look at, by the geometry and the colours of its text. No pictures are compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (390, 768, 1280, 1920)
SCHEMES = ("light", "dark")
FAULTS = Path(__file__).with_name("page_faults.js").read_text(encoding="utf-8")


def faults(page: Page) -> list[str]:
    """Of a page as it is now: text that is cut, off the screen, over other text or too pale, and sideways scrolling."""
    return page.evaluate(FAULTS)


def at_every_size(page: Page) -> dict[str, list[str]]:
    """The faults at each width and in each colour scheme that has some."""
    found = {}
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            found[f"{width} {scheme}"] = faults(page)
    return {where: what for where, what in found.items() if what}
