"""Comparisons: which arms there are, which tests were announced, what is written of them."""

import dataclasses
import json

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.evaluation.arms import Decoding
from saesteer.steering.evaluation.compare import (
    CompareConfig,
    compare,
    comparison_document,
    paired_tests,
)
from saesteer.steering.evaluation.damage import NeutralProbe, Question
from saesteer.steering.evaluation.graded_arms import Answer, Arm
from saesteer.steering.evaluation.letters import Letter
from saesteer.steering.grades.faithful import Faithful
from saesteer.steering.grades.fluent import Fluent
from saesteer.steering.grades.grade import Grades
from saesteer.steering.plans.plan import Plan
from saesteer.steering.reports.evaluation_report import _plan_line
from saesteer.steering.tasks.task import Task

from ..small_plans import CONTENTS, TASK, small_plan, small_sae


@pytest.fixture
def plan(lm: LanguageModel) -> Plan:
    return small_plan(lm, (2, 0), sigma=None, source="nowhere")


@pytest.fixture
def sae(lm: LanguageModel) -> SAE:
    return small_sae(lm, 9)


@pytest.fixture(autouse=True)
def _few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    from saesteer.steering.evaluation import compare as comparison

    few = [Question("What is it?", ("it",)), Question("Who?", ("me",))]
    monkeypatch.setattr(
        comparison, "NeutralProbe", lambda lm: NeutralProbe(lm, few, max_new_tokens=3)
    )


GREEDY = CompareConfig(n=2, decoding=Decoding(temperature=0.0))


def test_every_control_is_an_arm(lm: LanguageModel, plan: Plan, sae: SAE) -> None:
    found = compare(lm, TASK, {"steered": plan}, GREEDY, sae=sae)
    assert [(arm.name, arm.kind) for arm in found.arms] == [
        ("unsteered", "unsteered"),
        ("prompted", "prompted"),
        ("steered", "steered"),
        ("steered + prompted", "steered+prompted"),
        ("random latents 1", "random"),
        ("random latents 2", "random"),
        ("mean difference", "meandiff"),
        ("logit bias", "logit-bias"),
    ]
    prompts = {arm.name: [a.prompt for a in arm.answers] for arm in found.arms}
    asked = [f"{content}\nSelect one" for content in CONTENTS[:2]]
    for name, given in prompts.items():
        assert given == (asked if "prompted" in name else list(CONTENTS[:2]))
    # Edits of one length, wherever they point.
    doses = [found.damage[arm.name].relative_dose for arm in found.arms if arm.name in found.damage]
    assert len(doses) == 4 and doses == pytest.approx([doses[0]] * 4, rel=1e-4)
    assert found.notes == ()
    assert set(found.fluency) == set(prompts)


def test_steered_and_prompted_arms_differ_from_the_unsteered_one(
    lm: LanguageModel, plan: Plan, sae: SAE
) -> None:
    strong = dataclasses.replace(plan, scale=5.0)
    found = compare(lm, TASK, {"steered": strong}, GREEDY, sae=sae)
    texts = {arm.name: tuple(a.output for a in arm.answers) for arm in found.arms}
    for name in ("prompted", "steered", "mean difference", "random latents 1"):
        assert texts[name] != texts["unsteered"], name


def test_an_sae_that_cannot_be_had_is_noted(lm: LanguageModel, plan: Plan) -> None:
    config = dataclasses.replace(GREEDY, controls=("random",), random_draws=1, damage=False)
    found = compare(lm, TASK, {"steered": plan}, config)
    assert [arm.name for arm in found.arms] == ["unsteered", "steered", "random directions"]
    assert found.notes[0].startswith("random directions stand in for random latents")
    assert not found.damage


def test_a_judge_grades_every_answer_beside_the_programs(lm: LanguageModel, plan: Plan) -> None:
    seen: list[tuple[str, str]] = []

    def judge(task: Task, content: str, reply: str) -> Letter | None:
        seen.append((content, reply))
        return Letter.B if content == CONTENTS[0] else None

    config = dataclasses.replace(GREEDY, controls=(), damage=False)
    found = compare(lm, TASK, {"steered": plan}, config, judge=judge)
    assert len(seen) == 4  # two arms, two contents
    for arm in found.arms:
        assert [a.judged for a in arm.answers] == [Letter.B, None]
        assert arm.summary()["judged"]["n"] == 1
    alone = compare(lm, TASK, {"steered": plan}, config)
    for arm, same in zip(found.arms, alone.arms, strict=True):
        assert [a.grades for a in arm.answers] == [a.grades for a in same.answers]


def test_a_judge_that_is_gone_takes_nothing_with_it(lm: LanguageModel, plan: Plan) -> None:
    asked: list[str] = []

    def judge(task: Task, content: str, reply: str) -> Letter | None:
        asked.append(content)
        if len(asked) > 1:
            raise UserError("no answer any more")
        return Letter.B

    config = dataclasses.replace(GREEDY, controls=(), damage=False)
    found = compare(lm, TASK, {"steered": plan}, config, judge=judge)
    assert len(asked) == 2
    assert [a.judged for arm in found.arms for a in arm.answers] == [Letter.B, None, None, None]
    assert "the judge graded no further answers: no answer any more" in found.notes


def test_the_document_holds_every_figure(lm: LanguageModel, plan: Plan, sae: SAE) -> None:
    found = compare(lm, TASK, {"steered": plan}, GREEDY, sae=sae)
    document = json.loads(json.dumps(comparison_document(found)))
    assert [arm["name"] for arm in document["arms"]] == [arm.name for arm in found.arms]
    steered = document["arms"][2]
    assert steered["damage"]["kl"] == found.damage["steered"].kl > 0
    assert steered["fluency"]["perplexity"] == found.fluency["steered"].perplexity
    assert document["arms"][0]["damage"] is None
    assert document["plans"]["steered"]["latents"] == [2, 0]
    assert document["n"] == 2 and len(document["tests"]) == 12


def test_what_cannot_be_compared(lm: LanguageModel, plan: Plan) -> None:
    with pytest.raises(UsageError, match="at least one plan"):
        compare(lm, TASK, {})
    with pytest.raises(UsageError, match="`controls` must be some of prompt, random"):
        CompareConfig(controls=("luck",))
    with pytest.raises(UsageError, match="`seeds` must be different"):
        CompareConfig(seeds=(1, 1))
    with pytest.raises(UsageError, match="`n` must be at least 1"):
        CompareConfig(n=0)
    other = dataclasses.replace(plan, model=dataclasses.replace(plan.model, hash="another"))
    with pytest.raises(UserError, match="`plan` was made for"):
        compare(lm, TASK, {"steered": other}, GREEDY)
    with pytest.raises(UsageError, match="leave them out of `controls`"):
        ablating = dataclasses.replace(plan, method="project", latents=plan.latents)
        compare(lm, TASK, {"steered": ablating}, GREEDY)


def arm(name: str, kind: str, letters: str, seeds: int = 1) -> Arm:
    """Answers that are strict (A), follow (B) or do not (C); "?" follows and is not graded."""
    answers = []
    for i, letter in enumerate(letters):
        faithful = None if letter == "?" else letter == "A"
        grades = Grades(
            letter != "C", Verdict.PASS, Fluent(True, "", False), Faithful(faithful, "no words")
        )
        answers.append(Answer(str(i), "", "", grades, 0.0))
    return Arm(name, tuple(answers), kind, seeds)


def test_paired_tests_by_hand() -> None:
    arms = [
        arm("unsteered", "unsteered", "CCCCCCCC"),
        arm("prompted", "prompted", "AAAAAAAC"),
        arm("steered", "steered", "BBBBBBAC"),
        arm("random 1", "random", "BCCCCCCC"),
        arm("random 2", "random", "BBCCCCCC"),
    ]
    tests = {(t.theirs, t.measure): t for t in paired_tests(arms)}
    assert len(tests) == 6
    floor = tests["unsteered", "follows"]
    assert (floor.difference, floor.wins, floor.losses) == (7 / 8, 7, 0)
    assert floor.p == 2 / 2**7 and floor.p_holm == pytest.approx(6 * floor.p)
    drawn = tests["random", "follows"]  # averaged by content: 1, .5, 0, 0, ...
    assert drawn.difference == pytest.approx((7 - 1.5) / 8) and drawn.wins == 6
    assert tests["prompted", "strict"].losses == 6
    assert tests["prompted", "follows"].p == 1.0


def test_what_stands_for_strict_where_it_cannot_be_graded() -> None:
    arms = [arm("unsteered", "unsteered", "????"), arm("steered", "steered", "????")]
    measures = [test.measure for test in paired_tests(arms)]
    assert measures == ["follows", "follows and fluent"]


def test_contents_graded_in_one_arm_alone_are_left_out_of_the_test() -> None:
    arms = [arm("unsteered", "unsteered", "?BB"), arm("steered", "steered", "AA?")]
    (strict,) = [test for test in paired_tests(arms) if test.measure == "strict"]
    assert (strict.difference, strict.wins, strict.losses) == (1.0, 1, 0)


def test_two_plans_are_tested_against_their_own_controls() -> None:
    arms = [
        arm("unsteered", "unsteered", "CC"),
        arm("one", "steered", "AA"),
        arm("random latents (one)", "random", "CA"),
        arm("two", "steered", "BB"),
        arm("random latents (two)", "random", "CC"),
    ]
    assert [(t.ours, t.theirs) for t in paired_tests(arms) if t.measure == "follows"] == [
        ("one", "unsteered"), ("one", "random (one)"),
        ("two", "unsteered"), ("two", "random (two)"),
    ]  # fmt: skip


def test_a_plan_of_several_parts_is_an_arm_like_any_other(lm: LanguageModel, plan: Plan) -> None:
    second = small_plan(lm, (1,), scope="generated").part
    deeper = dataclasses.replace(second, layer=2, scale=0.5)
    both = plan.with_changes(parts=(plan.part, deeper))
    config = dataclasses.replace(GREEDY, controls=())
    found = compare(lm, TASK, {"two": both}, config)
    assert found.damage["two"].relative_dose and found.damage["two"].kl > 0
    document = comparison_document(found)
    json.dumps(document, allow_nan=False)
    rows = document["plans"]["two"]["parts"]
    assert [(row["layer"], row["scope"]) for row in rows] == [(1, "generation"), (2, "generated")]
    assert rows[1]["delta_norm"] == pytest.approx(float(deeper.added_vector().norm()))
    line = _plan_line("two", document["plans"]["two"], {})
    assert "layer 1 (resid_post)" in line and "layer 2 (resid_post)" in line
