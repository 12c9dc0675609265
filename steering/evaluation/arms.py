"""Arms of an evaluation: ways of answering contents, graded, with rates of success."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import Progress, check_sampling, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.checks.words import without_thinking
from saesteer.steering.evaluation.grading import (
    Grade,
    content_overlap,
    content_reference,
    grade,
    is_degenerate,
    keeps_numbers,
    mismatch_floor,
)
from saesteer.steering.evaluation.intervals import bootstrap_mean, wilson
from saesteer.steering.evaluation.thoughts import answers_only
from saesteer.steering.hooking.arrangement import Plans
from saesteer.steering.hooking.generation import SteeredText, count_batches, generate_steered
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task, compose, load_task


@dataclass(frozen=True)
class Rate:
    """Successes out of n with their 95 % interval.

    Wilson's interval where every content was answered once; a bootstrap over contents where each
    was answered with several seeds, because those answers are not independent.
    """

    value: float
    low: float
    high: float
    successes: int
    n: int

    @staticmethod
    def of(hits: Sequence[bool], seeds: int = 1) -> "Rate":
        """The rate of hits, given seed by seed, each seed in the order of the contents."""
        successes, n = sum(hits), len(hits)
        # A bootstrap of equal values has no width: then Wilson's interval over contents is used.
        low, high = wilson(successes // seeds, n // seeds)
        if seeds > 1 and 0 < successes < n:
            interval = bootstrap_mean(per_content(hits, seeds))
            low, high = interval.low, interval.high
        return Rate(successes / n if n else 0.0, low, high, successes, n)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def per_content(hits: Sequence[bool], seeds: int) -> list[float]:
    """The share of seeds that hit, for each content, of hits given seed by seed."""
    contents = len(hits) // seeds
    return [fmean(hits[place::contents]) for place in range(contents)]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are generated, the same for every arm that is compared."""

    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.batch_size)


@dataclass(frozen=True)
class Graded:
    """One answer with its verdict and grade."""

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
    loosely: bool = False
    """The check passes on one of the answer's eight readings."""
    seed: int = 0
    token_ids: tuple[int, ...] = ()
    judged: Grade | None = None
    """The grade by a language model, where one was asked."""

    def row(self) -> dict[str, Any]:
        """Every field but the token ids, JSON-ready."""
        row = {**asdict(self), "verdict": self.verdict.value, "grade": self.grade.value}
        row["judged"] = None if self.judged is None else self.judged.value
        del row["token_ids"]
        return row


@dataclass(frozen=True)
class ArmSpec:
    """One way of answering: with the instruction in the prompt or without, steered or not."""

    name: str
    kind: str
    """unsteered, prompted, steered, steered+prompted, random, meandiff, or logit-bias."""
    prompted: bool = False
    plan: Plan | None = None
    logit_bias: Float[Tensor, " vocabulary"] | None = None
    """Added to the logits of every position instead of an edit of the residual stream."""


@dataclass(frozen=True)
class Arm:
    """All answers of one `ArmSpec`, with their rates.

    `loose`: the check passes, or passes on one of IFEval's loose readings, and the answer is not
    degenerate (grades A and B); `strict`: it passes as it is and is on topic too (grade A);
    `degenerate`: one 4-gram makes up more than a fifth of it.
    """

    name: str
    answers: tuple[Graded, ...]
    """Seed by seed, each in the order of the contents."""
    floor: float
    """Content overlap that answers reach with wrong contents; grade A must exceed it."""
    kind: str = ""
    seeds: int = 1

    @property
    def loose(self) -> Rate:
        """Answers of grade A or B."""
        return Rate.of(self.hits("loose"), self.seeds)

    @property
    def strict(self) -> Rate:
        """Answers of grade A."""
        return Rate.of(self.hits("strict"), self.seeds)

    @property
    def degenerate(self) -> Rate:
        """Answers where one 4-gram covers more than a fifth of the tokens."""
        return Rate.of([answer.degenerate for answer in self.answers], self.seeds)

    @property
    def undetermined(self) -> Rate:
        """Answers on which the check gives no verdict."""
        return Rate.of([a.verdict is Verdict.UNDETERMINED for a in self.answers], self.seeds)

    @property
    def grades(self) -> dict[str, int]:
        """How many answers got each grade."""
        return {g.value: sum(a.grade is g for a in self.answers) for g in Grade}

    def hits(self, which: str) -> list[bool]:
        """For each answer, whether it is a success: `loose` or `strict`."""
        if which == "strict":
            return [answer.grade is Grade.A for answer in self.answers]
        return [answer.grade is not Grade.C for answer in self.answers]

    @property
    def relative_dose(self) -> float | None:
        """Median relative dose of the answers; None for an arm that is not steered."""
        doses = [a.relative_dose for a in self.answers if a.relative_dose is not None]
        return median(doses) if doses else None

    def summary(self) -> dict[str, Any]:
        """The rates with their intervals, the dose and the overlap floor, JSON-ready."""
        row = {
            "name": self.name,
            "kind": self.kind,
            "n": len(self.answers),
            "seeds": self.seeds,
            "loose": asdict(self.loose),
            "strict": asdict(self.strict),
            "degenerate": asdict(self.degenerate),
            "undetermined": asdict(self.undetermined),
            "grades": self.grades,
            "overlap_floor": self.floor,
            "relative_dose": self.relative_dose,
        }
        judged = [a.judged for a in self.answers if a.judged is not None]
        if judged:
            row["judged"] = {
                "n": len(judged),
                "loose": asdict(Rate.of([g is not Grade.C for g in judged])),
                "strict": asdict(Rate.of([g is Grade.A for g in judged])),
            }
        return row


def grade_arm(
    name: str,
    task: Task,
    contents: Sequence[str],
    texts: Sequence[SteeredText],
    references: Sequence[str],
    *,
    kind: str = "",
    seeds: Sequence[int] = (0,),
) -> Arm:
    """Grade the answers of one arm: seed by seed, each in the order of `contents`."""
    outputs = [without_thinking(text.completion) for text in texts]
    asked = [(seed, content) for seed in seeds for content in contents]
    wanted = [reference for _ in seeds for reference in references]
    floor = mismatch_floor(outputs, [without_thinking(one) for one in wanted])
    translated = content_reference(task.check_name) == "prompted"
    answers = []
    for (seed, content), text, output, reference in zip(asked, texts, outputs, wanted, strict=True):
        verdict = task.verdict(text.completion, content)
        degenerate = is_degenerate(text.token_ids)
        overlap = content_overlap(output, without_thinking(reference))
        loosely = verdict is Verdict.PASS or task.passes_loosely(text.completion, content)
        # A translation shares few words with its source; its numbers it must share.
        kept = not translated or keeps_numbers(output, content)
        answers.append(
            Graded(
                content,
                text.prompt,
                text.completion,
                verdict,
                degenerate,
                overlap,
                grade(verdict, degenerate, overlap, floor, loosely=loosely, content_kept=kept),
                text.tokens_touched or None,
                text.relative_dose,
                loosely,
                seed,
                tuple(text.token_ids),
            )
        )
    return Arm(name, tuple(answers), floor, kind, len(seeds))


def evaluate(
    model: str | LanguageModel,
    task: str | Path | Task,
    plans: Mapping[str, Plan],
    *,
    split: str = "test",
    n: int = 40,
    decoding: Decoding = Decoding(),
    seeds: Sequence[int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> list[Arm]:
    """Answer the same contents in every arm and grade the answers.

    Arms: `unsteered` (the content alone), `prompted` (the content with an evaluation wording of
    the instruction), and one per plan (the content alone, steered). `steering.compare`
    adds the controls, the tests and the damage.

    Args:
        seeds: answer every content once with each; by default with the decoding's seed alone.

    Returns:
        The arms, in the order unsteered, prompted, plans.

    Raises:
        UserError: a task without a check, a split without contents.
        UsageError: a plan with the name of another arm, `n` below 1.
    """
    if n < 1:
        raise UsageError(f"`n` must be at least 1, got {n}")
    taken = sorted({"unsteered", "prompted"} & plans.keys())
    if taken:
        raise UsageError(f"a plan cannot be called {taken[0]!r}, as another arm is: rename it")
    task = task if isinstance(task, Task) else load_task(task)
    contents = contents_to_grade(task, split)[:n]
    lm = as_language_model(model, device=device, dtype=dtype)
    specs = [
        ArmSpec("unsteered", "unsteered"),
        ArmSpec("prompted", "prompted", prompted=True),
        *(ArmSpec(name, "steered", plan=plan) for name, plan in plans.items()),
    ]
    return run_arms(lm, task, contents, specs, decoding, seeds, progress)


def run_arms(
    lm: LanguageModel,
    task: Task,
    contents: Sequence[str],
    specs: Sequence[ArmSpec],
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
    progress: Progress = no_progress,
) -> list[Arm]:
    """Answer the contents in every arm, and grade the answers.

    A task without evaluation wordings is prompted with its instruction. Where an answer cannot be
    compared with its source, as in translation, the reference is the model's own answer to another
    wording than that of the prompted arm, which would otherwise be compared with itself.

    Raises UsageError for no seeds, or several with temperature 0, which give the same answers.
    """
    seeds = (decoding.seed,) if seeds is None else tuple(seeds)
    if not seeds:
        raise UsageError("`seeds` is empty: give at least one")
    if decoding.temperature == 0 and len(seeds) > 1:
        raise UsageError(
            f"`seeds` {','.join(map(str, seeds))} with temperature 0 would answer alike every "
            "time: give `temperature`, or one seed"
        )
    asked, asked_otherwise = two_ways_to_ask(task, contents)

    def run(arm: str, texts: Sequence[str], spec: ArmSpec | None) -> list[SteeredText]:
        plan = None if spec is None else spec.plan
        made: list[SteeredText] = []
        once = seeds[:1] if spec is None else seeds
        for seed in once:
            stage = f"evaluate: {arm}" + (f", seed {seed}" if len(once) > 1 else "")
            with biased_logits(lm, None if spec is None else spec.logit_bias):
                made += answer(
                    lm,
                    texts,
                    plan,
                    task.max_new_tokens,
                    replace(decoding, seed=seed),
                    stage,
                    progress,
                )
        return made

    references = list(contents)
    if content_reference(task.check_name) == "prompted":
        made = run("reference answers", asked_otherwise, None)
        references = [text.completion for text in made]
    arms = []
    for spec in specs:
        texts = run(spec.name, asked if spec.prompted else contents, spec)
        arms.append(
            grade_arm(spec.name, task, contents, texts, references, kind=spec.kind, seeds=seeds)
        )
    return arms


@contextlib.contextmanager
def biased_logits(lm: LanguageModel, bias: Float[Tensor, " vocabulary"] | None) -> Iterator[None]:
    """Add a constant to the output of the unembedding inside the context; None adds nothing."""
    if bias is None:
        yield
        return

    def add(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        return logits + bias.to(logits.device, logits.dtype)

    handle = lm.unembed.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def contents_to_grade(task: Task, split: str) -> list[str]:
    """The contents of one split. Raises UserError when there are none, or nothing to grade with."""
    contents = list(task.contents.get(split, ()))
    if not contents:
        raise UserError(f"task {task.name!r} has no contents in its {split} split")
    if task.check_name is None:
        raise UserError(
            f"task {task.name!r} has no check, so no answer can be graded: give `task` a file "
            "that names a check"
        )
    return contents


def two_ways_to_ask(task: Task, contents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each content with an evaluation wording, and with another wording (or position) of it."""
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
    plan: Plans | None,
    max_new_tokens: int,
    decoding: Decoding,
    stage: str = "generate",
    progress: Progress = no_progress,
) -> list[SteeredText]:
    """Answer texts, steered or not, and show the number of answers as progress of a stage.

    Thoughts before the answers are left out.
    """
    replies = generate_steered(
        lm,
        texts,
        plan,
        max_new_tokens=max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        batch_size=decoding.batch_size,
        progress=count_batches(progress, stage, len(texts), decoding.batch_size),
    )
    return answers_only(lm, replies)
