"""Descriptions: what is asked, what is understood, and how they are scored."""

import json
from collections.abc import Iterator

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.reading.card import Context, Detection
from saesteer.sae.reading.describe import (
    KEY_VARIABLE,
    Describer,
    Window,
    detection,
    explaining,
    offline_detection,
    parse_description,
    parse_list,
)

from ...chat_endpoint import Model, serving


@pytest.fixture
def model() -> Iterator[Model]:
    with serving() as found:
        yield found


def context(tokens: list[str], acts: list[float]) -> Context:
    return Context(tuple(tokens), tuple(acts), acts.index(max(acts)), 0, 0)


CONTEXTS = [
    context(["the", " old", " cat", " sat"], [0.0, 2.0, 4.0, 0.0]),
    context(["\n", "a", " dog"], [0.0, 0.0, 1.0]),
]
WINDOWS = [
    *(Window(f"cat number {i}", frozenset({7, i + 50}), True) for i in range(6)),
    *(Window(f"tree number {i}\nwith leaves", frozenset({8, i + 50}), False) for i in range(6)),
]


def judging(messages: list[dict[str, str]]) -> str:
    """Describes as "animals", and takes for them what has a cat in it."""
    asked = messages[-1]["content"]
    if not asked.startswith("Description:"):
        return "<think>hm</think>\nExplanation: **animals that are kept**"
    assert asked.startswith("Description: animals that are kept\n")
    lines = asked.split("Excerpts:\n")[1].splitlines()
    return f"Sure: {json.dumps([int('cat' in line) for line in lines])}"


def test_a_description_is_asked_for_and_judged(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a-key")
    model.answer = judging
    said = Describer(model.url, "small").describe(CONTEXTS, WINDOWS)
    assert (said.text, said.by) == ("animals that are kept", "small")
    assert said.detection == Detection(6, 6, 6, 6) and said.detection.score == 1.0
    shown = model.asked[0]["messages"][1]["content"].splitlines()
    assert shown == [
        "1: the<< old cat>> sat ('old' 5, 'cat' 10)",
        "2: a<< dog>> ('dog' 2)",
    ]
    # Five windows at a time, a line each, and nothing says where the latent fires.
    counts = [len(one["messages"][1]["content"].split("Excerpts:\n")[1].splitlines())
              for one in model.asked[1:]]  # fmt: skip
    assert counts == [5, 5, 2]
    assert all("<<" not in one["messages"][1]["content"] for one in model.asked[1:])
    assert {one["model"] for one in model.asked} == {"small"}
    assert {one["temperature"] for one in model.asked} == {0}
    assert set(model.keys) == {"Bearer a-key"}


def test_windows_that_the_judge_does_not_answer_count_as_wrong(model: Model) -> None:
    model.answer = lambda messages: "[1, 1]"  # right for the last two windows alone
    said = Describer(model.url, "small").describe(CONTEXTS, WINDOWS)
    assert said.detection == Detection(6, 0, 6, 0, unanswered=10)


def test_without_windows_there_is_no_score(model: Model) -> None:
    said = Describer(model.url, "small").describe(CONTEXTS, [])
    assert said.detection is None and len(model.asked) == 1


def test_an_endpoint_that_fails_is_one_line(model: Model) -> None:
    model.status = 404
    with pytest.raises(UserError, match=r"`describe` http://127.* answered HTTP 404"):
        Describer(model.url, "small").check()


@pytest.mark.parametrize(
    ("url", "name", "says"),
    [("ftp://x", "m", "`describe` must be the address"), ("http://x", " ", "`describe_model`")],
)
def test_what_is_no_endpoint_is_refused(url: str, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Describer(url, name)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Nouns.", "Nouns."),
        ("I looked.\n\nDescription: the word “of”", "the word “of"),
        ('"quoted"', "quoted"),
        ("", "(the model gave no description)"),
        ("<think>never ends", "<think>never ends"),
    ],
)
def test_descriptions_are_read_from_answers(answer: str, text: str) -> None:
    assert parse_description(answer) == text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("[0,0,0] no, rather [1,1,0]", [True, True, False]),
        ("[1, 0]", [None] * 3),
        ("[1, 0, 2]", [None] * 3),
        ("[a, b, c]", [None] * 3),
        ("<think>[1,1,1]</think>[0,0,0]", [False] * 3),
    ],
)
def test_lists_are_read_from_answers(answer: str, expected: list[bool | None]) -> None:
    assert parse_list(answer, 3) == expected


def test_offline_a_window_fits_where_a_telling_token_is_in_it() -> None:
    assert offline_detection([7, 99], WINDOWS) == Detection(6, 6, 6, 6)
    assert offline_detection([8], WINDOWS) == Detection(6, 0, 6, 0)
    # Tokens 50 and 51 are in two windows of either kind.
    assert offline_detection([50, 51], WINDOWS).score == pytest.approx((2 / 6 + 4 / 6) / 2)


def test_the_score_is_the_balanced_accuracy() -> None:
    answers = [(WINDOWS[0], True), (WINDOWS[1], False), (WINDOWS[6], False), (WINDOWS[7], None)]
    found = detection(answers)
    assert found == Detection(2, 1, 2, 1, 1) and found.score == 0.5
    assert detection(answers[:2]).score is None


def test_at_most_fifteen_contexts_are_shown() -> None:
    assert len(explaining(CONTEXTS * 20)[1]["content"].splitlines()) == 15
