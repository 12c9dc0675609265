"""The causal score: steer with each latent of a shortlist and count answers that pass the check."""

from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.hooks import HookPoint
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.evaluation.thoughts import answers_only
from saesteer.steering.grades.repetition import is_degenerate
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.generation import count_batches, generate_steered
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent
from saesteer.steering.ranking.config import RankConfig
from saesteer.steering.tasks.task import Task


@dataclass(frozen=True)
class CausalTrial:
    """One latent steered at one relative dose. The unsteered model has latent None and dose 0."""

    latent: int | None
    dose: float
    successes: int
    """Answers that pass the task's check and are not degenerate."""
    degenerate: int
    n: int

    @property
    def rate(self) -> float:
        """Share of the answers that are successes."""
        return self.successes / self.n


def causal_trials(
    lm: LanguageModel,
    sae: SAE,
    point: HookPoint,
    task: Task,
    config: RankConfig,
    ids: Sequence[int],
    contents: Sequence[str],
    progress: Progress = no_progress,
) -> list[CausalTrial]:
    """Steer greedily with one latent at a time, at the same ||delta|| / ||h|| for all of them.

    The first trial is the unsteered model; then each latent in the order given, dose by dose.
    `contents` are train contents: no others may choose latents. Every trial of a content is a row
    of one run with its own plan, so that batches are full however few contents there are.

    Raises UsageError for a task without a check.
    """
    require_check(task)
    sample = list(contents[: config.causal_contents])
    settings: list[tuple[int | None, float]] = [(None, 0.0)]
    settings += [(latent, dose) for latent in ids for dose in config.doses]
    plans = [_plan(lm, sae, point, *setting) for setting in settings]
    # The trials of a content are neighbours: their prompts have one length, so padding is small.
    rows = [(content, trial) for content in sample for trial in range(len(settings))]
    by_row = [plans[trial] for _, trial in rows]
    texts = generate_steered(
        lm,
        [content for content, _ in rows],
        ByRow(by_row) if any(by_row) else None,
        chat=config.chat,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        # `rank` has checked that the SAE belongs to the model.
        force=True,
        progress=count_batches(progress, "rank: steer the shortlist", len(rows), config.batch_size),
    )
    good, broken = [0] * len(settings), [0] * len(settings)
    for (content, trial), text in zip(rows, answers_only(lm, texts), strict=True):
        bad = is_degenerate(text.token_ids)
        broken[trial] += bad
        good[trial] += not bad and task.verdict(text.completion, content) is Verdict.PASS
    return [
        CausalTrial(*setting, passed, bad, len(sample))
        for setting, passed, bad in zip(settings, good, broken, strict=True)
    ]


def _plan(
    lm: LanguageModel, sae: SAE, point: HookPoint, latent: int | None, dose: float
) -> Plan | None:
    if latent is None:
        return None
    return make_plan(
        lm,
        sae,
        [PlannedLatent(id=latent, value=1.0)],
        layer=point.layer,
        site=point.site,
        unit="rel",
        scale=dose,
    )


def require_check(task: Task) -> None:
    """Raise UsageError when nothing can judge the answers to a task."""
    if task.check_name is None:
        raise UsageError(
            f"`by` causal lets the task's check judge steered answers and {task.name!r} has none: "
            "give `task` with a file that names a check, or another `by`"
        )


def causal_scores(trials: Sequence[CausalTrial]) -> dict[int, float]:
    """For each latent, its best success rate over the doses minus the unsteered model's."""
    floor = next(trial.rate for trial in trials if trial.latent is None)
    best: dict[int, float] = {}
    for trial in trials:
        if trial.latent is not None:
            best[trial.latent] = max(best.get(trial.latent, -1.0), trial.rate - floor)
    return best
