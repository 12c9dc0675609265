"""Arms of an evaluation: ways of answering contents, graded, with rates of success."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import Progress, check_sampling, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.bars import show_progress
from saesteer.steering.evaluation.graded_arms import Arm, grade_arm
from saesteer.steering.evaluation.thoughts import answers_only
from saesteer.steering.grades.fluent import content_language
from saesteer.steering.grades.grade import Grader
from saesteer.steering.hooking.arrangement import Plans
from saesteer.steering.hooking.generation import SteeredText, count_batches, generate_steered
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task, compose, load_task


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
class ArmSpec:
    """One way of answering: with the instruction in the prompt or without, steered or not."""

    name: str
    kind: str
    """unsteered, prompted, steered, steered+prompted, random, meandiff, or logit-bias."""
    prompted: bool = False
    plan: Plan | None = None
    logit_bias: Float[Tensor, " vocabulary"] | None = None
    """Added to the logits of every position instead of an edit of the residual stream."""


def evaluate(
    model: str | LanguageModel,
    task: str | Path | Task,
    plans: Mapping[str, Plan],
    *,
    split: str = "test",
    n: int = 40,
    decoding: Decoding = Decoding(),
    seeds: Sequence[int] | None = None,
    dictionaries: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = show_progress,
) -> list[Arm]:
    """Answer the same contents in every arm and grade the answers.

    Arms: `unsteered` (the content alone), `prompted` (the content with an evaluation wording of
    the instruction), and one per plan (the content alone, steered). `steering.compare`
    adds the controls, the tests and the damage.

    Args:
        seeds: answer every content once with each; by default with the decoding's seed alone.
        dictionaries: folder of bilingual dictionaries, by which translations are graded; by
            default that of SAESTEER_DICTIONARIES, or /usr/share/dictd.

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
    return run_arms(lm, task, contents, specs, decoding, seeds, progress, dictionaries=dictionaries)


def run_arms(
    lm: LanguageModel,
    task: Task,
    contents: Sequence[str],
    specs: Sequence[ArmSpec],
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
    progress: Progress = no_progress,
    *,
    dictionaries: str | Path | None = None,
) -> list[Arm]:
    """Answer the contents in every arm, and grade the answers.

    A task without evaluation wordings is prompted with its instruction. The model also answers
    once more, with another wording: with the unsteered arm, these are its own answers, which give
    the range of natural perplexities, and the references of the overlap.

    Args:
        dictionaries: folder of bilingual dictionaries, by which translations are graded.

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
        # References are independent of the prompted arm: another wording, and greedy where that
        # is sampled, or sampled with another seed where it is greedy.
        decoded = decoding
        if spec is None:
            greedy = decoding.temperature == 0
            decoded = replace(decoding, temperature=0.7 if greedy else 0.0)
            once = (max(seeds) + 1,)
        for seed in once:
            stage = f"evaluate: {arm}" + (f", seed {seed}" if len(once) > 1 else "")
            with biased_logits(lm, None if spec is None else spec.logit_bias):
                made += answer(
                    lm,
                    texts,
                    plan,
                    task.max_new_tokens,
                    replace(decoded, seed=seed),
                    stage,
                    progress,
                )
        return made

    made = {spec.name: run(spec.name, asked if spec.prompted else contents, spec) for spec in specs}
    references = [text.completion for text in run("reference answers", asked_otherwise, None)]
    plain = [spec for spec in specs if spec.kind == "unsteered"]
    own = [*references, *(text.completion for spec in plain for text in made[spec.name])]
    grader = Grader(task, lm, dictionaries, own, source_lang=content_language(" ".join(contents)))
    # A translation shares few words with its source, so its overlap is with the prompted answer.
    compared = references if grader.lang != grader.source_lang else None
    arms = []
    for done, spec in enumerate(specs):
        progress("grade", done, len(specs), "arms")
        arms.append(
            grade_arm(
                spec.name,
                task,
                contents,
                made[spec.name],
                compared,
                grader=grader,
                kind=spec.kind,
                seeds=seeds,
            )
        )
    progress("grade", len(specs), len(specs), "arms")
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
