"""Thoughts before an answer are neither graded nor counted, unless they are asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs.endpoint import ChatEndpoint
from saesteer.steering.checks.catalogue import Verdict, run_check
from saesteer.steering.checks.words import keeping_thoughts, without_thinking
from saesteer.steering.evaluation.judge import Judge, parse_grade
from saesteer.steering.evaluation.thoughts import answers_only
from saesteer.steering.hooking.generation import SteeredText
from saesteer.steering.tasks.task import Task, load_task

Shared = Callable[..., LanguageModel]
THOUGHT = "<think>\nhmm hmm hmm hmm\n</think>\n\n"


def said(lm: LanguageModel, text: str) -> SteeredText:
    return SteeredText("?", text, lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_completion_and_tokens_are_the_answers(lm_of: Shared) -> None:
    lm = lm_of()
    plain, thought, cut = (
        said(lm, text) for text in ("Yes, a bus.", f"{THOUGHT}Yes, a bus.", "<think>\nhmm hmm")
    )
    answers = answers_only(lm, [plain, thought, cut])
    assert answers[0] is plain
    assert answers[1].completion == "Yes, a bus."
    assert lm.tokenizer.decode(answers[1].token_ids).strip() == "Yes, a bus."
    assert len(answers[1].token_ids) <= len(plain.token_ids) + 1
    assert (answers[2].completion, answers[2].token_ids) == ("", [])
    with keeping_thoughts():
        assert answers_only(lm, [thought, cut]) == [thought, cut]


def test_a_template_that_opens_thoughts(lm_of: Shared, monkeypatch: Any) -> None:
    """A reply without a closing mark is then all thought."""
    lm = lm_of()
    template = "{{ messages[0]['content'] }}\n<think>\n"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    unclosed, closed = said(lm, "hmm hmm"), said(lm, "hmm</think>Yes.")
    assert [a.completion for a in answers_only(lm, [unclosed, closed])] == ["", "Yes."]
    with keeping_thoughts():
        assert answers_only(lm, [unclosed]) == [unclosed]


def test_grades_see_thoughts_only_when_kept() -> None:
    reply = f"{THOUGHT}one two three"
    assert without_thinking(reply) == "one two three"
    with keeping_thoughts():
        assert without_thinking(reply) == reply
        with keeping_thoughts(False):
            assert without_thinking(reply) == "one two three"
    lower = f"{THOUGHT.upper()}".replace("THINK", "think") + "only small letters here"
    assert run_check("lowercase", lower, "x") is Verdict.PASS
    with keeping_thoughts():
        assert run_check("lowercase", lower, "x") is Verdict.FAIL
        assert parse_grade("<think>A or B? B.</think>C") is parse_grade("C")  # a judge's own


def test_a_judge_reads_the_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    judge = Judge("http://127.0.0.1:1/v1", "j")

    def ask(self: ChatEndpoint, messages: Any, longest: int) -> str:
        asked.append(messages[-1]["content"])
        return "A"

    monkeypatch.setattr(ChatEndpoint, "ask", ask)
    task: Task = dataclasses.replace(load_task("french"))
    judge(task, "A bus.", f"{THOUGHT}Un bus.")
    assert "Un bus." in asked[0] and "hmm" not in asked[0]
