"""Grades and rates: how often an arm follows an instruction, on topic, or comes out broken."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.models import LanguageModel, as_language_model
from saesteer.steering.applying import SteeredText, generate_steered
from saesteer.steering.checks import (
    Grade,
    Verdict,
    content_overlap,
    content_reference,
    grade,
    is_degenerate,
    mismatch_floor,
    wilson,
)
from saesteer.steering.plan import Plan
from saesteer.steering.tasks import Task, compose, load_task


@dataclass(frozen=True)
class Rate:
    """Successes out of n with their 95 % Wilson interval."""

    value: float
    low: float
    high: float
    successes: int
    n: int

    @staticmethod
    def of(hits: Sequence[bool]) -> "Rate":
        successes, n = sum(hits), len(hits)
        low, high = wilson(successes, n)
        return Rate(successes / n if n else 0.0, low, high, successes, n)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are generated, the same for every arm that is compared."""

    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Graded:
    """One answer and what the checks say of it."""

    content: str
    prompt: str
    output: str
    verdict: Verdict
    degenerate: bool
    overlap: float
    grade: Grade
    tokens_touched: int | None = None
    """Edited positions; None where nothing was edited."""
    relative_dose: float | None = None
    """Median of ||delta|| / ||h|| over them."""

    def row(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        return {**asdict(self), "verdict": self.verdict.value, "grade": self.grade.value}


@dataclass(frozen=True)
class Arm:
    """All answers of one way of asking, with their rates.

    `loose`: the check passes and the answer is not degenerate (grades A and B); `strict`: it is
    also on topic (grade A); `degenerate`: one 4-gram makes up more than a fifth of it.
    """

    name: str
    answers: tuple[Graded, ...]
    floor: float
    """Content overlap that answers reach with the wrong content; grade A must exceed it."""

    @property
    def loose(self) -> Rate:
        return Rate.of([answer.grade is not Grade.C for answer in self.answers])

    @property
    def strict(self) -> Rate:
        return Rate.of([answer.grade is Grade.A for answer in self.answers])

    @property
    def degenerate(self) -> Rate:
        return Rate.of([answer.degenerate for answer in self.answers])

    @property
    def relative_dose(self) -> float | None:
        """Median relative dose of the answers; None for an arm that is not steered."""
        doses = [a.relative_dose for a in self.answers if a.relative_dose is not None]
        return median(doses) if doses else None

    def summary(self) -> dict[str, Any]:
        """The three rates with their intervals, the dose and the overlap floor, JSON-ready."""
        return {
            "name": self.name,
            "n": len(self.answers),
            "loose": asdict(self.loose),
            "strict": asdict(self.strict),
            "degenerate": asdict(self.degenerate),
            "overlap_floor": self.floor,
            "relative_dose": self.relative_dose,
        }


def grade_arm(
    name: str,
    task: Task,
    contents: Sequence[str],
    texts: Sequence[SteeredText],
    references: Sequence[str],
) -> Arm:
    """Grade the answers of one arm, in the order of `contents`."""
    outputs = [text.completion for text in texts]
    floor = mismatch_floor(outputs, references)
    answers = []
    for content, text, reference in zip(contents, texts, references, strict=True):
        verdict = task.verdict(text.completion, content)
        degenerate = is_degenerate(text.token_ids)
        overlap = content_overlap(text.completion, reference)
        answers.append(
            Graded(
                content,
                text.prompt,
                text.completion,
                verdict,
                degenerate,
                overlap,
                grade(verdict, degenerate, overlap, floor),
                text.tokens_touched or None,
                text.relative_dose,
            )
        )
    return Arm(name, tuple(answers), floor)


def evaluate(
    model: str | LanguageModel,
    task: str | Path | Task,
    plans: Mapping[str, Plan],
    *,
    split: str = "test",
    n: int = 40,
    decoding: Decoding = Decoding(),
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> list[Arm]:
    """Run every arm on the same contents and grade what comes out.

    Arms: `unsteered` (the content alone), `prompted` (the content with an evaluation wording of
    the instruction), and one per plan (the content alone, steered). A task without evaluation
    wordings is prompted with its instruction.

    Where an answer cannot be compared with its source, as in translation, the reference is the
    model's own answer when asked in another way than the prompted arm, which would otherwise be
    compared with itself.

    Returns:
        The arms, in the order unsteered, prompted, plans.

    Raises:
        UserError: a task without a check, a split without contents.
        UsageError: a plan that bears the name of another arm, `n` below 1.
    """
    if n < 1:
        raise UsageError(f"--n must be at least 1, got {n}")
    taken = sorted({"unsteered", "prompted"} & plans.keys())
    if taken:
        raise UsageError(f"a plan cannot be called {taken[0]!r}, as another arm is: rename it")
    task = task if isinstance(task, Task) else load_task(task)
    contents = contents_to_grade(task, split)[:n]
    lm = as_language_model(model, device=device, dtype=dtype)

    def run(arm: str, texts: Sequence[str], plan: Plan | None = None) -> list[SteeredText]:
        stage = f"evaluate: {arm}"
        return answer(lm, texts, plan, task.max_new_tokens, decoding, stage, progress)

    asked, asked_otherwise = _two_ways_to_ask(task, contents)
    references = contents
    if content_reference(task.check_name) == "prompted":
        references = [text.completion for text in run("reference answers", asked_otherwise)]
    arms = [
        grade_arm("unsteered", task, contents, run("unsteered", contents), references),
        grade_arm("prompted", task, contents, run("prompted", asked), references),
    ]
    for name, plan in plans.items():
        arms.append(grade_arm(name, task, contents, run(name, contents, plan), references))
    return arms


def contents_to_grade(task: Task, split: str) -> list[str]:
    """The contents of one split. Raises UserError when there are none, or nothing to grade with."""
    contents = list(task.contents.get(split, ()))
    if not contents:
        raise UserError(f"task {task.name!r} has no contents in its {split} split")
    if task.check_name is None:
        raise UserError(
            f"task {task.name!r} has no check, so no answer can be graded: give --task a file "
            "that names a check"
        )
    return contents


def _two_ways_to_ask(task: Task, contents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each content with an evaluation wording, and with another wording (or place) of it."""
    wording, *others = dict.fromkeys(
        variant.text for variant in (*task.evaluate_variants, *task.select_variants)
    )
    asked = [compose(content, wording) for content in contents]
    if not others:
        return asked, [compose(content, wording, "pre") for content in contents]
    return asked, [compose(content, others[0]) for content in contents]


def answer(
    lm: LanguageModel,
    texts: Sequence[str],
    plan: Plan | None,
    max_new_tokens: int,
    decoding: Decoding,
    stage: str = "generate",
    progress: Progress = no_progress,
) -> list[SteeredText]:
    """Answer texts, steered or not, showing the answers made so far as progress of a stage."""
    done = 0
    progress(stage, 0, len(texts), "answers")

    def on_batch(new_tokens: int) -> None:
        nonlocal done
        done = min(done + decoding.batch_size, len(texts))
        progress(stage, done, len(texts), "answers")

    return generate_steered(
        lm,
        texts,
        plan,
        max_new_tokens=max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        batch_size=decoding.batch_size,
        progress=on_batch,
    )
