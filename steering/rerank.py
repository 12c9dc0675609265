"""Causal re-rank: steer with each latent of a shortlist and let the task's own check judge."""

from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.hooks import HookPoint
from saesteer.sae.models import LanguageModel
from saesteer.steering.applying import SteeredText, generate_steered
from saesteer.steering.checks import Verdict
from saesteer.steering.grading import is_degenerate
from saesteer.steering.plan import PlannedLatent, make_plan
from saesteer.steering.rank_config import RankConfig
from saesteer.steering.tasks import Task


@dataclass(frozen=True)
class CausalTrial:
    """One latent steered at one relative dose; no latent and dose 0 for the unsteered model."""

    latent: int | None
    dose: float
    successes: int
    """Answers that pass the task's check and are not degenerate."""
    degenerate: int
    n: int

    @property
    def rate(self) -> float:
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
    `contents` are train contents: no others may choose latents.

    Raises UsageError for a task without a check.
    """
    require_check(task)
    sample = list(contents[: config.causal_contents])
    total = 1 + len(ids) * len(config.doses)
    stage = "rank: steer the shortlist"
    trials: list[CausalTrial] = []

    def run(latent: int | None, dose: float) -> None:
        progress(stage, len(trials), total, f"trials of {len(sample)} answers")
        plan = None
        if latent is not None:
            plan = make_plan(
                lm, sae, [PlannedLatent(id=latent, value=1.0)],
                layer=point.layer, site=point.site, unit="rel", scale=dose,
            )  # fmt: skip
        texts = generate_steered(
            lm,
            sample,
            plan,
            chat=config.chat,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            # Whether the SAE belongs to the model was asked at the start.
            force=True,
        )
        broken = [is_degenerate(text.token_ids) for text in texts]
        passed = [_passes(task, *pair) for pair in zip(texts, sample, strict=True)]
        good = sum(ok and not bad for ok, bad in zip(passed, broken, strict=True))
        trials.append(CausalTrial(latent, dose, good, sum(broken), len(sample)))

    run(None, 0.0)
    for latent in ids:
        for dose in config.doses:
            run(latent, dose)
    progress(stage, total, total, f"trials of {len(sample)} answers")
    return trials


def require_check(task: Task) -> None:
    """Raise UsageError when nothing can judge the answers to a task."""
    if task.check_name is None:
        raise UsageError(
            f"--by causal lets the task's check judge steered answers and {task.name!r} has none: "
            "give --task with a file that names a check, or another --by"
        )


def causal_scores(trials: Sequence[CausalTrial]) -> dict[int, float]:
    """Of each latent: its best success rate over the doses, minus the unsteered model's."""
    floor = next(trial.rate for trial in trials if trial.latent is None)
    best: dict[int, float] = {}
    for trial in trials:
        if trial.latent is not None:
            best[trial.latent] = max(best.get(trial.latent, -1.0), trial.rate - floor)
    return best


def _passes(task: Task, text: SteeredText, content: str) -> bool:
    return task.verdict(text.completion, content) is Verdict.PASS
