"""The web page in headless Chromium, against the real server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
import uvicorn

from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.service import Service
from tests.conftest import CHROMIUM

if TYPE_CHECKING:
    from playwright import sync_api
else:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the page is tested with playwright, which is not here"
    )
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser: {CHROMIUM} is not there")
expect = sync_api.expect
HOSTILE = "<img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(create_app(Service(exported)), log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture
def told() -> list[str]:
    """What the browser's console says."""
    return []


@pytest.fixture
def page(server: str, browser: sync_api.Browser, told: list[str]) -> Iterator[sync_api.Page]:
    """The page, opened. Afterwards: it asked nobody but the server, and the console stayed empty."""
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(server)
    expect(page.locator(".list ol")).to_have_count(4)
    yield page
    page.close()
    assert all(url.startswith(server + "/") for url in asked)
    assert told == []


def titles(page: sync_api.Page, head: str) -> list[str]:
    return page.locator(f".list.head-{head} li .head .title").all_inner_texts()


def settled(page: sync_api.Page, status: str) -> None:
    expect(page.locator("#status")).to_have_text(status)
    expect(page.locator("#lists")).to_have_attribute("aria-busy", "false")


def pick(page: sync_api.Page, user: str) -> None:
    page.get_by_label("Known user").fill(user)
    page.get_by_role("option", name=user, exact=True).click()
    settled(page, f"For {user}")


def add(page: sync_api.Page, text: str) -> None:
    page.get_by_label("Add an item").fill(text)
    page.locator("#item-options li", has_text=text).first.click()


def test_a_user_is_picked_and_each_head_answers(page: sync_api.Page, server: str) -> None:
    pick(page, "u7")
    for head in ("fused", "content", "collaborative", "sequential"):
        answer = httpx2.post(f"{server}/v1/recommend", json={"user": "u7", "head": head}).json()
        assert titles(page, head) == [item["title"] for item in answer["items"]]


def test_a_composed_history_changes_the_lists(page: sync_api.Page) -> None:
    before = titles(page, "sequential")
    add(page, "i10")
    settled(page, "For someone new with this history")
    one = titles(page, "sequential")
    add(page, "i20")
    expect(page.locator("#history li")).to_have_count(2)
    first, second = page.locator("#history .title").all_inner_texts()
    page.get_by_label(f"Move up {second}").click()
    expect(page.locator("#history .title").first).to_have_text(second)
    page.get_by_label(f"Remove {second}").click()
    expect(page.locator("#history .title")).to_have_text([first])
    settled(page, "For someone new with this history")
    expect(page.locator(".list.head-sequential li .head .title")).to_have_text(one)
    assert one != before


def test_why_opens(page: sync_api.Page) -> None:
    pick(page, "u7")
    page.locator(".list.head-fused").get_by_role("button", name="Why").first.click()
    why = page.locator("#why-fused-0")
    expect(why).to_contain_text("Shares of the fused score")
    expect(why).to_contain_text("Nearest in the history")
    score = page.locator(".list.head-fused li .head .score").first.inner_text()
    expect(why).to_contain_text(f"together the fused score {score}")


def test_the_map_is_drawn_and_tells_titles(page: sync_api.Page, server: str) -> None:
    items = httpx2.get(f"{server}/v1/map").json()["of"]
    expect(page.locator("#map-note")).to_contain_text(f"{items} items; 0 of 0 of the history")
    coloured = """canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const found = new Set();
        for (let n = 0; n < data.length; n += 4) if (data[n + 3]) found.add(`${data[n]},${data[n + 1]},${data[n + 2]}`);
        return found.size;
    }"""
    canvas = page.locator("#map")
    assert canvas.evaluate(coloured) > 5
    before = canvas.screenshot()
    pick(page, "u7")
    expect(page.locator("#map-note")).to_contain_text("10 of 10 recommended")
    assert canvas.screenshot() != before
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    for step in range(20):
        page.mouse.move(box["x"] + box["width"] * (0.3 + step / 50), box["y"] + box["height"] / 2)
        if page.locator("#tip").is_visible():
            break
    expect(page.locator("#tip")).to_contain_text("The ")


def test_titles_are_text_whatever_they_hold(page: sync_api.Page, server: str) -> None:
    genre = httpx2.get(f"{server}/v1/catalogue").json()["features"]["genre"][0]
    added = httpx2.post(f"{server}/v1/items", json={"item": "<b>", "title": HOSTILE, "features": {"genre": genre}})
    assert added.status_code == 200
    page.get_by_label("Items", exact=True).fill("100")
    page.locator("#filters select[name=genre]").select_option(genre)
    expect(page.locator(".list li .head .title", has_text=HOSTILE)).to_have_count(4)
    add(page, HOSTILE)
    expect(page.locator("#history .title")).to_have_text(HOSTILE)
    assert page.locator("main img").count() == 0 and page.title() != "broken"


def test_what_a_user_did_changes_the_next_answer(page: sync_api.Page) -> None:
    pick(page, "u9")
    done = titles(page, "fused")[0]
    page.get_by_label(f"The user did this: {done}").first.click()
    expect(page.locator(".list.head-fused li .head .title").first).not_to_have_text(done)
    page.locator("#known summary").click()
    expect(page.locator("#known-events li").first).to_contain_text(done)


def test_errors_are_told_in_the_servers_words(page: sync_api.Page, told: list[str]) -> None:
    user = page.get_by_label("Known user")
    user.fill("u7x")
    user.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("user 'u7x': not known; did you mean 'u7'?")
    expect(page.locator(".list")).to_have_count(0)  # nothing stale is left
    page.route("**/v1/recommend/batch", lambda route: route.abort())
    user.fill("u7")
    user.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    page.unroute("**/v1/recommend/batch")
    user.press("Enter")
    settled(page, "For u7")
    expect(page.get_by_role("alert")).to_be_hidden()
    told[:] = [text for text in told if not text.startswith("Failed to load resource")]  # the two made to fail


def test_an_older_answer_never_replaces_a_newer_one(page: sync_api.Page) -> None:
    held = []
    page.route("**/v1/recommend/batch", lambda route: held.append(route), times=1)
    page.get_by_label("Known user").fill("u7")
    page.get_by_label("Known user").press("Enter")
    expect(page.locator("#lists")).to_have_attribute("aria-busy", "true")
    pick(page, "u8")
    shown = titles(page, "fused")
    for route in held:
        route.continue_()
    page.wait_for_load_state("networkidle")
    settled(page, "For u8")
    assert titles(page, "fused") == shown


def test_by_keyboard_alone(page: sync_api.Page) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Known user")).to_be_focused()
    page.keyboard.type("u12")
    expect(page.locator("#user-options li").first).to_have_text("u12")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    settled(page, "For u12")
    page.locator("#results").focus()
    page.keyboard.press("Tab")
    expect(page.locator(".list.head-fused").get_by_role("button", name="Why").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#why-fused-0")).to_be_visible()


def test_a_narrow_screen_needs_no_sideways_scrolling(page: sync_api.Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    pick(page, "u7")
    add(page, "i10")
    page.locator(".list.head-fused").get_by_role("button", name="Why").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
