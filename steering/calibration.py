"""Chooses how many latents, how strong and where, on the development split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.models import LanguageModel, as_language_model
from saesteer.steering.evaluation import Arm, Decoding, answer, contents_to_grade, grade_arm
from saesteer.steering.plan import Plan
from saesteer.steering.tasks import Task, load_task


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The settings to try: every combination."""

    k: tuple[int, ...] = (1, 5, 15)
    """Latents, best first."""
    scale: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Multiples of mu + beta * sigma."""
    scope: tuple[str, ...] = ("generation",)

    def __post_init__(self) -> None:
        for name in ("k", "scale", "scope"):
            if not getattr(self, name):
                raise UsageError(f"the grid needs at least one value of {name}, got none")

    def plans(self, plan: Plan) -> list[Plan]:
        """The plans of the grid.

        A k beyond the plan's latents is left out; where that leaves none, all latents are tried.
        """
        held = len(plan.latents)
        ks = [k for k in self.k if k <= held] or [held]
        return [
            replace(plan.top(k), scale=scale, scope=scope)
            for k, scale, scope in product(ks, self.scale, self.scope)
        ]


@dataclass(frozen=True)
class Trial:
    """One setting and how it did."""

    plan: Plan
    arm: Arm

    @property
    def merit(self) -> tuple[float, float, float]:
        """More loose successes, then fewer broken answers, then the gentler edit."""
        return self.arm.loose.value, -self.arm.degenerate.value, -self.relative_dose

    @property
    def relative_dose(self) -> float:
        """Median over the answers; 0 where nothing was edited."""
        return self.arm.relative_dose or 0.0

    def row(self) -> dict[str, Any]:
        """The setting and its rates, JSON-ready."""
        return {
            "k": len(self.plan.latents),
            "scale": self.plan.scale,
            "scope": self.plan.scope,
            **self.arm.summary(),
            "relative_dose": self.relative_dose,
        }


def calibrate(
    model: str | LanguageModel,
    task: str | Path | Task,
    plan: Plan,
    grid: Grid = Grid(),
    *,
    rounds: Sequence[tuple[int, int]] = ((12, 4), (40, 1)),
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen: one may serve all)
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> tuple[Plan, list[Trial]]:
    """Pick a setting on the development split, by successive halving.

    Each round `(n, keep)` grades the settings still in the race on the first n development
    contents and keeps the best: many settings on few contents, then few on many. Test contents
    are never seen.

    Returns:
        The plan of the winner, and every trial in the order they were made.

    Raises:
        UserError: a task without a check or without development contents.
        UsageError: a grid or rounds that leave nothing to try.
    """
    if not rounds or any(n < 1 or keep < 1 for n, keep in rounds):
        raise UsageError(
            f"rounds must be (contents, settings kept) pairs, each at least 1, got {list(rounds)}"
        )
    task = task if isinstance(task, Task) else load_task(task)
    contents = contents_to_grade(task, "dev")
    racing = grid.plans(plan)
    lm = as_language_model(model, device=device, dtype=dtype)
    trials: list[Trial] = []
    for number, (n, keep) in enumerate(rounds, start=1):
        sample = contents[:n]
        stage = f"choose dose, round {number}"
        latest = []
        for done, candidate in enumerate(racing):
            progress(stage, done, len(racing), f"settings, on {len(sample)} contents each")
            texts = answer(lm, sample, candidate, task.max_new_tokens, decoding)
            # Success on this split is the check alone; being on topic is judged on the test split.
            latest.append(Trial(candidate, grade_arm("steered", task, sample, texts, sample)))
        progress(stage, len(racing), len(racing), f"settings, on {len(sample)} contents each")
        trials += latest
        latest.sort(key=lambda trial: trial.merit, reverse=True)
        racing = [trial.plan for trial in latest[:keep]]
    return racing[0], trials
