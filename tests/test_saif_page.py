"""The page of the paper's experiments says what reports say, on reports whose numbers are known."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from saesteer.steering.evaluation.rates import Rate

PAGE = Path(__file__).resolve().parent.parent / "examples" / "saif" / "page.py"
N = 20


@pytest.fixture(scope="module")
def page() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("saif_page", PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["saif_page"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rate(hits: int, n: int = N) -> dict[str, Any]:
    found = Rate.of([True] * hits + [False] * (n - hits))
    return {"value": found.value, "low": found.low, "high": found.high,
            "successes": hits, "n": n}  # fmt: skip


def grade(hits: int) -> list[float]:
    found = rate(hits)
    return [found["value"], found["low"], found["high"]]


def arm(name: str, kind: str, follows: int, strict: int = 0, broken: int = 0) -> dict[str, Any]:
    damage = {
        "kl": 1.25, "delta_ce": 0.5, "top1_agreement": 0.75, "relative_dose": 0.4,
        "right_before": 10, "right_to_wrong": 7, "leaves_norm_range": False,
    }  # fmt: skip
    return {
        "name": name, "kind": kind, "n": N, "follows": grade(follows),
        "strict": grade(strict),
        "degenerate": rate(broken), "relative_dose": 0.4 if kind == "steered" else None,
        "fluency": {"perplexity": 12.5},
        "damage": damage if kind in ("steered", "meandiff", "random") else None,
    }  # fmt: skip


def answers(one: dict[str, Any]) -> list[dict[str, Any]]:
    hits, good = (round(N * one[name][0]) for name in ("follows", "strict"))
    return [
        {"content": "A | <b>\nword", "output": f" {one['name']}\nsays *it*", "follows": i < hits,
         "fluent": i < good, "faithful": True, "strict": i < good,
         "parts": {"fluent": {"reason": "a | loop"}},
         "degenerate": i < one["degenerate"]["successes"]}
        for i in range(N)
    ]  # fmt: skip


def paired(theirs: str, measure: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {
        "ours": "steered", "theirs": theirs, "measure": measure, "difference": value, "low": low,
        "high": high, "p": 0.01, "p_holm": 0.04 if low > 0 else 1.0,
    }  # fmt: skip


def report(task: str, steered: int, prompted: int, over_random: float) -> dict[str, Any]:
    arms = [
        arm("unsteered", "unsteered", 0), arm("prompted", "prompted", prompted, 8),
        arm("steered", "steered", steered, 2, 6),
        arm("steered + prompted", "steered+prompted", 19, 9),
        arm("random latents 1", "random", 2), arm("random latents 2", "random", 4),
        arm("mean difference", "meandiff", 9), arm("logit bias", "logit-bias", 1),
    ]  # fmt: skip
    gain = steered / N
    behind = (steered - prompted) / N
    tests = [
        paired("unsteered", "follows", gain, gain - 0.2, gain + 0.2),
        paired("prompted", "follows", behind, behind - 0.1, behind + 0.1),
        paired("steered + prompted", "follows", -0.35, -0.5, -0.2),
        paired("random", "follows", over_random, over_random - 0.2, over_random + 0.2),
        paired("mean difference", "follows", 0.05, -0.2, 0.3),
        paired("logit bias", "follows", gain - 0.05, gain - 0.2, gain + 0.1),
        paired("unsteered", "strict", 0.1, -0.05, 0.25),
    ]
    plan = {"layer": 20, "latents": [4, 2421], "scale": 1.5, "beta": 0.0, "scope": "all"}
    return {
        "model": {"name": "tiny", "dtype": "float32"}, "graded_by": "programs",
        "tasks": [{
            "task": {"name": task}, "n": N, "seeds": [0], "plans": {"steered": plan},
            "arms": arms, "tests": tests, "notes": ["one note"],
            "answers": {one["name"]: answers(one) for one in arms},
            "sweep": {"warnings": ["the dose is high"]},
        }],
    }  # fmt: skip


def experiment(name: str, follows: dict[str, int]) -> dict[str, Any]:
    arms = [arm(label, "steered", hits) for label, hits in follows.items()]
    arms[-1]["gain"] = {"value": 0.6, "low": 0.4, "high": 0.8}
    settings = {
        "experiment": name, "task": "french", "sae": [{"layer": 20, "d_sae": 64, "k": 4}],
        "read": "last", "by": "saif", "k": 15, "scale": 1.0, "scope": "generation",
        "temperature": 0.7,
    }  # fmt: skip
    return {"settings": settings, "arms": arms}


RANKING: dict[str, Any] = {
    "task": {"name": "french"}, "by": "rate", "read": "reply",
    "discoveries": {"latents": 274, "max_fdr": 0.05},
    "stability": {"by": "meandiff", "k": 15, "contents": {"jaccard": 0.875}},
    "latents": [{
        "id": 2421, "score": 0.798, "rate_positive": 0.9, "rate_negative": 0.1, "mu": 12.3,
        "lens": [" le", "|", "\n"],
    }],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of two tasks, one of which fails; a ranking; two experiments."""
    root = tmp_path_factory.mktemp("saif")
    documents = {
        "report-french/report.json": report("french", 14, 18, 0.55),
        "report-json/report.json": report("json", 3, 8, 0.0),
        "plan-french/ranking.json": RANKING,
        "results/latents-french.json": experiment("latents", {"unsteered": 0, "1 latents": 1,
                                                              "5 latents": 12}),
        "results/beta-french.json": experiment("beta", {"unsteered": 0, "beta -1": 2}),
    }  # fmt: skip
    for name, document in documents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(document), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def text(page: ModuleType, folder: Path) -> str:
    out = folder / "page.md"
    page.main(
        ["--results", str(folder / "results"), "--reports", str(folder / "report-french"),
         str(folder / "report-json"), "--rankings", str(folder / "plan-french"), "-o", str(out)]
    )  # fmt: skip
    return out.read_text(encoding="utf-8")


def section(text: str, start: str) -> str:
    """From a line that begins so to the next heading."""
    return text[text.index(start) :].split("\n## ")[0]


def test_each_rate_stands_under_its_arm(text: str) -> None:
    rates = section(text, "**Follows")
    assert (
        "| task | unsteered | prompted | steered | steered + prompted | random latents | "
        "mean difference | logit bias |"
    ) in rates
    pooled = Rate.of([True] * 2 + [False] * 18 + [True] * 4 + [False] * 16, 2)
    assert (
        f"| french | 0.00 [0.00, 0.16] | 0.90 [0.70, 0.97] | 0.70 [0.48, 0.85] | "
        f"0.95 [0.76, 0.99] | {pooled} | 0.45 [0.26, 0.66] | 0.05 [0.01, 0.24] |"
    ) in rates
    assert pooled.value == pytest.approx(0.15)
    assert "| french | 0.00 [0.00, 0.16] | 0.40 [0.22, 0.61] | 0.10" in text  # strict
    assert "0.30 [0.15, 0.52]" in section(text, "**Degenerate")


def test_gains_are_bold_where_the_interval_excludes_zero(text: str) -> None:
    gains = section(text, "**Steered minus each, follows**")
    assert "| french | **+0.70 [+0.50, +0.90]** \\* | **-0.20 [-0.30, -0.10]** |" in gains
    assert "| json | +0.15 [-0.05, +0.35] |" in gains


def test_the_goal_is_judged_by_the_numbers(text: str) -> None:
    assert "follows 1 of 2 instructions at .5 or more" in text
    assert "On 1 of those" in text and "above zero: french." in text


def test_what_failed_is_said(text: str) -> None:
    failed = section(text, "## What failed")
    for line in (
        "- **json**: the prompted model follows it in 0.40 [0.22, 0.61] only.",
        "- **json**: steering is not shown to beat random latents, follows: +0.00 [-0.20, +0.20].",
        "- **french**: prompting is better, follows: **-0.20 [-0.30, -0.10]**.",
        "- **french**: 30% of the steered answers are degenerate.",
        "- **french**: 7 of 10 neutral questions turn from right to wrong.",
        "- **french**: sweep warned: the dose is high.",
        "- **french**: no strict gain over the unsteered model is shown: +0.10 [-0.05, +0.25].",
    ):
        assert line in failed, line
    assert "**french**: steering is not shown to beat random" not in failed
    assert failed.count("one note.") == 1


def test_claims_stand_beside_measurements(text: str) -> None:
    claims = section(text, "## The paper's claims")
    assert "above .30 in 0 of 2: french 0.10 [0.03, 0.30], json 0.10 [0.03, 0.30]" in claims
    assert "reaches 0 in 0 of 2" in claims
    assert (
        "french, layer 20, read last, by saif, follows: unsteered 0.00, 1 latents 0.05, "
        "5 latents 0.60"
    ) in claims


def test_experiments_have_a_plot_and_a_table(text: str) -> None:
    latents = text[text.index("### latents: french") :].split("\n### ")[0]
    assert "| 5 latents | 0.60 [0.39, 0.78] | +0.60 [+0.40, +0.80] |" in latents
    (line,) = [line for line in latents.splitlines() if line.startswith("5 latents ")]
    drawn = line.removeprefix("5 latents  ")
    # Columns count from 0 at rate 0 to 40 at rate 1.
    assert [drawn.index("●"), drawn.index("─"), drawn.rindex("─")] == [24, 15, 31]
    (axis,) = [line for line in latents.splitlines() if line.strip().startswith("0 ")]
    shift = line.index(drawn)
    assert (axis[shift], axis[shift + 40], axis[shift + 20]) == ("0", "1", ".")


def test_the_first_answers_stand_in_one_line(text: str) -> None:
    cells = ("french", "A \\| &lt;b&gt; word", "prompted says *it* (strict)")
    assert f"| {' | '.join(cells)} | steered says *it* (strict) |" in text


def test_latents_are_listed_with_what_they_say(text: str) -> None:
    latents = section(text, "## Latents")
    assert "| 2421 | 0.798 | 0.900 | 0.100 | 12.3 | `le` `\\|` `'\\n'` |" in latents
    assert "| rate | reply | 274 | – | – | 0.88 |" in latents


def test_other_numbers_give_another_page(
    page: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = folder / "report-changed"
    changed.mkdir()
    (changed / "report.json").write_text(json.dumps(report("french", 9, 18, 0.3)))
    out = folder / "other.md"
    unfinished = folder / "report-later"
    unfinished.mkdir()
    given = [str(path) for path in (changed, folder / "report-french", unfinished)]
    page.main(["--reports", *given, "-o", str(out)])
    assert "left out: " in capsys.readouterr().err
    other = out.read_text(encoding="utf-8")
    assert "french (report-changed)" in other and "french (report-french)" in other
    assert "0.45 [0.26, 0.66]" in section(other, "**Follows")
    assert "## One experiment" not in other and "## Latents" not in other
