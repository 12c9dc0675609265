"""Arms, references, grades and rates, with generation replaced by fixed texts."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.evaluation import arms as evaluation
from saesteer.steering.evaluation.arms import Decoding, evaluate
from saesteer.steering.evaluation.graded_arms import grade_arm
from saesteer.steering.evaluation.rates import Rate
from saesteer.steering.grades.grade import Grader
from saesteer.steering.hooking.generation import SteeredText
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task, Variant

from ..small_plans import small_plan

TEST = (
    "The museum opens at nine on Sunday.",
    "Peter bought seven oranges yesterday.",
    "Heavy rain closed the mountain road.",
    "Our teacher painted a yellow boat.",
)

TASK = Task(
    name="lists",
    instruction="Select one",
    variants=(
        Variant("Select two"),
        Variant("Choisir trois", "fr", "evaluate"),
        Variant("Judge one", "en", "evaluate"),
        Variant("Judge two", "en", "evaluate"),
    ),
    contents={"train": ("a train content",), "dev": ("a dev content",), "test": TEST},
    check_name="keyword",
    check_arguments={"keyword": "indeed"},
    max_new_tokens=9,
)

IN_GERMAN = dataclasses.replace(TASK, check_name="language", check_arguments={"lang": "de"})


@pytest.fixture
def plan(lm: LanguageModel) -> Plan:
    return small_plan(lm, (1,))


@dataclasses.dataclass
class Call:
    """One call of `generate_steered`."""

    texts: list[str]
    plan: Plan | None
    arguments: dict[str, Any]


@dataclasses.dataclass
class Script:
    """Stands in for generation."""

    reply: Callable[[str, Plan | None], str] = lambda text, plan: f"indeed, {text}"
    broken: Callable[[str], bool] = lambda text: False
    calls: list[Call] = dataclasses.field(default_factory=list)

    def generate_steered(
        self, lm: LanguageModel, texts: Sequence[str], plan: Plan | None, **arguments: Any
    ) -> list[SteeredText]:
        self.calls.append(Call(list(texts), plan, arguments))
        answers = []
        for text in texts:
            ids = [1, 2, 3, 4] * 3 if self.broken(text) else list(range(12))
            steered = (5, 0.5) if plan else (0, None)
            answers.append(SteeredText(text, self.reply(text, plan), ids, None, *steered))
        arguments["progress"](7)
        return answers


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(evaluation, "generate_steered", script.generate_steered)
    return script


# --- what is run ---------------------------------------------------------------------------------


def test_the_arms_and_what_each_is_asked(lm: LanguageModel, plan: Plan, script: Script) -> None:
    arms = evaluate(lm, TASK, {"one": plan, "two": plan.top(1)}, n=3)
    assert [arm.name for arm in arms] == ["unsteered", "prompted", "one", "two"]
    alone = list(TEST[:3])
    asked = [f"{content}\nJudge one" for content in alone]  # the English evaluation wording
    otherwise = [f"{content}\nJudge two" for content in alone]
    assert [(call.texts, call.plan is not None) for call in script.calls] == [
        (alone, False), (asked, False), (alone, True), (alone, True), (otherwise, False),
    ]  # fmt: skip
    assert script.calls[2].plan is plan
    for arm, call in zip(arms, script.calls, strict=False):
        assert [answer.content for answer in arm.answers] == alone
        assert [answer.prompt for answer in arm.answers] == call.texts


@pytest.mark.parametrize("task", [TASK, IN_GERMAN], ids=["source", "prompted"])
def test_every_arm_is_decoded_the_same_way(
    task: Task, lm: LanguageModel, plan: Plan, script: Script
) -> None:
    decoding = Decoding(temperature=0.4, top_p=0.8, seed=3, batch_size=2)
    evaluate(lm, task, {"plan": plan}, decoding=decoding)
    wanted = {**dataclasses.asdict(decoding), "max_new_tokens": TASK.max_new_tokens}
    *calls, reference = script.calls
    for call in calls:
        assert {name: v for name, v in call.arguments.items() if name != "progress"} == wanted
    # The references are greedy where the arms are sampled, and the other way round.
    assert reference.arguments["temperature"] == 0.0
    script.calls.clear()
    evaluate(lm, task, {}, decoding=Decoding(temperature=0.0))
    assert script.calls[-1].arguments["temperature"] > 0
    assert script.calls[-1].arguments["seed"] != script.calls[0].arguments["seed"]


def test_only_the_chosen_split_is_seen(lm: LanguageModel, plan: Plan, script: Script) -> None:
    evaluate(lm, IN_GERMAN, {"plan": plan})
    assert {text.split("\n")[0] for call in script.calls for text in call.texts} == set(TEST)
    script.calls.clear()
    evaluate(lm, IN_GERMAN, {"plan": plan}, split="dev")
    seen = {text.split("\n")[0] for call in script.calls for text in call.texts}
    assert seen == {"a dev content"}


def test_references_are_the_contents_where_those_can_be_compared(
    lm: LanguageModel, script: Script
) -> None:
    script.reply = lambda text, plan: text
    unsteered, prompted = evaluate(lm, TASK, {})
    assert unsteered.overlap_with == prompted.overlap_with == "the content"
    for answer in unsteered.answers:
        assert answer.overlap == 1.0  # an echo of the content is all about it
    assert all(0 < answer.overlap < 1 for answer in prompted.answers)  # the wording is not


def test_references_of_translations_come_from_another_wording(
    lm: LanguageModel, plan: Plan, script: Script
) -> None:
    """The prompted arm must not be compared with its own answers."""

    def reply(text: str, plan: Plan | None) -> str:
        number = [text.startswith(content) for content in TEST].index(True)
        fruit = ("Birnen", "Kirschen", "Pflaumen", "Trauben")[number]
        return f"{fruit} {fruit}saft" if "Judge two" in text or plan else f"Apfel{number}"

    script.reply = reply
    unsteered, prompted, steered = evaluate(lm, IN_GERMAN, {"plan": plan})
    wordings = [{text.partition("\n")[2] for text in call.texts} for call in script.calls]
    assert wordings == [{""}, {"Judge one"}, {""}, {"Judge two"}]
    assert prompted.overlap_with == "the prompted answer"
    assert [answer.overlap for answer in prompted.answers] == [0.0] * 4
    assert [answer.overlap for answer in unsteered.answers] == [0.0] * 4
    assert [answer.overlap for answer in steered.answers] == [1.0] * 4


@pytest.mark.parametrize(
    ("variants", "asked", "asked_otherwise"),
    [
        (
            (Variant("Select two"), Variant("Judge", "en", "evaluate")),
            "{content}\nJudge",
            "{content}\nSelect one",
        ),
        ((Variant("Select two"),), "{content}\nSelect one", "{content}\nSelect two"),
        ((), "{content}\nSelect one", "Select one\n{content}"),
    ],
    ids=["one evaluation wording", "no evaluation wording", "one wording"],
)
def test_a_task_with_few_wordings_is_still_asked_in_two_ways(
    variants: tuple[Variant, ...],
    asked: str,
    asked_otherwise: str,
    lm: LanguageModel,
    script: Script,
) -> None:
    task = dataclasses.replace(IN_GERMAN, variants=variants)
    evaluate(lm, task, {}, n=1)
    _, prompted, reference = (call.texts for call in script.calls)
    assert prompted == [asked.format(content=TEST[0])]
    assert reference == [asked_otherwise.format(content=TEST[0])]


def test_progress_names_each_arm_and_counts_answers(
    lm: LanguageModel, plan: Plan, script: Script
) -> None:
    shown: list[tuple[str, int, int, str]] = []
    evaluate(lm, IN_GERMAN, {"plan": plan}, progress=lambda *call: shown.append(call))
    arms = ("unsteered", "prompted", "plan", "reference answers")
    assert shown == [
        *((f"evaluate: {arm}", done, 4, "answers") for arm in arms for done in (0, 4)),
        *(("grade", done, 3, "arms") for done in range(4)),
    ]


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_evaluated_is_refused_before_anything_runs(
    lm: LanguageModel, plan: Plan, script: Script
) -> None:
    empty = dataclasses.replace(TASK, contents={"train": ("a",)})
    with pytest.raises(UserError, match="task 'lists' has no contents in its test split"):
        evaluate(lm, empty, {})
    unchecked = dataclasses.replace(TASK, check_name=None, check_arguments=None)
    with pytest.raises(UserError, match="task 'lists' has no check, so no answer can be graded"):
        evaluate(lm, unchecked, {})
    with pytest.raises(UsageError, match="`n` must be at least 1, got 0"):
        evaluate(lm, TASK, {}, n=0)
    with pytest.raises(UsageError, match="a plan cannot be called 'prompted'"):
        evaluate(lm, TASK, {"prompted": plan})
    with pytest.raises(UsageError, match="unknown task 'klingon'"):
        evaluate(lm, "klingon", {})
    assert not script.calls


# --- grades and rates ----------------------------------------------------------------------------


def texts_of(outputs: Sequence[str], broken: Sequence[bool]) -> list[SteeredText]:
    return [
        SteeredText("p", output, [1, 2, 3, 4] * 3 if bad else list(range(12)))
        for output, bad in zip(outputs, broken, strict=True)
    ]


def test_grades_follow_check_words_and_content() -> None:
    outputs = [
        f"Indeed, {TEST[0]}",  # follows, in good words, about the content
        "Indeed, there is nothing of it here.",  # about something else
        TEST[2],  # about the content, does not follow
        f"Indeed, {TEST[3]}",  # goes round in a loop, by its tokens
        "indeed peavy rauk cromed the mounsaid roat.",  # words that do not exist
    ]
    contents = (*TEST, TEST[2])
    texts = texts_of(outputs, [False, False, False, True, False])
    arm = grade_arm("an arm", TASK, contents, texts)
    found = [(g.follows, g.fluent, g.faithful, g.strict) for g in (a.grades for a in arm.answers)]
    assert found == [
        (True, True, True, True),
        (True, True, False, False),
        (False, True, True, False),
        (True, False, True, False),
        (True, False, False, False),
    ]
    assert [answer.degenerate for answer in arm.answers] == [False, False, False, True, False]
    assert arm.strict is not None and arm.fluent is not None and arm.faithful is not None
    hits = [rate.successes for rate in (arm.follows, arm.fluent, arm.faithful, arm.strict)]
    assert hits == [4, 3, 3, 1]
    assert (arm.measure, arm.success) == ("strict", arm.strict)
    assert not arm.not_graded


def test_an_answer_to_another_content_is_not_faithful() -> None:
    """All answers are fluent and pass, but each belongs to the content before it."""
    outputs = [f"Indeed, {content}" for content in (TEST[-1], *TEST[:-1])]
    arm = grade_arm("shifted", TASK, TEST, texts_of(outputs, [False] * 4))
    assert arm.follows.value == 1.0
    assert arm.strict is not None and arm.strict.value == 0.0


def test_what_cannot_be_graded_has_no_rate(tmp_path: Path) -> None:
    """Without a dictionary nobody knows whether a translation is faithful, nor strict."""
    german = ("Das Museum öffnet am Sonntag um neun.", "Peter kaufte gestern sieben Orangen.")
    grader = Grader(IN_GERMAN, dictionaries=tmp_path)
    arm = grade_arm("an arm", IN_GERMAN, TEST[:2], texts_of(german, [False] * 2), grader=grader)
    assert (arm.follows.value, arm.faithful, arm.strict) == (1.0, None, None)
    assert arm.fluent is not None and arm.fluent.value == 1.0
    assert (arm.measure, arm.success.value) == ("follows and fluent", 1.0)
    assert "dict-freedict-eng-deu" in arm.not_graded["faithful"]
    assert arm.not_graded["strict"] == "not graded, because faithful could not be"
    row = arm.summary()
    assert row["strict"] is None and row["follows"] == arm.follows.triple


def test_contents_that_cannot_be_graded_are_left_out_of_every_seed() -> None:
    """One content has no words to look for; its answers are no failures."""
    contents = (TEST[0], "It is what it is.")
    outputs = [f"Indeed, {contents[0]}", "Indeed so."] * 2
    arm = grade_arm("an arm", TASK, contents, texts_of(outputs, [False] * 4), seeds=(0, 1))
    assert arm.follows.n == 4
    assert arm.faithful is not None and (arm.faithful.successes, arm.faithful.n) == (2, 2)


def test_the_overlap_floor_rises_with_words_that_all_answers_share() -> None:
    """What overlaps with every content tells nothing about the right one."""
    contents = [f"{content} The orchestra rehearses tonight." for content in TEST]
    outputs = ["indeed the orchestra rehearses tonight"] * 4
    arm = grade_arm("generic", TASK, contents, texts_of(outputs, [False] * 4))
    assert all(answer.overlap > 0 for answer in arm.answers)
    assert arm.overlap_floor > 0
    assert arm.summary()["overlap"]["above_floor"]["value"] < 1


def wilson_by_hand(successes: int, n: int) -> tuple[float, float]:
    """Where |p - s/n| = 1.96 standard errors, by bisection."""
    z, share = 1.959963984540054, successes / n

    def inside(p: float) -> bool:
        return abs(p - share) <= z * math.sqrt(p * (1 - p) / n)

    ends = []
    for outside in (0.0, 1.0):
        a, b = outside, share
        for _ in range(200):
            middle = (a + b) / 2
            a, b = (a, middle) if inside(middle) else (middle, b)
        ends.append(b)
    return ends[0], ends[1]


@pytest.mark.parametrize(("successes", "n"), [(3, 12), (1, 40), (39, 40), (20, 40)])
def test_a_rate_carries_its_wilson_interval(successes: int, n: int) -> None:
    rate = Rate.of([True] * successes + [False] * (n - successes))
    assert rate.value == successes / n
    assert (rate.successes, rate.n) == (successes, n)
    # Bisection and the closed form agree to float64 rounding.
    assert (rate.low, rate.high) == pytest.approx(wilson_by_hand(successes, n), abs=1e-9)
    assert str(rate) == f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"


def test_rates_at_the_ends() -> None:
    none, every = Rate.of([False] * 5), Rate.of([True] * 5)
    assert (none.value, none.low, every.value, every.high) == (0.0, 0.0, 1.0, 1.0)
    assert 0 < none.high < 1 and 0 < every.low < 1
    assert Rate.of([]) == Rate(0.0, 0.0, 1.0, 0, 0)


def test_doses_and_rows_are_ready_for_json(lm: LanguageModel, plan: Plan, script: Script) -> None:
    script.broken = lambda text: text == TEST[1]
    arms = evaluate(lm, TASK, {"plan": plan})
    document = json.loads(json.dumps([arm.summary() for arm in arms]))
    assert [arm["name"] for arm in document] == ["unsteered", "prompted", "plan"]
    assert [arm["relative_dose"] for arm in document] == [None, None, 0.5]
    for arm, written in zip(arms, document, strict=True):
        assert written["n"] == 4
        assert written["overlap"]["floor"] == arm.overlap_floor
        for name in ("follows", "fluent", "faithful", "strict"):
            rate = arm.rate(name)
            assert rate is not None and written[name] == [rate.value, rate.low, rate.high]
        assert written["thresholds"]["real_words"] == 0.9
    steered = arms[2].answers[1]
    row = json.loads(json.dumps(steered.row()))
    assert row.pop("parts")["fluent"]["reason"] == "a loop"
    assert row == {
        "content": TEST[1], "prompt": TEST[1], "output": f"indeed, {TEST[1]}", "follows": True,
        "fluent": False, "faithful": True, "strict": False, "degenerate": True,
        "overlap": steered.overlap, "tokens_touched": 5, "relative_dose": 0.5, "seed": 0,
        "judged": None,
    }  # fmt: skip
    assert arms[0].answers[0].tokens_touched is None


def test_the_dose_of_an_arm_is_the_median_of_its_answers() -> None:
    texts = [
        SteeredText(content, "indeed", list(range(12)), None, 3, dose)
        for content, dose in zip(TEST, (0.1, 0.2, 0.9, None), strict=True)
    ]
    assert grade_arm("an arm", TASK, TEST, texts).relative_dose == 0.2


def test_on_a_model(lm: LanguageModel, plan: Plan) -> None:
    """Nothing replaced: the unsteered arm says what a plan that is off says."""
    off = dataclasses.replace(plan, scale=0.0)
    strong = dataclasses.replace(plan, scale=20.0)
    arms = evaluate(
        lm, IN_GERMAN, {"off": off, "strong": strong}, n=3, decoding=Decoding(batch_size=2)
    )
    outputs = {arm.name: [answer.output for answer in arm.answers] for arm in arms}
    assert outputs["off"] == outputs["unsteered"]
    assert outputs["strong"] != outputs["unsteered"] != outputs["prompted"]
    assert [arm.relative_dose is not None for arm in arms] == [False, False, False, True]


# --- seeds, loose readings, logit bias -----------------------------------------------------------


def test_seeds_answer_every_content_again(lm: LanguageModel, plan: Plan, script: Script) -> None:
    arms = evaluate(lm, IN_GERMAN, {"plan": plan}, n=2, seeds=(3, 7))
    *rest, reference = script.calls
    assert reference.arguments["seed"] == 8  # one reference for every seed, and of none of them
    assert [call.arguments["seed"] for call in rest] == [3, 7] * 3
    for arm in arms:
        assert [(a.seed, a.content) for a in arm.answers] == [
            (seed, content) for seed in (3, 7) for content in TEST[:2]
        ]
        assert arm.follows.n == 4 and arm.seeds == 2


def test_several_seeds_of_greedy_decoding_are_refused(lm: LanguageModel, script: Script) -> None:
    with pytest.raises(UsageError, match="`seeds` 0,1 with temperature 0 would answer alike"):
        evaluate(lm, TASK, {}, seeds=(0, 1), decoding=Decoding(temperature=0.0))


def test_answers_to_one_content_are_not_independent() -> None:
    """Ten seeds that always agree know no more than one: the interval is that of the contents."""
    once = [True, False, True, False, True, True, False, True]
    again = Rate.of(once * 10, seeds=10)
    assert again.value == Rate.of(once).value
    assert again.high - again.low > 2 * (Rate.of(once * 10).high - Rate.of(once * 10).low)
    never = Rate.of([False] * 80, seeds=10)
    assert (never.low, never.high) == (Rate.of([False] * 8).low, Rate.of([False] * 8).high)


def test_a_reply_that_passes_loosely_follows() -> None:
    task = dataclasses.replace(TASK, check_name="json", check_arguments={})
    texts = [
        SteeredText(content, f'Sure!\n{{"text": "{content}"}}', list(range(12))) for content in TEST
    ]
    arm = grade_arm("steered", task, TEST, texts)
    assert {answer.grades.verdict for answer in arm.answers} == {Verdict.FAIL}
    assert arm.follows.value == 1.0


def test_a_logit_bias_moves_every_answer_and_leaves_nothing_behind(lm: LanguageModel) -> None:
    bias = torch.zeros(lm.unembed.weight.shape[0])
    bias[77] = 1e4
    task = dataclasses.replace(TASK, max_new_tokens=3)
    specs = [
        evaluation.ArmSpec("plain", "unsteered"),
        evaluation.ArmSpec("biased", "logit-bias", logit_bias=bias),
        evaluation.ArmSpec("plain again", "unsteered"),
    ]
    greedy = Decoding(temperature=0.0)
    plain, biased, again = evaluation.run_arms(lm, task, TEST[:2], specs, greedy)
    assert {answer.token_ids for answer in biased.answers} == {(77, 77, 77)}
    assert [a.output for a in again.answers] == [a.output for a in plain.answers]
    assert all(77 not in a.token_ids for a in plain.answers)
