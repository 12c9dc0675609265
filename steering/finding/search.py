"""The search: layers first, then everything together, with settings as rows of one batch.

Optuna proposes settings (TPE); each is tried on a few contents, and only those that the pruner
leaves go on to more. Settings and contents are rows of the same call of `generate`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.steering.finding.scoring import Score, Scorer
from saesteer.steering.finding.setting import SCHEDULES, Proposals, Setting


@dataclass(frozen=True)
class Tried:
    """A setting and its score on some development contents."""

    setting: Setting
    score: Score
    stage: str
    """`scan`, `first` (pruned after it), `search` or `final`."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the search spends its time."""

    first: int = 8
    """Contents that every setting is tried on."""
    more: int = 16
    """Further contents for those that go on."""
    rows: int = 64
    """Rows of one batch."""
    seed: int = 0
    finalists: int = 4


@dataclass(eq=False)
class Search:
    """Runs the stages and keeps what was tried."""

    scorer: Scorer
    proposals: Proposals
    config: SearchConfig
    clock: Callable[[], float] = time.monotonic
    tried: list[Tried] = field(default_factory=list)
    scanned: list[Tried] = field(default_factory=list)
    """One entry a window of layers, in their order."""

    @property
    def _n(self) -> int:
        return len(self.proposals.phases.replies)

    def _scores(self, settings: Sequence[Setting], places: range, stage: str) -> list[Score]:
        plans = [self.proposals.plan(setting) for setting in settings]
        return self.scorer.scores(plans, places, stage)

    def scan(self) -> list[Tried]:
        """Replies steered at windows of layers, the tail at all of them: where does it work?"""
        n = self._n
        half = max(1, n // 10)
        middles = sorted({round(i * (n - 1) / 9) for i in range(10)})
        settings = []
        for middle in middles:
            window = tuple(range(max(0, middle - half), min(n, middle + half + 1)))
            settings.append(Setting(tuple(range(n)), 1.25, window, 1.5 / len(window)))
        places = range(min(max(4, self.config.rows // len(settings)), len(self.scorer.contents)))
        scores = self._scores(settings, places, "scan layers")
        self.scanned = [Tried(s, score, "scan") for s, score in zip(settings, scores, strict=True)]
        self.tried += self.scanned
        return self.scanned

    def starts(self) -> list[Setting]:
        """Settings that the search begins with: known good ones, and the scan's best window."""
        n = self._n
        everywhere = tuple(range(n))
        middle = tuple(range(round(n * 0.27), round(n * 0.68) + 1))
        found = [
            Setting(everywhere, 1.25, middle, 1.56 / len(middle)),
            Setting(everywhere, 1.5, middle, 1.95 / len(middle)),
            Setting(everywhere, 2.0, (), 0.0),
            Setting((), 0.0, middle, 1.95 / len(middle)),
            Setting(everywhere, 1.5, middle, 1.56 / len(middle), schedule="opening only"),
        ]
        if self.scanned:
            found.append(max(self.scanned, key=lambda one: one.score.value).setting)
        return found

    def run(self, until: float) -> None:
        """Ask, try and tell until the clock says `until`; at least one batch."""
        optuna = _optuna()
        config, n = self.config, self._n
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(
                seed=config.seed, multivariate=True, constant_liar=True, n_startup_trials=12
            ),
            pruner=optuna.pruners.PercentilePruner(50.0, n_startup_trials=6),
        )
        for setting in self.starts():
            study.enqueue_trial(parameters_of(setting, n))
        width = max(1, config.rows // config.first)
        contents = len(self.scorer.contents)
        first = range(min(config.first, contents))
        more = range(len(first), min(len(first) + config.more, contents))
        longest = 0.0
        while True:
            began = self.clock()
            trials = [study.ask() for _ in range(width)]
            settings = [setting_of(trial, n) for trial in trials]
            scores = self._scores(settings, first, f"search, {len(self.tried)} settings tried")
            going = []
            for trial, setting, score in zip(trials, settings, scores, strict=True):
                trial.report(score.value, 0)
                if trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    self.tried.append(Tried(setting, score, "first"))
                else:
                    going.append((trial, setting, score))
            wider: list[Score | None] = [None] * len(going)
            if more and going:
                stage = f"search, {len(going)} settings on more contents"
                wider = [*self._scores([setting for _, setting, _ in going], more, stage)]
            for (trial, setting, score), further in zip(going, wider, strict=True):
                whole = score if further is None else score.joined(further)
                study.tell(trial, whole.value)
                self.tried.append(Tried(setting, whole, "search"))
            longest = max(longest, self.clock() - began)
            if self.clock() + longest > until:
                return

    def finals(self, scorer: Scorer | None = None) -> list[Tried]:
        """The best settings on all development contents, best first; by another scorer, if
        given."""
        best: dict[Setting, Tried] = {}
        for one in self.tried:
            if one.stage == "search" or one.setting not in best:
                best[one.setting] = one
        full = [one for one in best.values() if one.stage == "search"] or list(best.values())
        full.sort(key=lambda one: -one.score.value)
        chosen = [one.setting for one in full[: self.config.finalists]]
        scorer = self.scorer if scorer is None else scorer
        plans = [self.proposals.plan(setting) for setting in chosen]
        scores = scorer.scores(plans, range(len(scorer.contents)), "finalists")
        found = [Tried(s, score, "final") for s, score in zip(chosen, scores, strict=True)]
        found.sort(key=lambda one: -one.score.value)
        self.tried += found
        return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "find searches with Optuna, which is not installed: pip install optuna"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def setting_of(trial: Any, n: int) -> Setting:
    """The setting that an Optuna trial stands for, in a model of n layers."""
    phases = trial.suggest_categorical("phases", ["both", "tail", "replies"])
    tail: tuple[int, ...] = ()
    a, method = 0.0, "set-to"
    half = max(1, n // 2)
    # Every trial has every parameter, so that the sampler sees them together.
    first = trial.suggest_int("tail_first", 0, half)
    last = trial.suggest_int("tail_last", min(half, n - 1), n - 1)
    dose = trial.suggest_float("tail_dose", 0.5, 2.5)
    how = trial.suggest_categorical("method", ["set-to", "add"])
    start = trial.suggest_int("reply_first", 0, n - 1)
    width = trial.suggest_int("reply_width", 1, n)
    total = trial.suggest_float("reply_total", 0.25, 5.0, log=True)
    schedule = trial.suggest_categorical("schedule", list(SCHEDULES))
    if phases != "replies":
        tail, a, method = tuple(range(min(first, last), last + 1)), dose, how
    if phases == "tail":
        return Setting(tail, a, (), 0.0, method)
    replies = tuple(range(start, min(n, start + width)))
    return Setting(tail, a, replies, total / len(replies), method, schedule)


def parameters_of(setting: Setting, n: int) -> dict[str, Any]:
    """The parameters of a trial that gives this setting."""
    half = max(1, n // 2)
    tail = setting.tail_layers or (0, n - 1)
    replies = setting.reply_layers or (n // 3,)
    return {
        "phases": setting.phases,
        "tail_first": min(tail[0], half),
        "tail_last": tail[-1],
        "tail_dose": setting.tail_dose or 1.25,
        "method": setting.method,
        "reply_first": replies[0],
        "reply_width": len(replies),
        "reply_total": (setting.reply_dose or 0.5) * len(replies),
        "schedule": setting.schedule,
    }
