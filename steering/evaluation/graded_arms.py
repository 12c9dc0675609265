"""The answers of one arm, with their grades and rates."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.checks.words import without_thinking
from saesteer.steering.evaluation.letters import Letter
from saesteer.steering.evaluation.rates import Rate
from saesteer.steering.grades.grade import GRADES, Grader, Grades, not_graded
from saesteer.steering.grades.overlap import content_overlap, mismatch_floor
from saesteer.steering.hooking.generation import SteeredText
from saesteer.steering.tasks.task import Task


@dataclass(frozen=True)
class Answer:
    """One answer with its grades."""

    content: str
    prompt: str
    output: str
    grades: Grades
    overlap: float
    """F1 of its content words and those of the reference: a figure, not a grade."""
    tokens_touched: int | None = None
    """Edited positions; None where nothing was edited."""
    relative_dose: float | None = None
    """Median of ||delta|| / ||h|| over them."""
    seed: int = 0
    token_ids: tuple[int, ...] = ()
    thoughts: int = 0
    """Tokens of thoughts before it, which were left out."""
    judged: Letter | None = None
    """The grade by a language model, where one was asked."""

    @property
    def degenerate(self) -> bool:
        """Whether it goes round in a loop."""
        return self.grades.fluency.degenerate

    def row(self) -> dict[str, Any]:
        """Every field but the token ids, JSON-ready."""
        return {
            "content": self.content,
            "prompt": self.prompt,
            "output": self.output,
            **self.grades.row(),
            "degenerate": self.degenerate,
            "overlap": self.overlap,
            "tokens_touched": self.tokens_touched,
            "relative_dose": self.relative_dose,
            "seed": self.seed,
            "judged": None if self.judged is None else self.judged.value,
        }


SUCCESS = ("strict", "follows and fluent")
"""What counts as success: strict, or, where faithfulness could not be graded, the other two."""


@dataclass(frozen=True)
class Arm:
    """All answers of one `ArmSpec`, with their rates (`steering.grades`)."""

    name: str
    answers: tuple[Answer, ...]
    """Seed by seed, each in the order of the contents."""
    kind: str = ""
    seeds: int = 1
    overlap_with: str = "the content"
    """What the overlap of the answers is with."""
    overlap_floor: float = 1.0
    """The overlap that answers reach with the references of other contents, 95 % of the time."""
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    """The thresholds of the grades."""

    @property
    def follows(self) -> Rate:
        """Answers on which the check passes, as they are or on a loose reading."""
        return Rate.of(self.hits("follows"), self.seeds)

    @property
    def fluent(self) -> Rate | None:
        """Fluent answers; None where that could not be graded."""
        return self.rate("fluent")

    @property
    def faithful(self) -> Rate | None:
        """Answers that hold the content; None where that could not be graded."""
        return self.rate("faithful")

    @property
    def strict(self) -> Rate | None:
        """Answers that are all three; None where one of them could not be graded."""
        return self.rate("strict")

    @property
    def measure(self) -> str:
        """The first of `SUCCESS` that could be graded; `follows` where neither could."""
        return next((name for name in SUCCESS if self.graded(name)), "follows")

    @property
    def success(self) -> Rate:
        """The rate of `measure`."""
        found = self.rate(self.measure)
        assert found is not None
        return found

    def rate(self, name: str) -> Rate | None:
        """The rate of a grade, or of an entry of `SUCCESS`; None where it could not be graded."""
        return Rate.of(self.hits(name), self.seeds) if self.graded(name) else None

    def graded(self, name: str) -> bool:
        """Whether some answer has this grade."""
        return any(_grade(answer, name) is not None for answer in self.answers)

    def hits(self, name: str) -> list[bool]:
        """For each answer, whether it has the grade.

        Contents to which an answer could not be graded, where others could be, are left out.
        """
        contents = len(self.answers) // self.seeds
        kept = [place for place, share in enumerate(self.shares(name)) if share is not None]
        found = [_grade(answer, name) for answer in self.answers]
        return [
            bool(found[seed * contents + place]) for seed in range(self.seeds) for place in kept
        ]

    def shares(self, name: str) -> list[float | None]:
        """For each content, the share of seeds whose answer has the grade; None: not graded."""
        contents = len(self.answers) // self.seeds
        found = [_grade(answer, name) for answer in self.answers]
        return [
            None if None in found[place::contents] else fmean(map(bool, found[place::contents]))
            for place in range(contents)
        ]

    @property
    def not_graded(self) -> dict[str, str]:
        """Why a grade is missing, by its name."""
        return not_graded([answer.grades for answer in self.answers])

    @property
    def degenerate(self) -> Rate:
        """Answers where one 4-gram covers more than a fifth of the tokens."""
        return Rate.of([answer.degenerate for answer in self.answers], self.seeds)

    @property
    def undetermined(self) -> Rate:
        """Answers on which the check gives no verdict."""
        hits = [a.grades.verdict is Verdict.UNDETERMINED for a in self.answers]
        return Rate.of(hits, self.seeds)

    @property
    def relative_dose(self) -> float | None:
        """Median relative dose of the answers; None for an arm that is not steered."""
        doses = [a.relative_dose for a in self.answers if a.relative_dose is not None]
        return median(doses) if doses else None

    @property
    def instructed(self) -> tuple[float | None, float | None]:
        """Medians over the answers, in nats per token: their log-probability under the instructed
        model, and what that is above the plain one's."""
        scores = [a.grades.instructed for a in self.answers if a.grades.instructed is not None]
        said = [score.instructed for score in scores if score.instructed is not None]
        gains = [score.gain for score in scores if score.gain is not None]
        return (median(said) if said else None, median(gains) if gains else None)

    def summary(self) -> dict[str, Any]:
        """The rates with their intervals and what stands beside them, JSON-ready.

        The grades are `[rate, low, high]`, or None where one could not be graded; `not_graded`
        says why.
        """
        log_prob, gain = self.instructed
        row: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "n": len(self.answers),
            "seeds": self.seeds,
            **{name: None if (rate := self.rate(name)) is None else rate.triple for name in GRADES},
            "not_graded": self.not_graded,
            "success": {"measure": self.measure, **asdict(self.success)},
            "degenerate": asdict(self.degenerate),
            "undetermined": asdict(self.undetermined),
            "instructed": {"log_prob": log_prob, "gain": gain},
            "overlap": {
                "with": self.overlap_with,
                "floor": self.overlap_floor,
                "above_floor": asdict(
                    Rate.of([a.overlap > self.overlap_floor for a in self.answers], self.seeds)
                ),
            },
            "thresholds": dict(self.thresholds),
            "relative_dose": self.relative_dose,
        }
        judged = [a.judged for a in self.answers if a.judged is not None]
        if judged:
            row["judged"] = {
                "n": len(judged),
                "loose": asdict(Rate.of([g is not Letter.C for g in judged])),
                "strict": asdict(Rate.of([g is Letter.A for g in judged])),
            }
        return row


def _grade(answer: Answer, name: str) -> bool | None:
    """A grade of an answer, or an entry of `SUCCESS`."""
    grades = answer.grades
    if name == "follows and fluent":
        return None if grades.fluent is None else grades.follows and grades.fluent
    return grades.grade(name)


def grade_arm(
    name: str,
    task: Task,
    contents: Sequence[str],
    texts: Sequence[SteeredText],
    references: Sequence[str] | None = None,
    *,
    grader: Grader | None = None,
    kind: str = "",
    seeds: Sequence[int] = (0,),
) -> Arm:
    """Grade the answers of one arm: seed by seed, each in the order of `contents`.

    Args:
        references: the model's own answers, one for each content, with which the overlap is
            reported; by default it is that with the contents.
        grader: by default one without a model.
    """
    grader = Grader(task) if grader is None else grader
    asked = [(seed, content) for seed in seeds for content in contents]
    grades = grader.grade(
        [content for _, content in asked],
        [text.completion for text in texts],
        token_ids=[text.token_ids for text in texts],
    )
    outputs = [without_thinking(text.completion) for text in texts]
    compared = contents if references is None else [without_thinking(one) for one in references]
    wanted = [reference for _ in seeds for reference in compared]
    answers = tuple(
        Answer(
            content,
            text.prompt,
            text.completion,
            grade,
            content_overlap(output, reference),
            text.tokens_touched or None,
            text.relative_dose,
            seed,
            tuple(text.token_ids),
            text.thoughts,
        )
        for (seed, content), text, grade, output, reference in zip(
            asked, texts, grades, outputs, wanted, strict=True
        )
    )
    return Arm(
        name,
        answers,
        kind,
        len(seeds),
        "the content" if references is None else "the prompted answer",
        mismatch_floor(outputs, wanted),
        grader.floors(),
    )
