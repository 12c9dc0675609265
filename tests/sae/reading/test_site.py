"""The pages: what is in the folder, links that lead somewhere, and text that stays text."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.card import Description, Detection, TaskMark
from saesteer.sae.reading.result import Latents
from saesteer.sae.reading.site import save_latents
from saesteer.sae.verbs.latents import latents

from .small_sae import config, small_sae

BAD = "</script><b onmouseover=alert(1)> & \u2028"


class Page(HTMLParser):
    """The links, tags and text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self.links += [given[name] or "" for name in ("href", "src") if name in given]
        if tag not in ("meta", "link", "input", "line", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect"):
            assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def found(shared_lm: Callable[..., LanguageModel]) -> Latents:
    lm = shared_lm()
    mark = TaskMark(f"task {BAD}", 1, 0.25, "rate", "runs/plan")
    read = latents(small_sae(lm), lm, config(ids=(3, 5, 40)), tasks={40: [mark]})
    said = Description(f"words {BAD}", "a-model", Detection(4, 3, 4, 2, 1))
    return replace(read, described={40: said})


@pytest.fixture(scope="module")
def site(found: Latents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "site"
    save_latents(found, folder)
    return folder


def index_rows(site: Path) -> list[list[Any]]:
    text = (site / "latents-data.js").read_text(encoding="utf-8")
    assert text.startswith("window.LATENTS=") and text.endswith(";\n")
    rows: list[list[Any]] = json.loads(text[len("window.LATENTS=") : -2])
    return rows


def test_the_folder_holds_what_is_promised(site: Path, found: Latents) -> None:
    assert {path.name for path in site.iterdir()} == {
        "index.html", "latents.css", "latents.js", "latents-data.js", "latents", "latents.json",
        "latents.jsonl", "neuronpedia",
    }  # fmt: skip
    assert sorted(path.name for path in (site / "latents").iterdir()) == [
        "3.html", "40.html", "5.html",
    ]  # fmt: skip
    document = json.loads((site / "latents.json").read_text())
    assert document["ids"] == [3, 5, 40] and document["latents"] == 3
    assert document["tokens"] == found[3].rows and document["layer"] == 1
    assert Path(document["page"]) == site / "index.html"


def test_lines_of_latents_jsonl_are_the_cards(site: Path, found: Latents) -> None:
    lines = (site / "latents.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [3, 5, 40]
    for row in rows:
        card = found[row["id"]]
        assert row["density"] == card.density
        assert row["max"] == pytest.approx(card.max, rel=1e-3)
        assert row["lens_up"] == [one.token for one in card.lens_up]
        assert row["lens_down"] == [one.token for one in card.lens_down]
        assert [one["index"] for one in row["top"]] == [one.index for one in card.top]
        for ours, theirs in zip(row["top"], card.top, strict=True):
            assert ours["tokens"] == list(theirs.tokens)
            assert ours["acts"] == pytest.approx(theirs.acts, rel=1e-3)
    assert rows[2]["tasks"][0]["rank"] == 1 and rows[0]["steered"]["dose"] == 0.5
    assert rows[2]["descriptions"][0]["detection"]["score"] == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_links_lead_to_files(site: Path) -> None:
    pages = [site / "index.html", *(site / "latents").iterdir()]
    for page in pages:
        links = Page(page.read_text(encoding="utf-8")).links
        assert links
        for link in links:
            assert (page.parent / link).is_file(), (page, link)
            assert not re.match(r"[a-z]+:|//", link)  # nothing from elsewhere
    assert "3.html" in Page((site / "latents/5.html").read_text()).links
    assert "40.html" in Page((site / "latents/5.html").read_text()).links


def test_text_of_others_stays_text(site: Path) -> None:
    text = (site / "latents/40.html").read_text(encoding="utf-8")
    page = Page(text)
    assert f"words {BAD}" in page.text and f"task {BAD}" in page.text
    assert not any("onmouseover" in given for _, given in page.tags)
    (row,) = [row for row in index_rows(site) if row[0] == 40]
    assert row[6] == f"words {BAD}" and row[5] == [f"task {BAD} 1"]


def test_a_page_can_be_read_without_its_script(site: Path, found: Latents) -> None:
    page, card = Page((site / "latents/40.html").read_text(encoding="utf-8")), found[40]
    # Each firing token of a context is marked, and no other.
    marks = [given for tag, given in page.tags if tag == "b"]
    contexts = [*card.top, *(one for part in card.quantiles for one in part.contexts)]
    assert len(marks) == sum(act != 0 for one in contexts for act in one.acts)
    peaks = [given for given in marks if "p" in (given.get("class") or "").split()]
    assert len(peaks) == len(contexts)
    for wanted in (
        "Strongest contexts",
        "Tokens it raises",
        "Tokens it lowers",
        "Activations",
        "Nearest by direction",
        "Fires together with",
        "Rankings that hold it",
    ):
        assert wanted in page.text
    assert f"{card.fired:,} of {card.rows:,} tokens" in page.text
    assert "by log-odds; no model was asked" in page.text  # says what it is
    assert "detection 0.62" in page.text and "described by a-model" in page.text
    assert "It never fires on this text." in (site / "latents/5.html").read_text()


def test_the_list_has_a_row_for_each(site: Path, found: Latents) -> None:
    rows = index_rows(site)
    assert [row[0] for row in rows] == [3, 5, 40]
    card = found[3]
    assert rows[0][1] == pytest.approx(card.density, rel=1e-3)
    best = card.top[0]
    assert rows[0][8].strip() == best.tokens[best.index].strip()
    assert card.telling[0].token in rows[0][10] if card.telling else True
    text = (site / "index.html").read_text()
    assert "3 of 48 latents of made-up, at layer 1 (resid_post) of tiny-llama" in text
    assert 'id="tasks"' in text  # there is a ranking to filter by


def test_a_card_in_a_notebook_is_whole(found: Latents) -> None:
    html = found[40]._repr_html_()
    assert html.startswith("<style>") and 'class="latent"' in html
    page = Page(html.partition("</style>")[2])
    assert not page.links  # nothing beside it to link to
    assert len(html) < 60_000
