"""The playground in a real browser: Debian's chromium, driven by playwright.

`make test-browser` installs both. With SCREENSHOTS=DIR pictures of every size are kept there.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saesteer.sae.model.language_model import wrap_model

from .server_help import Served, serving

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser")
    if not Path(CHROMIUM).exists():
        pytest.skip("no chromium: make test-browser")
    with api.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield made
        made.close()


@pytest.fixture(scope="module")
def lively(tiny_lm: Callable[..., tuple[Any, Any]]) -> Iterator[Served]:
    """A server whose model does not end its answers by chance."""
    with serving(wrap_model(*tiny_lm("llama"), "tiny")) as running:
        yield running


@pytest.fixture
def open_page(browser: Any, lively: Served) -> Iterator[Callable[..., Any]]:
    """`open_page("phone", dark=True)`: the playground, ready; it must not say an error."""
    contexts, faults = [], []

    def make(size: str = "desktop", *, dark: bool = False, url: str = "", **rest: Any) -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            **rest,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: said.type == "error" and faults.append(said.text))
        page.goto(url or lively.url)
        page.wait_for_selector("body[data-ready]", timeout=30_000)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not faults


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)


def steer(page: Any) -> None:
    """Switch a plan on, and add a latent by a token that the search shows."""
    if not page.locator("#panel").evaluate("panel => panel.open"):
        page.click("#panel > summary")
    page.get_by_label("one", exact=True).check()
    page.fill("#query", "a")
    page.locator("#found button").first.click()
    page.locator("#chosen li").first.wait_for()
    page.fill("#length", "24")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_two_answers_come_side_by_side_coloured_and_with_their_dose(
    open_page: Callable[..., Any], size: str, dark: bool
) -> None:
    page = open_page(size, dark=dark)
    picture(page, f"{size}-{'dark' if dark else 'light'}-1-empty")
    steer(page)
    page.locator("#plans li").first.scroll_into_view_if_needed()
    picture(page, f"{size}-{'dark' if dark else 'light'}-2-steering")
    if size == "phone":
        page.click("#panel > summary")
    ask(page, "The museum opens at nine.")
    steered, plain = page.locator(".answer.steered"), page.locator(".answer.plain")
    assert steered.locator(".text").inner_text() != plain.locator(".text").inner_text()
    assert "dose" in steered.locator(".facts").inner_text()
    assert "damage" in steered.locator(".facts").inner_text()
    coloured = steered.locator(".text span[style]").count()
    assert steered.locator(".text span").count() >= coloured
    assert page.locator("#legend").is_visible()
    ask(page, "And on Sunday?")
    assert page.locator(".pair").count() == 2
    # Nothing reaches beyond the screen's side.
    wide = page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide <= 0
    picture(page, f"{size}-{'dark' if dark else 'light'}-3-chat")
    left, right = steered.first.bounding_box(), plain.first.bounding_box()
    if size == "desktop":
        assert left["y"] == right["y"] and left["x"] < right["x"]
    else:
        assert left["x"] == right["x"] and left["y"] < right["y"]


def test_damage_is_measured_and_sliders_change_what_is_sent(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.locator("#measure").is_disabled()
    steer(page)
    page.locator("#plans input[type=range]").fill("2")
    page.locator("#chosen input[type=range]").fill("-0.5")
    assert "one ×2.00" in page.locator("#summary").text_content()
    assert "-0.50" in page.locator("#summary").text_content()
    page.click("#measure")
    page.locator("#damage dd").first.wait_for(timeout=60_000)
    assert page.locator("#damage dd").count() == 4
    sent: list[Any] = []
    page.on("request", lambda request: request.post_data and sent.append(request.post_data_json))
    ask(page, "Rain")
    steers = [body["steer"] for body in sent]
    assert [] in steers
    (ours,) = [one for one in steers if one]
    assert ours[0] == {"plan": "one", "times": 2}
    assert (ours[1]["unit"], ours[1]["scale"]) == ("rel", -0.5)


def test_a_link_holds_the_chat_and_the_settings(open_page: Callable[..., Any]) -> None:
    page = open_page()
    steer(page)
    ask(page, "Rain")
    said = page.locator(".answer.steered .text").inner_text()
    page.click("#share")
    page.wait_for_function("location.hash.length > 10")
    other = open_page("phone", url=page.url)
    assert other.locator(".answer.steered .text").inner_text() == said
    assert other.locator(".asked").inner_text() == "Rain"
    assert other.locator("#summary").text_content() == page.locator("#summary").text_content()
    assert other.locator("#length").input_value() == "24"


def test_it_asks_for_the_key_where_there_is_one(
    browser: Any, tiny_lm: Callable[..., tuple[Any, Any]]
) -> None:
    lm = wrap_model(*tiny_lm("llama"), "tiny")
    with serving(lm, with_sae=False, api_key="s3cret") as locked:
        page = browser.new_page()
        page.goto(locked.url)
        page.locator("#key-value").fill("s3cret")
        page.locator("#key button").click()
        page.wait_for_selector("body[data-ready]", timeout=30_000)
        assert page.locator("#plans li").count() == 2
        page.close()


def test_an_answer_can_be_stopped(open_page: Callable[..., Any], lively: Served) -> None:
    page = open_page()
    page.fill("#length", "900")
    page.fill("#prompt", "Go on")
    page.press("#prompt", "Enter")
    page.locator("#stop:not([hidden])").wait_for()
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])", timeout=30_000)
    while lively.app.engine.running:  # the rows leave before the next token
        page.wait_for_timeout(20)
