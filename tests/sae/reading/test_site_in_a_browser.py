"""The pages in Chromium, opened from disk: search, filters, keys, both schemes, a phone."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.card import TaskMark
from saesteer.sae.reading.result import Latents
from saesteer.sae.reading.site import save_latents
from saesteer.sae.verbs.latents import latents

from .small_sae import config, small_sae

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def found(shared_lm: Callable[..., LanguageModel]) -> Latents:
    lm = shared_lm()
    marks = {9: [TaskMark("french", 1, 0.5, "rate", "runs/french")]}
    return latents(small_sae(lm), lm, config(every=True), tasks=marks)


@pytest.fixture(scope="module")
def site(found: Latents, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser") / "site"
    save_latents(found, folder)
    return folder.as_uri()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty wide page; the test fails when a script or a file of it does."""
    opened = browser.new_page(viewport=WIDE)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("requestfailed", lambda request: wrong.append(request.url))
    opened.on("request", lambda r: r.url.startswith("file:") or wrong.append(f"asked {r.url}"))
    yield opened
    opened.close()
    assert not wrong


def listed(page: Any) -> list[int]:
    return [int(text) for text in page.locator("#latents tbody a").all_inner_texts()]


def test_the_list_searches_filters_and_sorts(page: Any, site: str, found: Latents) -> None:
    page.goto(f"{site}/index.html")
    assert listed(page) == list(range(48))
    assert page.locator("#count").inner_text() == "48 of 48 latents"
    page.fill("#search", "french")
    assert listed(page) == [9]
    page.fill("#search", "")
    page.select_option("#sort", "density")
    page.check("#down")
    by_density = sorted(found.ids, key=lambda latent: -found[latent].density)
    assert listed(page)[0] == by_density[0] and listed(page)[-1] == 5
    page.select_option("#density", "0,0")
    assert listed(page) == [5]
    # The address holds it all.
    page.goto(page.url)
    page.reload()
    assert listed(page) == [5] and page.input_value("#density") == "0,0"
    page.select_option("#density", "")
    page.check("#tasks")
    assert listed(page) == [9]


def test_keys_lead_through_the_pages(page: Any, site: str) -> None:
    page.goto(f"{site}/index.html")
    page.keyboard.press("/")
    page.keyboard.type("french")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/latents/9.html")
    assert page.locator("h1").inner_text() == "Latent 9"
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/latents/10.html")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/latents/9.html")
    page.keyboard.press("i")
    page.wait_for_url("**/index.html")
    for key, expected in (("j", "0"), ("j", "1"), ("k", "0")):
        page.keyboard.press(key)
        assert page.locator("tr.chosen a").inner_text() == expected


def test_a_neighbour_is_a_click_away(page: Any, site: str, found: Latents) -> None:
    page.goto(f"{site}/latents/9.html")
    nearest = found[9].near[0].id
    page.locator(".near a").first.click()
    page.wait_for_url(f"**/latents/{nearest}.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("name", ["index.html", "latents/9.html"])
def test_nothing_hangs_over_and_text_can_be_read(
    name: str, size: dict[str, int], scheme: str, browser: Any, site: str
) -> None:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(f"{site}/{name}")
    page.wait_for_selector("#latents tbody tr" if name == "index.html" else "article.latent")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for selector in ("body", ".quiet", "footer", ".latent .act", ".latent .by", ".index .line"):
        for ratio in page.evaluate(CONTRAST, selector)[:3]:
            assert ratio >= 4.5, (selector, ratio)  # WCAG AA for text of this size
    for ratio in page.evaluate(CONTRAST, ".latent .text b, .index b"):
        assert ratio >= 4.5
    page.close()


CONTRAST = """(selector) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const under = (element) => {  // the colours behind an element, painted over each other
    const chain = [];
    for (let at = element; at; at = at.parentElement) {
      chain.unshift(getComputedStyle(at).backgroundColor);
    }
    const page = document.createElement("div");
    page.style.backgroundColor = "Canvas";
    document.body.append(page);
    canvas.fillStyle = getComputedStyle(page).backgroundColor;
    page.remove();
    canvas.fillRect(0, 0, 1, 1);
    for (const colour of chain) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (rgb) => {
    const [r, g, b] = [...rgb].slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll(selector)].map((element) => {
    const below = light(under(element));
    canvas.fillStyle = getComputedStyle(element).color;
    canvas.fillRect(0, 0, 1, 1);
    const text = light(canvas.getImageData(0, 0, 1, 1).data);
    return (Math.max(text, below) + 0.05) / (Math.min(text, below) + 0.05);
  });
}"""
