"""How well settings steer: their answers as rows of one batch, graded and judged together."""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.evaluation.arms import Decoding, answer
from saesteer.steering.evaluation.rates import Rate
from saesteer.steering.grades.grade import GRADES, Grader, Grades
from saesteer.steering.grades.log_probs import nats_after
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.generation import SteeredText
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task, compose

PLAIN_SHARE = math.exp(-1)
"""The share (see `Scale`) of an answer that is as likely as plain ones."""


@dataclass(frozen=True)
class Mark:
    """One answer, its grades, and what the instructed model thinks of it."""

    content: str
    output: str
    grades: Grades
    nats: float
    """Per token, after content and instruction; infinite for no answer."""
    token_ids: tuple[int, ...] = ()

    @property
    def good(self) -> bool:
        """Strict; follows and fluent where no program can tell whether it is faithful."""
        if self.grades.strict is None:
            return self.grades.follows and self.grades.fluent is not False
        return self.grades.strict


@dataclass(frozen=True)
class Scale:
    """What the instructed model thinks of plain answers, and of its own: the ends of a scale."""

    plain: float
    """Nats per token."""
    own: float

    def share(self, mark: Mark) -> float:
        """exp(-x) for an answer that costs x times as much more than the model's own answers as
        plain ones do, and at least x times half a nat.

        A loop is likely too, and counts as 0.
        """
        if mark.grades.fluency.degenerate or not math.isfinite(mark.nats):
            return 0.0
        width = max(self.plain - self.own, 0.5)
        return math.exp(-max(mark.nats - self.own, 0.0) / width)


@dataclass(frozen=True)
class Score:
    """The marks of one way to answer on some contents."""

    marks: tuple[Mark, ...]
    scale: Scale

    @property
    def value(self) -> float:
        """What the search maximises, in [0, 1]: the mean over answers of (2 strict + w + s) / 4.

        s is the share of the instructed model's log-probability (see `Scale`), w is 1 for a fluent
        answer and 1/2 for another. Both count only where the answer follows and is in no loop: they
        tell settings apart while none is strict yet. Other answers get up to 1/8, by how far they
        are from what the plain model says on the way to its instructed answers.
        """
        values = []
        for mark in self.marks:
            share = self.scale.share(mark)
            if mark.grades.follows and not mark.grades.fluency.degenerate:
                fluent = 1.0 if mark.grades.fluent is not False else 0.5
                values.append((2 * mark.good + fluent + share) / 4)
            else:
                values.append(max(0.0, (share - PLAIN_SHARE) / (1 - PLAIN_SHARE)) / 8)
        return fmean(values) if values else 0.0

    def rate(self, grade: str) -> Rate | None:
        """The rate of a grade, with its interval; None where no program can tell."""
        told = [value for mark in self.marks if (value := mark.grades.grade(grade)) is not None]
        return Rate.of(told) if told else None

    def rates(self) -> dict[str, list[float] | None]:
        """`[rate, low, high]` of every grade, JSON-ready."""
        found = {grade: self.rate(grade) for grade in GRADES}
        return {
            grade: None if rate is None else [rate.value, rate.low, rate.high]
            for grade, rate in found.items()
        }

    @property
    def nats(self) -> float | None:
        """Mean nats per token of the answers after content and instruction."""
        finite = [mark.nats for mark in self.marks if math.isfinite(mark.nats)]
        return fmean(finite) if finite else None

    def row(self, samples: int = 3) -> dict[str, Any]:
        """Rates, log-probability and some answers, JSON-ready."""
        nats = self.nats
        return {
            **self.rates(),
            "n": len(self.marks),
            "value": self.value,
            "instructed_log_prob": None if nats is None else -nats,
            "samples": [
                {
                    "content": mark.content,
                    "answer": mark.output,
                    **{name: mark.grades.grade(name) for name in GRADES},
                }
                for mark in self.marks[:samples]
            ],
        }

    def joined(self, other: "Score") -> "Score":
        """Over the contents of both."""
        return Score((*self.marks, *other.marks), self.scale)


@dataclass(eq=False)
class Scorer:
    """Answers contents and marks the answers.

    The unsteered and the prompted answers are made first; they are the ends of the scale of
    log-probabilities.
    """

    lm: LanguageModel
    task: Task
    contents: Sequence[str]
    grader: Grader
    decoding: Decoding
    wording: str
    """Of the instruction, for the prompted answers and their log-probability."""
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self.scale = Scale(1.0, 0.0)
        self.unsteered = self._plain("unsteered", self.contents)
        asked = [compose(content, self.wording) for content in self.contents]
        self.prompted = self._plain("prompted", asked)
        ends = [score.nats for score in (self.unsteered, self.prompted)]
        plain, own = (10.0 if nats is None else nats for nats in ends)
        self.scale = Scale(plain, own)
        self.unsteered = replace(self.unsteered, scale=self.scale)
        self.prompted = replace(self.prompted, scale=self.scale)

    def judged_by(self, grader: Grader) -> "Scorer":
        """The same answers by another grader, which may look closer."""
        made = copy(self)
        made.grader = grader
        made.unsteered = made.judged(self.unsteered)
        made.prompted = made.judged(self.prompted)
        return made

    def judged(self, score: Score) -> Score:
        """A score with the grades of this scorer's grader."""
        marks = score.marks
        grades = self.grader.grade(
            [mark.content for mark in marks],
            [mark.output for mark in marks],
            token_ids=[mark.token_ids for mark in marks],
        )
        again = [replace(mark, grades=one) for mark, one in zip(marks, grades, strict=True)]
        return Score(tuple(again), score.scale)

    def _plain(self, stage: str, texts: Sequence[str]) -> Score:
        answers = self._answers(texts, None, stage)
        return Score(tuple(self._marks(answers, self.contents)), self.scale)

    def _answers(
        self, texts: Sequence[str], plans: Sequence[Plan] | None, stage: str
    ) -> list[SteeredText]:
        rows = None if plans is None else ByRow(plans)
        most = self.task.max_new_tokens
        return answer(self.lm, texts, rows, most, self.decoding, stage, self.progress)

    def scores(
        self, plans: Sequence[Plan], places: range, stage: str, *, prompted: bool = False
    ) -> list[Score]:
        """The scores of some plans on the same contents, all in one run of the model.

        With `prompted` the instruction stands in the prompts as well.
        """
        contents = [self.contents[i] for i in places]
        rows = [plan for plan in plans for _ in contents]
        every = list(contents) * len(plans)
        texts = [compose(one, self.wording) for one in every] if prompted else every
        marks = self._marks(self._answers(texts, rows, stage), every)
        n = len(contents)
        return [Score(tuple(marks[i * n : (i + 1) * n]), self.scale) for i in range(len(plans))]

    def _marks(self, answers: Sequence[SteeredText], contents: Sequence[str]) -> list[Mark]:
        said = [one.token_ids for one in answers]
        grades = self.grader.grade(contents, [one.completion for one in answers], token_ids=said)
        chat = self.lm.has_chat_template
        asked = [compose(content, self.wording) for content in contents]
        heads = [encode_prompt(self.lm, text, chat=chat).token_ids for text in asked]
        nats = nats_after(self.lm, heads, said)
        return [
            Mark(
                content,
                one.completion,
                grade,
                math.inf if cost is None else cost,
                tuple(one.token_ids),
            )
            for content, one, grade, cost in zip(contents, answers, grades, nats, strict=True)
        ]
