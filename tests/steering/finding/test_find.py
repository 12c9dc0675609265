"""The whole search on a tiny model, its stages, its report and its files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.checks.registry import Verdict
from saesteer.steering.finding.find import FindConfig, find
from saesteer.steering.finding.found import LATENT_FOLDER, Found, budget_problems, save_found
from saesteer.steering.finding.phases import ReadConfig
from saesteer.steering.finding.scoring import Mark, Scale, Score, Scorer
from saesteer.steering.finding.search import Search, SearchConfig
from saesteer.steering.finding.setting import Proposals, Setting
from saesteer.steering.grades.faithful import Faithful
from saesteer.steering.grades.fluent import Fluent
from saesteer.steering.grades.grade import Grader, Grades
from saesteer.steering.hooking.generation import generate_steered
from saesteer.steering.plans.plan_file import load_plan

from ..whole_row import make_sae
from .small_task import TASK
from .test_setting import made_up

pytest.importorskip("optuna", reason="the search needs Optuna")


CONFIG = FindConfig(
    budget_minutes=1e-3,
    read=ReadConfig(contents=8, wordings=2, reply_wordings=1, max_new_tokens=4),
    search=SearchConfig(first=2, more=2, rows=12, finalists=2),
    dev=4,
    test=8,
    latents=4,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_CACHE", str(tmp_path / "cache"))


def scorer_of(lm: LanguageModel, contents: int = 4) -> Scorer:
    dev = TASK.contents["dev"][:contents]
    greedy = replace(CONFIG, temperature=0.0).decoding
    return Scorer(lm, TASK, dev, Grader(TASK), greedy, TASK.instruction)


@pytest.fixture
def found(lm: LanguageModel) -> Found:
    saes = [make_sae(lm, layer=layer, seed=layer) for layer in (1, 2)]
    return find(lm, TASK, saes, replace(CONFIG, when=True, side_by_side=True))


def test_everything_is_reported_and_written(
    found: Found, lm: LanguageModel, tmp_path: Path
) -> None:
    document = save_found(tmp_path, found)
    assert json.loads((tmp_path / "find.json").read_text()) == json.loads(json.dumps(document))
    arms = list(document["arms"])
    controls = ["tail_only", "replies_only"] if found.chosen.setting.phases == "both" else []
    assert arms[-2 - len(controls) :] == [*controls, "random", "steered+prompted"]
    assert arms[: -2 - len(controls)] == [
        "unsteered", "prompted", "mean_difference", "steered", "directions_at_saes",
        "steered_latents",
    ]  # fmt: skip
    for arm in document["arms"].values():
        for grade in ("follows", "fluent", "faithful", "strict"):
            if arm[grade] is not None:
                rate, low, high = arm[grade]
                assert 0 <= low <= rate <= high <= 1
        assert arm["n"] >= 6 or arm["n"] == len(TASK.contents["test"])
    assert {"steered", "steered_latents", "steered_without_condition"} == set(document["damage"])
    stages = [row["stage"] for row in document["tried"]]
    assert {"scan", "final"} <= set(stages) and document["when"]["layer"] >= 0
    plan = load_plan(tmp_path)
    assert plan.when is not None and plan.task is not None and plan.task.name == "lists"
    assert plan.metrics["find"]["over_budget"] == list(found.problems)
    latents = load_plan(tmp_path / LATENT_FOLDER)
    assert {part.layer for part in latents.parts} == {1, 2}
    assert all(part.sae.source == "somewhere" for part in latents.parts)
    generate_steered(lm, ["Peter bought nine oranges."], latents, max_new_tokens=2)


@pytest.mark.slow
def test_the_same_seed_finds_the_same_plan(found: Found, lm: LanguageModel) -> None:
    saes = [make_sae(lm, layer=layer, seed=layer) for layer in (1, 2)]
    again = find(lm, TASK, saes, replace(CONFIG, when=True))
    assert again.chosen.setting == found.chosen.setting
    assert [one.score.value for one in again.tried] == [one.score.value for one in found.tried]


@pytest.mark.slow
def test_a_model_without_a_chat_template(lm_of: Any) -> None:
    found = find(lm_of("gpt2", chat=False), TASK, config=CONFIG)
    scopes = {part.scope for part in found.plan.parts}
    assert scopes <= {"last-prompt", "replies"} and found.latents is None


def test_settings_as_rows_answer_as_each_does_alone(lm: LanguageModel) -> None:
    scorer = scorer_of(lm)
    proposals = Proposals(lm, TASK, made_up(lm))
    settings = [
        Setting((0, 1, 2, 3), 1.25, (1, 2), 0.5),
        Setting((2,), 0.5, (), 0.0, "add"),
        Setting((), 0.0, (3,), 1.0, schedule="opening only"),
        Setting((1, 3), 2.0, (0, 1, 2), 0.2, "add", "close"),
    ]
    plans = [proposals.plan(setting) for setting in settings]
    together = scorer.scores(plans, range(3), "together")
    for plan, score in zip(plans, together, strict=True):
        alone = generate_steered(lm, list(scorer.contents[:3]), plan, max_new_tokens=4)
        assert [mark.output for mark in score.marks] == [answer.completion for answer in alone]


def test_the_search_goes_on_until_its_time_is_over(lm: LanguageModel) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    proposals = Proposals(lm, TASK, made_up(lm))
    config = SearchConfig(first=2, more=2, rows=8, finalists=2)
    search = Search(scorer_of(lm), proposals, config, clock)
    search.run(until=12.0)
    batches, width = len(search.tried) / 4, 4
    assert batches >= 3 and len(search.tried) % width == 0
    kinds = {one.stage for one in search.tried}
    assert kinds <= {"first", "search"}
    assert all(len(one.score.marks) == (2 if one.stage == "first" else 4) for one in search.tried)
    finals = search.finals()
    assert len(finals) == 2 and finals[0].score.value >= finals[1].score.value
    best = max(one.score.value for one in search.tried if one.stage == "search")
    assert any(
        one.stage == "search" and one.score.value == best and one.setting in
        [final.setting for final in finals] for one in search.tried
    )  # fmt: skip


def marks(*rows: tuple[bool, bool | None, bool | None, float]) -> tuple[Mark, ...]:
    """Answers with these grades (follows, fluent, faithful) and nats per token; fluent None is a
    loop."""
    return tuple(
        Mark(
            "a",
            "b",
            Grades(
                follows,
                Verdict.PASS,
                Fluent(bool(fluent), "", fluent is None),
                Faithful(faithful, ""),
            ),
            nats,
        )
        for follows, fluent, faithful, nats in rows
    )


SCALE = Scale(plain=2.0, own=1.0)


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ((True, True, True, 1.0), 1.0),
        ((True, True, False, 2.0), (1 + math.exp(-1)) / 4),  # as likely as plain answers
        ((True, True, None, 3.0), (3 + math.exp(-2)) / 4),  # cannot be told: counts as strict
        ((True, False, True, 1.0), 1.5 / 4),  # follows in words that do not exist
        ((True, None, True, 0.1), 0.0),  # a loop is likely, and worth nothing
        ((False, True, True, 0.5), 0.125),  # likelier than the model's own: no more than 1/8
        ((False, True, True, 2.0), 0.0),  # plain
    ],
)
def test_the_value_of_an_answer(row: Any, value: float) -> None:
    assert Score(marks(row), SCALE).value == pytest.approx(value)


def test_what_is_over_the_budget_is_said() -> None:
    good = Score(marks(*[(True, True, True, 1.0)] * 4), SCALE)
    worse = Score(marks(*[(True, True, False, 1.0)] * 2, *[(True, True, True, 1.0)] * 2), SCALE)
    assert budget_problems(good, good, 0.15) == []
    (said,) = budget_problems(worse, good, 0.15)
    assert said.startswith("faithful: 0.50 against 1.00 prompted")
    assert budget_problems(worse, good, 0.5) == []


def test_settings_that_cannot_be(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="`budget_minutes` must be above 0"):
        FindConfig(budget_minutes=0.0)
    with pytest.raises(UserError, match="has no check, so no answer can be graded"):
        find(lm, replace(TASK, check_name=None))
    with pytest.raises(UserError, match="names two SAEs of one layer"):
        find(lm, TASK, [make_sae(lm), make_sae(lm, seed=1)], CONFIG)
    assert torch.is_grad_enabled()
