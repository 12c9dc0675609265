"""The report: nothing from outside, every figure of the document, and a look in a browser."""

import copy
import html.parser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from saesteer.sae.reports.svg import COLOURS
from saesteer.steering.reports.evaluation_report import render_html

RATE = {"value": 0.5, "low": 0.31, "high": 0.69, "successes": 10, "n": 20}


def arm(name: str, kind: str, damaged: bool = False) -> dict[str, Any]:
    damage = {
        "kl": 1.234, "kl_reverse": 0.7, "top1_agreement": 0.81, "delta_ce": 0.9,
        "relative_dose": 0.4, "right_before": 20, "right_to_wrong": 3, "wrong_to_right": 1,
    }  # fmt: skip
    return {
        "name": name, "kind": kind, "n": 20, "seeds": 1,
        **dict.fromkeys(("follows", "fluent"), [RATE["value"], RATE["low"], RATE["high"]]),
        "faithful": None, "strict": None,
        "success": {"measure": "follows and fluent", **RATE},
        "degenerate": RATE, "undetermined": RATE,
        "instructed": {"log_prob": -2.75, "gain": 0.625},
        "overlap": {"with": "the prompted answer", "floor": 0.125, "above_floor": RATE},
        "thresholds": {"real_words": 0.9, "nats": [1.5, 6.25], "content": "translation"},
        "relative_dose": 0.4 if damaged else None,
        "fluency": {
            "perplexity": 34.5, "distinct_2": 0.9, "repetition": 0.1, "zlib_ratio": 0.8,
            "truncated": 0.25,
        },
        "damage": damage if damaged else None,
    }  # fmt: skip


def setting(k: int, scale: float, kl: float, loose: float) -> dict[str, Any]:
    return {
        "plan": "", "layer": 20, "k": k, "beta": 0.0, "scale": scale, "scope": "all", "n": 12,
        "relative_dose": 0.2 * scale, "damage": {"kl": kl},
        "success": {"measure": "strict", **RATE, "value": loose},
        "latest": True, "on_front": loose > 0.3,
    }  # fmt: skip


def answer(text: str, follows: bool) -> dict[str, Any]:
    return {
        "content": "The <soup> & the bread.", "output": text, "follows": follows,
        "fluent": follows, "faithful": None, "strict": None, "degenerate": False,
        "parts": {"fluent": {"reason": "50% of its words exist"}, "faithful": {"reason": ""}},
    }  # fmt: skip


TASK: dict[str, Any] = {
    "task": {
        "name": "french", "instruction": "Translate the sentence to French.",
        "check": "translation", "max_new_tokens": 48,
    },
    "split": "test", "n": 2, "seeds": [0], "decoding": {"temperature": 0.7},
    "plans": {
        "steered": {
            "layer": 20, "site": "resid_post", "latents": [4, 2421], "k": 2, "method": "add",
            "lens": [[" le", " la", "\n"], []], "unit": "raw", "scale": 1.5, "beta": 0.0,
            "scope": "all", "delta_norm": 61.5,
        }
    },
    "arms": [
        arm("unsteered", "unsteered"), arm("prompted", "prompted"),
        arm("steered", "steered", True), arm("random latents 1", "random", True),
    ],
    "tests": [
        {
            "ours": "steered", "theirs": "unsteered", "measure": "follows and fluent",
            "difference": 0.45,
            "low": 0.2, "high": 0.7, "wins": 9, "losses": 0, "p": 0.0039, "p_holm": 0.0234,
        }
    ],
    "notes": ["a <note>"],
    "grades": {"not_graded": {"faithful": "no <dictionary>", "strict": "not graded either"}},
    "sweep": {
        "trials": [
            setting(1, 1.0, 0.2, 0.1), setting(1, 2.0, 0.6, 0.4), setting(3, 1.0, 0.5, 0.3),
            setting(3, 2.0, 1.4, 0.8),
        ],
        "budget": {"kind": "kl", "limit": 1.5}, "skipped": [{}, {}],
        "chosen": setting(3, 2.0, 1.4, 0.8), "unsteered": {"success": {**RATE, "value": 0.0}},
    },
    "stability": {
        "by": "saif", "k": 15,
        "variants": {
            "parts": ["Use <French>, " + 40 * "x", "In French"], "jaccard": 0.42,
            "jaccard_lowest": 0.17, "spearman": 0.8, "spearman_lowest": -0.1,
            "jaccard_pairs": [[1.0, 0.42], [0.42, 1.0]],
            "spearman_pairs": [[1.0, -0.1], [-0.1, 1.0]],
        },
        "contents": {
            "parts": ["1", "2"], "jaccard": 0.9, "jaccard_lowest": 0.77, "spearman": 0.95,
            "spearman_lowest": 0.93,
        },
    },
    "shuffled": {
        "by": "saif", "test": "mcnemar", "k": 15, "shuffles": 20,
        **{
            name: {"real": 0.92, "mean": 0.11, "highest": 0.19}
            for name in ("best", "last", "best_auroc", "discoveries", "overlap")
        },
    },
    "answers": {
        name: [answer(f"{name} says <b>oui</b>", True), answer("", False)]
        for name in ("unsteered", "prompted", "steered", "random latents 1")
    },
}  # fmt: skip

DOCUMENT: dict[str, Any] = {
    "schema_version": 2,
    "model": {"name": "tiny<1>", "hash": "abc", "dtype": "float32"},
    "graded_by": "programs (not a language model)",
    "judge": None,
    "tasks": [TASK],
    "ifeval": None,
}


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and keeps what would fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "link", "iframe", "object", "image"):
            self.fetched.append(tag)
        targets = [v or "" for name, v in attrs if name in ("src", "href", "xlink:href")]
        self.fetched += [target for target in targets if not target.startswith("#")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing() -> None:
    text = render_html(DOCUMENT)
    page = Page(text)
    assert page.fetched == []
    assert "url(" not in text and "@import" not in text
    assert len(re.findall("<svg", text)) == 5  # follows, fluent, Pareto, dose, wordings


def test_what_others_wrote_is_shown_and_not_run() -> None:
    page = Page(render_html(DOCUMENT))
    for said in (
        "steered says <b>oui</b>",
        "The <soup> & the bread.",
        "Note: a <note>",
        "(nothing)",
    ):
        assert said in page.text
    assert "b" not in {tag for tag in page.open}


def test_the_figures_are_those_of_the_document() -> None:
    page = " ".join(Page(render_html(DOCUMENT)).text)
    for figure in (
        "0.50 [0.31, 0.69]", "+0.45 [+0.20, +0.70]", "0.0039", "0.023", "1.23", "34.5", "3 of 20",
        "0.42", "-0.10", "top 15", "9 / 0", "61.5", "4 (le la '\\n'), 2421; add",
        "best saif 0.11 (at most 0.19) against 0.92", "that differ (mcnemar) 0.11",
        "Jaccard 0.90 on average, at least 0.77",
        "follows 0.50 [0.31, 0.69], fluent 0.50 [0.31, 0.69], faithful –, strict –",
        "over unsteered", "faithful: no <dictionary>", "nats 1.5 to 6.25", "-2.75", "0.625",
        "Overlap with the prompted answer, no grade", "unsteered 0.12",
        "does not follow, not fluent (50% of its words exist)",
        "is kl 1.5; 2 settings over it",
    ):  # fmt: skip
        assert figure in page, figure


def test_old_documents_without_their_making_are_drawn() -> None:
    assert "made" not in DOCUMENT
    made = {"date": "2026-11-27", "versions": {"saesteer": "0.1.0"}, "command": "saesteer evaluate"}
    page = " ".join(Page(render_html({**DOCUMENT, "made": made})).text)
    assert "command: saesteer evaluate" in page and "date: 2026-11-27" in page
    assert "weights abc" in page and "saesteer: 0.1.0" in page


def test_every_answer_is_there_and_has_its_filters() -> None:
    text = render_html(DOCUMENT)
    for place, arm in enumerate(TASK["arms"]):
        assert len(re.findall(rf'class="card \w+ of-{place}"', text)) == TASK["n"], arm["name"]
        assert f'class="arm-{place}"' in text
        assert f".answers:has(.arm-{place}:not(:checked)) .card.of-{place} " in text
    # Random latents are there, but not shown at first.
    assert re.search(r'class="arm-2" checked', text) and not re.search(
        'class="arm-3" checked', text
    )
    for grade in ("strict", "follows", "fails"):
        assert f".answers:has(.by-{grade}:checked) .card:not(.{grade}) " in text


def test_an_arm_has_one_colour_in_all_charts() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["tasks"][0]["sweep"] = None
    text = render_html(document)
    scatter = text[text.index("Success against KL") :]
    random = COLOURS[7]
    assert re.search(rf'fill="{random}"[^>]*><title>random latents 1', scatter)
    assert text.count(f'fill="{random}"') >= 4  # two charts of bars, the point and its legend


def test_several_tasks_get_an_overview_and_a_judge_is_named() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["tasks"].append(copy.deepcopy(TASK))
    document["tasks"][1]["task"]["name"] = "german"
    document["tasks"][1]["sweep"] = document["tasks"][1]["stability"] = None
    document["judge"] = "some-judge"
    for one in document["tasks"][0]["arms"]:
        one["judged"] = {"n": 20, "loose": RATE, "strict": RATE}
    page = " ".join(Page(render_html(document)).text)
    overview = page[page.index("All tasks, success") :].split("“")[0]
    for name in ("french", "german", "prompted", "random latents"):
        assert f" {name} " in overview.replace("\n", " "), name
    # One of two answers of the only draw follows and is fluent.
    assert "0.50 [0.09, 0.91]" in overview
    assert "language model some-judge" in page and "judge: strict" in page


def test_the_agreement_of_two_parts_stands_above_the_diagonal_and_below_it() -> None:
    page = " ".join(Page(render_html(DOCUMENT)).text)
    wordings = page[page.index("variants") :]
    assert re.search(r"1\. Use <French>, x+… 1\.00 0\.42 2\. In French -0\.10 1\.00", wordings)


def test_ifeval_is_shown_by_arm_and_by_type() -> None:
    scores = {
        key: RATE
        for key in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    }
    by_type = {"punctuation:no_comma": {"strict": RATE, "loose": RATE}}
    document = {**DOCUMENT, "tasks": [], "ifeval": {
        "prompts": 20, "stand_ins": {"a:b": "something else"}, "tests": TASK["tests"],
        "arms": {"prompted": {"scores": {**scores, "by_type": by_type}}},
    }}  # fmt: skip
    page = " ".join(Page(render_html(document)).text)
    assert "steered − unsteered" in page and "+0.45 [+0.20, +0.70]" in page
    assert "punctuation:no_comma" in page and "a:b: judged with something else." in page


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.skipif(not BROWSER, reason="no chromium installed")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render_html(DOCUMENT), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,2400",
        f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.is_file(), done.stderr[-2000:]
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1000, 2400)
    # A blank page of this size compresses to a tenth of this.
    assert len(data) > 60_000
