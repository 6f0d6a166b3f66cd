"""The three pages in headless Chromium at four widths, light and dark: nothing is cut, covered, pale or off the screen.

The server's page gets its answers from here, so that these are as awkward as they can be.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import flm_torchrec.serve
from flm_torchrec import pages
from flm_torchrec.charts import Curves, Histogram
from flm_torchrec.config.heads import FUSED, HEADS
from flm_torchrec.pages import Bars, Figure, PageTable, Part, Section
from tests.conftest import CHROMIUM
from tests.page_geometry import WIDTHS, at_every_size, faults

if TYPE_CHECKING:
    from playwright import sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright, which is not here")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser: {CHROMIUM} is not there")
FILES = Path(flm_torchrec.serve.__path__[0]) / "page"
ALL = (FUSED, *HEADS)
NAMES = [
    "A title that goes on and on, as titles of old books do, with a subtitle: being the second of three parts",
    "x" * 150,
    "<img src=x onerror=\"document.title='broken'\"><b>bold</b> &amp; $x^2$",
    "كتاب طويل عن تاريخ المدينة القديمة (الجزء الثاني) 123 وما بعدها من السنوات",
    "東京の古い町並みを歩く長い題名とその続きの題名とさらに続く題名",
    "",
]


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    yield page
    page.close()


def item(place: int) -> dict[str, Any]:
    """One recommended item, with every reason."""
    name = NAMES[place % len(NAMES)]
    near = [{"item": other, "title": other, "similarity": 0.5} for other in NAMES[:3]]
    shares = [{"head": head, "weight": 0.5, "score": 0.25, "share": 0.125} for head in HEADS]
    why = {"shares": shares, "history": near, "in_common": {name: [{"value": name, "items": 2}]}}
    return {
        "item": f"key {name}",
        "title": name,
        "score": 1 / (place + 1),
        "attributes": {name: [name, "a"]},
        "why": why,
    }


def answers(items: int, heads: tuple[str, ...]) -> dict[str, Any]:
    """What the server would say, by path."""
    names = NAMES[:5]
    drawn = {
        "items": names,
        "titles": names,
        "x": [-1, 0, 1, 0.5, 0],
        "y": [0, 1, 0, -1, 0.5],
        "of": 5,
    }
    codes = {"values": names, "codes": [0, 1, 2, 3, -1]}
    lists = [{"head": head, "model_version": NAMES[0], "items": [item(n) for n in range(items)]} for head in heads]
    return {
        "/health": {"items": 10**9, "users": 10**9, "model_version": NAMES[0]},
        "/v1/catalogue": {
            "events": names, "features": {name: names for name in names[:2]}, "heads": heads, "model_version": NAMES[0]
        },
        "/v1/map": {**drawn, "features": {NAMES[0]: codes}, "model_version": NAMES[0]},
        "/v1/recommend/batch": {"answers": lists},
        "/v1/events": [{"item": name, "title": name, "event": name, "timestamp": 0} for name in names],
        "/v1/users": names,
        "/v1/items": [{"item": name, "title": name} for name in names],
    }  # fmt: skip


def opened(page: sync_api.Page, name: str, known: dict[str, Any]) -> list[str]:
    """Open a page of the server, which gets these answers by path; what its console says."""
    said: list[str] = []

    def answer(route: sync_api.Route) -> None:
        path = urlsplit(route.request.url).path
        if path in known:
            route.fulfill(json=known[path])
            return
        file = FILES / (path.strip("/") or "index.html")
        route.fulfill(body=file.read_text(), content_type=mimetypes.guess_type(file.name)[0] or "text/plain")

    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.route("**/*", answer)
    page.goto(f"http://server.test/{name}")
    return said


def served(page: sync_api.Page, items: int, heads: tuple[str, ...] = ALL, drawn: str = "pca") -> list[str]:
    """Open the main page with lists of so many items; what its console says."""
    known = answers(items, heads)
    known["/v1/map"] |= {"method": drawn, "variance": 0.5 if drawn == "pca" else None}
    said = opened(page, "", known)
    sync_api.expect(page.locator("#lists")).to_have_attribute("aria-busy", "false")
    sync_api.expect(page.locator(".list")).to_have_count(len(heads))
    return said


def test_the_page_of_routes(page: sync_api.Page) -> None:
    schema = {"content": {"application/json": {"schema": {"title": NAMES[1], "enum": NAMES}}}}
    operation = {"operationId": NAMES[0], "parameters": [{"name": NAMES[1], "schema": {"type": "string"}}]}
    route = {**operation, "requestBody": schema, "responses": {"200": schema}}
    described = {"paths": {f"/v1/{name}": {"get": route} for name in NAMES}}
    opened(page, "docs.html", {"/openapi.json": described})
    sync_api.expect(page.locator("#routes section")).to_have_count(len(NAMES))
    for summary in page.locator("summary").all()[:2]:
        summary.click()
    assert at_every_size(page) == {}


def columns(page: sync_api.Page, width: int) -> list[int]:
    """How many lists stand in each row."""
    page.set_viewport_size({"width": width, "height": 800})
    tops = page.locator(".list").evaluate_all("all => all.filter(e => e.checkVisibility()).map(e => e.offsetTop)")
    return [tops.count(top) for top in sorted(set(tops))]


def test_awkward_names_on_the_servers_page(page: sync_api.Page) -> None:
    said = served(page, items=6)
    page.get_by_label("Known user").fill("a")
    page.locator("#user-options li").nth(0).click()
    for name in (NAMES[0], NAMES[3]):
        page.get_by_label("Add an item").fill(name)
        page.locator("#item-options li", has_text=name).first.click()
    sync_api.expect(page.locator("#history > li")).to_have_count(2)
    sync_api.expect(page.locator("#lists")).to_have_attribute("aria-busy", "false")
    page.locator("#known summary").click()
    for list_ in page.locator(".list").all():
        list_.get_by_role("button", name="Why").nth(2).click()
    assert at_every_size(page) == {}
    assert page.title() != "broken" and page.locator("main img").count() == 0 and said == []
    assert page.locator(".list .title[dir=auto]").count() == 24


@pytest.mark.parametrize(("items", "drawn"), [(0, "pca"), (1, "umap")])
def test_few_items_on_the_servers_page(page: sync_api.Page, items: int, drawn: str) -> None:
    served(page, items, drawn=drawn)
    sync_api.expect(page.locator("#map-note")).to_contain_text(f"Placed by {drawn.upper()}")
    assert at_every_size(page) == {}


def test_the_heads_stand_in_full_rows(page: sync_api.Page) -> None:
    served(page, items=3)
    assert [columns(page, width) for width in WIDTHS] == [[1], [2, 2], [4], [4]]
    page.unroute("**/*")
    served(page, items=3, heads=("fused", "content"))
    assert [columns(page, width) for width in WIDTHS] == [[1], [2], [2], [2]]


def test_on_a_phone_the_heads_are_tabs(page: sync_api.Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    served(page, items=3)
    tabs = page.get_by_role("tab")
    expect = sync_api.expect
    expect(tabs).to_have_text(["Fused", "Content", "Collaborative", "Sequential"])
    expect(page.get_by_role("tabpanel")).to_have_id("list-fused")
    tabs.nth(2).click()
    expect(page.get_by_role("tabpanel")).to_have_id("list-collaborative")
    page.keyboard.press("ArrowRight")
    expect(tabs.nth(3)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tabs.nth(0)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel")).to_have_id("list-sequential")
    assert tabs.nth(0).get_attribute("tabindex") == "-1"
    page.get_by_text("Answer").click()
    page.get_by_label("Leave out what was seen").uncheck()  # asks again: the head that was read stays
    expect(page.locator("#lists")).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("tabpanel")).to_have_id("list-sequential")
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(page.get_by_role("tab")).to_have_count(0)
    expect(page.get_by_role("tabpanel")).to_have_count(0)


def awkward() -> str:
    """A page such as a report or an inspection, of awkward names, many rows and every kind of chart."""
    metrics = ["hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr", "coverage@10"]
    many = [(f"{name} {n}", *["0.1234"] * 8) for n in range(4) for name in NAMES]
    dates = np.arange("2020-01-01", "2020-03-01", dtype="datetime64[D]")
    edges = np.geomspace(1, 1e7, 30)
    parts: list[Part] = [
        PageTable(NAMES[0], ("", *metrics), many[:10], {(0, 1)}),
        PageTable(NAMES[1], ("", *metrics), many),
        PageTable(NAMES[2], ("", *NAMES), [(name, *NAMES) for name in NAMES], {(0, 1)}),
        PageTable("", ("", ""), [(name, name) for name in NAMES]),
        Curves(NAMES[0], "training step", "loss", {name: ([1, 2e6], [1e-3, 3e5]) for name in NAMES}),
        Curves(NAMES[3], "date, UTC", "share", {"a": (dates, np.linspace(0, 1, len(dates)).tolist())}),
        Curves("of one point", "step", "hr", {"a": ([1], [0.5])}),
        Histogram(NAMES[4], "events of the user", "users", edges, 10 ** np.linspace(0, 6, 29), True),
        Histogram("times", "time", "events", 2.0 ** np.arange(30), np.arange(29), True, True),
        Histogram("whole", "events", "items", np.arange(-0.5, 6), np.arange(6)),
        Bars(NAMES[0], NAMES, [1, 10**9, 3, 0, 2.5, 7], NAMES[0]),
    ]
    figures = [Figure(f"best head: {name}", "0.1234 ± 0.0012", name) for name in NAMES]
    full = [Section(name, [name], parts if n == 0 else (), figures if n == 0 else ()) for n, name in enumerate(NAMES)]
    return pages.html(NAMES[2], NAMES, full, first=1)


def one_row() -> str:
    """A page of one row."""
    section = Section("Counts", parts=[PageTable("made", ("", ""), [("events", "1")])])
    return pages.html("one", [], [section], "No problems found.")


def nothing() -> str:
    """A page without a section."""
    return pages.html("nothing", [], [])


@pytest.mark.parametrize("written", [awkward, one_row, nothing])
def test_written_pages(page: sync_api.Page, written: Callable[[], str]) -> None:
    page.set_content(written())
    for details in page.locator("summary").all():
        details.click()
    assert at_every_size(page) == {}
    assert page.title() != "broken" and page.locator("img, script").count() == 0


@pytest.mark.parametrize(
    ("fault", "style"),
    [
        ("cut", "p { white-space: nowrap; overflow: hidden; width: 5rem }"),
        ("overlap", "p + p { margin-top: -1.5rem }"),
        ("contrast", "p { color: #999 }"),
        ("outside", "body { overflow: hidden } p { white-space: nowrap; margin-left: 99rem }"),
        ("the page is", "p { width: 2000px }"),
    ],
)
def test_a_fault_would_be_seen(page: sync_api.Page, fault: str, style: str) -> None:
    text = "<p>some text of a page</p>"
    page.set_content(f"<body style='background: white'>{text}{text}<style>{style}</style>")
    assert any(fault in line for line in faults(page))
    page.set_content(f"<body style='background: white'>{text}{text}")
    assert faults(page) == []
