"""Grades and rates: how often an arm follows an instruction, how often on topic, how often broken."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
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
    relative_dose: float | None = None


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

    def summary(self) -> dict[str, Any]:
        """The three rates, JSON-ready."""
        return {
            "name": self.name,
            "n": len(self.answers),
            "loose": asdict(self.loose),
            "strict": asdict(self.strict),
            "degenerate": asdict(self.degenerate),
            "overlap_floor": self.floor,
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
    progress: Progress = no_progress,
) -> list[Arm]:
    """Run every arm on the same contents and grade what comes out.

    Arms: `unsteered` (the content alone), `prompted` (the content with an evaluation wording of
    the instruction), and one per plan (the content alone, steered). Where an answer cannot be
    compared with its source, as in translation, the reference is the prompted model's answer to
    *another* evaluation wording, so that the prompted arm is not compared with itself.

    Raises UserError when the split is empty.
    """
    lm = as_language_model(model)
    task = task if isinstance(task, Task) else load_task(task)
    contents = list(task.contents.get(split, ()))[:n]
    if not contents:
        raise UserError(f"task {task.name!r} has no contents in its {split} split")
    wordings = task.evaluate_variants or task.select_variants

    def run(arm: str, texts: Sequence[str], plan: Plan | None = None) -> list[SteeredText]:
        stage = f"evaluate: {arm}"
        return answer(lm, texts, plan, task.max_new_tokens, decoding, stage, progress)

    references = contents
    if content_reference(task.check_name) == "prompted":
        again = [compose(content, wordings[-1].text) for content in contents]
        references = [text.completion for text in run("reference answers", again)]
    asked = [compose(content, wordings[0].text) for content in contents]
    arms = [
        grade_arm("unsteered", task, contents, run("unsteered", contents), references),
        grade_arm("prompted", task, contents, run("prompted", asked), references),
    ]
    for name, plan in plans.items():
        arms.append(grade_arm(name, task, contents, run(name, contents, plan), references))
    return arms


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
