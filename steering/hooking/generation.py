"""Steered generation: from texts to completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import Progress
from saesteer.sae.model.generation import Completion, generate
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.hooking.arrangement import ByRow, Plans
from saesteer.steering.hooking.hook import median, steer
from saesteer.steering.hooking.latent_values import SAEs
from saesteer.steering.plans.plan import Plan


@dataclass(frozen=True)
class SteeredText:
    """A prompt and the model's completion of it."""

    prompt: str
    completion: str
    """New text, without special tokens."""
    token_ids: list[int]
    """New tokens, without the end of text and what follows it."""
    baseline: str | None = None
    """The unsteered completion, when asked for."""
    tokens_touched: int = 0
    """Edited positions of the prompt and the completion. Positions after the end of the text, which
    are run while other rows of the batch go on, do not count."""
    relative_dose: float | None = None
    """Median of ||delta|| / ||h|| over them; None where nothing was touched."""
    tokens_gated_off: int = 0
    """Positions in the scope where the gate was closed. Positions after the end of the text, which
    are run while other rows of the batch go on, count too."""
    tokens_changed: int = 0
    """Edited positions where the edit was not 0: ablating an inactive latent changes nothing."""
    thoughts: int = 0
    """Tokens of thoughts that were left out before the completion; they count towards the limit."""


def counter(progress: Progress, stage: str, total: int, unit: str) -> Callable[[int], None]:
    """Start a stage of progress; the function returned advances it, at most to the total."""
    reached = 0
    progress(stage, 0, total, unit)

    def add(count: int) -> None:
        nonlocal reached
        reached = min(reached + count, total)
        progress(stage, reached, total, unit)

    return add


def count_batches(
    progress: Progress, stage: str, total: int, batch_size: int, unit: str = "answers"
) -> Callable[[int], None]:
    """The `progress` of a generation of `total` texts, shown as a stage that counts texts."""
    add = counter(progress, stage, total, unit)
    return lambda new_tokens: add(batch_size)


def generate_steered(
    lm: LanguageModel,
    texts: Sequence[str],
    plan: Plans | None,
    *,
    chat: bool | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    scope: str | None = None,
    scale: float | None = None,
    beta: float | None = None,
    include_first: bool = False,
    include_template: bool = False,
    exclude_special: bool = False,
    schedule: str | None = None,
    instructions: Sequence[str] | None = None,
    sae: SAEs = None,
    force: bool = False,
    baseline: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[SteeredText]:
    """Generate a completion of each text under a plan, in the order given.

    Args:
        texts: the prompts; each is one user turn when `chat`.
        plan: as for `steer`; a `ByRow` has one plan for each of `texts`. None does not steer.
        chat: send texts through the chat template; None: when the tokenizer has one.
        baseline: also generate without the plan, with the same seed and batches.
        progress: called after each batch with its number of new tokens.

    The other arguments are those of `sae.generate` and of `steering.steer`.

    Raises:
        UserError: what `steer` raises, for example when no token of any prompt was touched.
        UsageError: a parameter out of range.
    """
    if chat is None:
        chat = lm.has_chat_template
    prompts = [encode_prompt(lm, text, chat=chat) for text in texts]
    if not prompts:
        return []
    batches: list[list[int]] = []

    def run() -> list[Completion]:
        batches.clear()
        return generate(
            lm,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            before_batch=lambda rows: batches.append(list(rows)),
            progress=progress,
        )

    plain = run() if baseline or plan is None else None
    if plan is None:
        assert plain is not None
        return _answers(texts, plain, plain if baseline else None)

    def in_batches(one: Any) -> Any:
        """A `ByRow` over texts as one over the rows of each batch: texts are batched by length."""
        if isinstance(one, ByRow):
            return ByRow(one.plans, lambda call: batches[call])
        return one

    given = [plan] if isinstance(plan, Plan | str | Path | ByRow) else list(plan)
    for one in given:
        if isinstance(one, ByRow) and len(one.plans) != len(texts):
            raise UsageError(
                f"ByRow has plans for {len(one.plans)} texts and {len(texts)} were given: give "
                "one plan, or None, for each"
            )
    with steer(
        lm,
        [in_batches(one) for one in given],
        scope=scope,
        scale=scale,
        beta=beta,
        prompts=prompts,
        instructions=instructions,
        include_first=include_first,
        include_template=include_template,
        exclude_special=exclude_special,
        schedule=schedule,
        sae=sae,
        force=force,
    ) as report:
        completions = run()
    answers = _answers(texts, completions, plain)
    for call, indices in enumerate(batches if report.passes else ()):  # no passes: scale 0
        for row, i in zip(report.call_rows(call), indices, strict=True):
            kept = row.before(len(prompts[i]) + len(completions[i].token_ids))
            answers[i] = replace(
                answers[i],
                tokens_touched=len(kept.positions),
                relative_dose=median([kept.relative_doses]),
                tokens_changed=int((kept.delta_norms > 0).sum()),
                tokens_gated_off=row.gated_off,
            )
    return answers


def _answers(
    texts: Sequence[str], completions: Sequence[Completion], plain: Sequence[Completion] | None
) -> list[SteeredText]:
    """The completions of texts, with `plain` as their baselines."""
    return [
        SteeredText(text, said.text, said.token_ids, None if plain is None else plain[i].text)
        for i, (text, said) in enumerate(zip(texts, completions, strict=True))
    ]
