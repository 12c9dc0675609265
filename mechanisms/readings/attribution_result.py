"""Replies attributed to prompts, and what differs between groups of prompts or two models."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.reading_config import AttributeConfig
from saesteer.mechanisms.statistics import FEWEST_GROUPS
from saesteer.steering.evaluation.intervals import bootstrap_mean, paired_difference, sign_test

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class AttributedPrompt:
    """One prompt and its reply."""

    text: str
    reply: str
    tokens: tuple[str, ...]
    outputs: tuple[str, ...]
    """Reply tokens that were attributed."""
    reply_ids: tuple[int, ...]
    span: tuple[int, int]
    """Tokens [start, end) of the instruction."""
    scores: Array
    """S `[tokens, outputs]`."""
    density: Array
    held: Array
    """K_n / M."""
    score: float
    """I of the instruction."""
    random_score: float
    """I of a random span of equal length."""
    drop: float
    """Mean log-probability of a reply token lost when the densest tokens are ablated."""
    random_drop: float
    """The same for as many random tokens."""
    followed: bool | None


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attributions of one model."""

    model: dict[str, Any]
    config: AttributeConfig
    prompts: tuple[AttributedPrompt, ...]
    short: int
    """Prompts left out, whose replies had under five tokens."""
    seconds: float
    comparison: dict[str, Any] | None = None
    """Against a tuned model on the same prompts, see `compare_attributions`."""

    def __repr__(self) -> str:
        score = np.mean([prompt.score for prompt in self.prompts])
        random = np.mean([prompt.random_score for prompt in self.prompts])
        return (
            f"Attribution({len(self.prompts)} prompts, {self.config.method}: I {score:.3f}, random "
            f"span {random:.3f})"
        )

    @property
    def tensors(self) -> dict[str, Array]:
        """S of every prompt."""
        return {f"scores.{i}": prompt.scores for i, prompt in enumerate(self.prompts)}

    def summary(self) -> dict[str, Any]:
        """Means with bootstrap intervals over prompts, and the check by ablation."""
        found: dict[str, Any] = {}
        for key in ("score", "random_score", "drop", "random_drop"):
            values = [getattr(prompt, key) for prompt in self.prompts]
            found[key] = _mean(values, self.config.seed)
        gaps = [prompt.score for prompt in self.prompts], [p.random_score for p in self.prompts]
        found["above_random_p"] = sign_test(*gaps)[2]
        followed = [p.score for p in self.prompts if p.followed is True]
        unfollowed = [p.score for p in self.prompts if p.followed is False]
        found["followed"] = {"n": len(followed), **_mean(followed, self.config.seed)}
        found["unfollowed"] = {"n": len(unfollowed), **_mean(unfollowed, self.config.seed)}
        found["followed_p"] = welch(followed, unfollowed)
        return found

    def to_frame(self) -> Any:
        """A row for each prompt, as a pandas DataFrame."""
        import pandas

        keys = ("text", "reply", "score", "random_score", "drop", "random_drop", "followed")
        return pandas.DataFrame([{k: getattr(p, k) for k in keys} for p in self.prompts])

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready; S to four digits."""
        rows = []
        for prompt in self.prompts:
            row = {key: value for key, value in vars(prompt).items() if key != "reply_ids"}
            row["scores"] = [[float(f"{x:.4g}") for x in line] for line in prompt.scores]
            row["density"], row["held"] = prompt.density.tolist(), prompt.held.tolist()
            rows.append(row)
        return {
            "schema_version": 1,
            "model": self.model,
            "settings": asdict(self.config),
            "summary": self.summary(),
            "comparison": self.comparison,
            "short": self.short,
            "prompts": rows,
            "seconds": self.seconds,
        }


def _mean(values: Sequence[float], seed: int) -> dict[str, float | None]:
    if not values:
        return {"value": None, "low": None, "high": None}
    found = bootstrap_mean(values, seed=seed)
    enough = len(values) >= FEWEST_GROUPS
    return {
        "value": found.value,
        "low": found.low if enough else None,
        "high": found.high if enough else None,
    }


def welch(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """One-sided p of Welch's t test that `ours` is larger; None with fewer than two on a side, or
    where neither varies."""
    from scipy.stats import ttest_ind

    if min(len(ours), len(theirs)) < 2 or not (np.ptp(ours) or np.ptp(theirs)):
        return None
    return float(ttest_ind(ours, theirs, equal_var=False, alternative="greater").pvalue)


def compare_attributions(base: Attribution, tuned: Attribution) -> dict[str, Any]:
    """I of two models on the same prompts: the paired difference with its bootstrap interval, the
    exact sign test, and beside them Welch's test, which takes the prompts for independent samples.

    Raises UserError where no prompt has a reply long enough in both.
    """
    first = {prompt.text: prompt for prompt in base.prompts}
    both = [(first[p.text], p) for p in tuned.prompts if p.text in first]
    if not both:
        raise UserError("no prompt has a reply of five tokens in both models: give others")
    ours = [after.score for _, after in both]
    theirs = [before.score for before, _ in both]
    found = paired_difference(ours, theirs, seed=base.config.seed)
    more, less, p = sign_test(ours, theirs)
    enough = len(both) >= FEWEST_GROUPS
    return {
        "tuned": tuned.model,
        "n": len(both),
        "base_score": float(np.mean(theirs)),
        "tuned_score": float(np.mean(ours)),
        "difference": found.value,
        "low": found.low if enough else None,
        "high": found.high if enough else None,
        "above": more,
        "below": less,
        "sign_p": p,
        "welch_p": welch(ours, theirs),
        "reply_tokens": [float(np.mean([len(pair[side].reply_ids) for pair in both]))
                         for side in (0, 1)],
    }  # fmt: skip
