"""From a model and a task to a plan that steers as an instruction does, within a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.model.sae_places import is_plain
from saesteer.steering.evaluation.arms import Decoding, contents_to_grade
from saesteer.steering.evaluation.damage import NeutralProbe, neutral_questions
from saesteer.steering.finding.found import Found, LatentResult, budget_problems
from saesteer.steering.finding.gating import Gate, find_gate
from saesteer.steering.finding.latents import LatentPhases
from saesteer.steering.finding.phases import Phases, ReadConfig, random_phases, read_phases
from saesteer.steering.finding.scoring import Score, Scorer
from saesteer.steering.finding.search import Search, SearchConfig, Tried
from saesteer.steering.finding.setting import Proposals, Setting
from saesteer.steering.grades.grade import Grader
from saesteer.steering.plans.plan import Condition, Plan
from saesteer.steering.tasks.task import Task, load_task

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Shares of the directions' squared length that latents are tried at."""
KEPT_EFFECT = 0.9
"""Of the directions' effect, what the latents that are chosen have to keep."""


@dataclass(frozen=True, kw_only=True)
class FindConfig:
    """What is spent, on what, and how much damage is allowed."""

    budget_minutes: float = 20.0
    """For everything, the report on test contents included; at least one batch is searched."""
    read: ReadConfig = field(default_factory=ReadConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    dev: int = 24
    """Development contents."""
    test: int = 40
    """Test contents, for the report; fewer where the budget is short."""
    when: bool = False
    """Add a condition, so that the plan acts on prompts like the task's contents alone."""
    narrow: bool = False
    """Budget what happens to unrelated prompts, as for a plan with a condition."""
    side_by_side: bool = False
    """Report each phase alone, random directions of the same lengths, and steering together with
    the instruction as well."""
    quality_budget: float = 0.15
    """Largest loss of `fluent` and of `faithful` against the prompted answers."""
    neutral_budget: float = 0.1
    """Largest rise of the cross-entropy on unrelated prompts, in nats a token, where budgeted."""
    latents: int = 64
    """Most latents for each phase at each layer."""
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget_minutes", "dev", "test", "latents"):
            if not getattr(self, name) > 0:
                raise UsageError(f"`{name}` must be above 0, got {getattr(self, name)}")

    def with_seed(self, seed: int) -> "FindConfig":
        """The same with one seed for reading, searching and answering."""
        read, search = replace(self.read, seed=seed), replace(self.search, seed=seed)
        return replace(self, read=read, search=search, seed=seed)

    @property
    def decoding(self) -> Decoding:
        """How answers are generated."""
        return Decoding(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=self.search.rows,
        )


def find(
    model: str | LanguageModel,
    task: str | Path | Task,
    saes: Sequence[str | Path | SAE] = (),
    config: FindConfig = FindConfig(),  # noqa: B008 (frozen: one may serve all)
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Find a plan for a task: layers, phases, doses, methods and schedule, searched together.

    Reads what the instruction does at the prompt's tail and at replies in every layer, tries
    windows of layers, searches settings on development contents, and reports once on test contents,
    beside the unsteered and the prompted model and the mean difference at the best single layer.

    Args:
        saes: SAEs at some layers. The result then has a plan in their latents too: the fewest at
            each layer that keep 90 % of the effect of the directions at those layers.

    Raises:
        UserError: a task without a check, or without train, dev or test contents; an SAE that does
            not fit the model.
    """
    task = task if isinstance(task, Task) else load_task(task)
    dev = contents_to_grade(task, "dev")[: config.dev]
    test = contents_to_grade(task, "test")[: config.test]
    lm = as_language_model(model, device=device, dtype=dtype)
    opened = [sae if isinstance(sae, SAE) else load_sae(str(sae)) for sae in saes]
    for sae in opened:  # before minutes of sampling
        if not is_plain(sae):
            raise UserError(
                f"`sae` {sae.source or '(in memory)'} reads or writes several places: give SAEs of "
                "one place, no transcoder or crosscoder"
            )
    return _Finding(lm, task, opened, config, dev, test, progress, clock).run()


@dataclass(eq=False)
class _Finding:
    """One run of `find`."""

    lm: LanguageModel
    task: Task
    saes: Sequence[SAE]
    config: FindConfig
    dev: Sequence[str]
    test: Sequence[str]
    progress: Progress
    clock: Callable[[], float]

    def run(self) -> Found:
        """All stages."""
        config, began = self.config, self.clock()
        phases = read_phases(self.lm, self.task, config.read, progress=self.progress)
        proposals = Proposals(self.lm, self.task, phases)
        wrapped = self._latent_phases(phases)
        answering = self.clock()
        scorer = self._scorer(self.dev, self.task.instruction, None)
        seconds_per_row = (self.clock() - answering) / (2 * len(self.dev))
        search = Search(scorer, proposals, config.search, self.clock)
        reserve = seconds_per_row * self._rows_after_search() * 1.15
        end = began + 60 * config.budget_minutes
        search.scan()
        search.run(end - reserve)
        closer = scorer.judged_by(Grader(self.task, self.lm, own=_outputs(scorer)))
        finals = search.finals(closer)
        probe = NeutralProbe(self.lm, neutral_questions()[1::2])
        chosen, problems = self._chosen(finals, closer.prompted, proposals, probe)
        gate = None if not config.when else self._gate(wrapped)
        plan = proposals.plan(chosen.setting, None if gate is None else gate.condition)
        baseline = self._mean_difference(scorer, proposals)
        in_latents = None
        if wrapped:
            in_latents = self._in_latents(scorer, proposals, wrapped, chosen, plan.when)

        left = end - self.clock()
        each = 1.5 * seconds_per_row * self._arms()
        n = min(len(self.test), max(8, int(left / max(each, 1e-9))))
        judged = self._scorer(self.test[:n], self._asked_on_test(), _outputs(scorer))
        plans = {"mean_difference": proposals.plan(baseline), "steered": plan}
        if in_latents is not None:
            plans["directions_at_saes"] = in_latents.directions
            plans["steered_latents"] = in_latents.plan
        if config.side_by_side:
            plans.update(self._controls(phases, chosen.setting, plan))
        everything = range(n)
        scores = judged.scores(list(plans.values()), everything, "report on test contents")
        arms = {
            "unsteered": judged.unsteered,
            "prompted": judged.prompted,
            **dict(zip(plans, scores, strict=True)),
        }
        if config.side_by_side:
            stage = "report: steered and prompted"
            (arms["steered+prompted"],) = judged.scores([plan], everything, stage, prompted=True)
        damage = {
            name: probe.measure(one, flips=True) for name, one in self._damaged(plans, plan).items()
        }
        problems += self._neutral_problems(damage["steered"].delta_ce, gate)
        return Found(
            task=self.task,
            lm=self.lm,
            config=config,
            plan=plan,
            chosen=chosen,
            arms=arms,
            tried=tuple(search.tried),
            damage=damage,
            problems=tuple(dict.fromkeys(problems)),
            gate=gate,
            latents=in_latents,
            replies_used=phases.replies_used,
            seconds=self.clock() - began,
        )

    def _scorer(self, contents: Sequence[str], wording: str, own: Sequence[str] | None) -> Scorer:
        """With `own` answers the unsteered model judges how natural answers are, too."""
        judge = None if own is None else self.lm
        grader = Grader(self.task, judge, own=own or ())
        decoding = self.config.decoding
        if own is not None:
            # Other random numbers than those that the plan was chosen with.
            decoding = replace(decoding, seed=decoding.seed + 1)
        return Scorer(self.lm, self.task, contents, grader, decoding, wording, self.progress)

    def _asked_on_test(self) -> str:
        return next((v.text for v in self.task.evaluate_variants), self.task.instruction)

    def _arms(self) -> int:
        return 4 + 2 * bool(self.saes) + 4 * self.config.side_by_side

    def _rows_after_search(self) -> float:
        """Answers that the stages after the search make; those that the model itself judges as well
        count half as much again."""
        search = self.config.search
        finals = search.finalists * len(self.dev)
        latents = 3 * search.rows if self.saes else 0
        neutral = 64
        judged = 1.5 * (finals + self._arms() * len(self.test))
        return judged + 2 * search.rows + latents + neutral

    def _chosen(
        self, finals: Sequence[Tried], prompted: Score, proposals: Proposals, probe: NeutralProbe
    ) -> tuple[Tried, list[str]]:
        """The best setting within the budget; else the best one, with what it breaks."""
        found = []
        for one in finals:
            problems = budget_problems(one.score, prompted, self.config.quality_budget)
            if self.config.narrow and not self.config.when and not problems:
                cost = probe.measure(proposals.plan(one.setting)).delta_ce
                problems += self._neutral_problems(cost, None)
            if not problems:
                return one, []
            found.append((one, problems))
        return found[0]

    def _neutral_problems(self, cost: float, gate: Gate | None) -> list[str]:
        limit = self.config.neutral_budget
        if cost <= limit or not (self.config.narrow or gate is not None):
            return []
        return [f"unrelated prompts: {cost:.2g} nats a token, allowed are {limit:g}"]

    def _gate(self, wrapped: Sequence[LatentPhases]) -> Gate:
        """A condition from train contents and the questions that damage is not measured on."""
        contents = list(self.task.contents.get("train", ()))[: self.config.read.contents]
        others = [question.prompt for question in neutral_questions()[::2]]
        return find_gate(self.lm, contents, others, saes=[one.sae for one in wrapped])

    def _controls(self, phases: Phases, setting: Setting, plan: Plan) -> dict[str, Plan]:
        """Each phase of a setting alone, and random directions of the same lengths."""
        alone = {
            "tail_only": replace(setting, reply_layers=(), reply_dose=0.0),
            "replies_only": replace(setting, tail_layers=(), tail_dose=0.0),
        }
        proposals = Proposals(self.lm, self.task, phases)
        found = {
            name: proposals.plan(one, plan.when)
            for name, one in alone.items()
            if setting.phases == "both"
        }
        noise = Proposals(self.lm, self.task, random_phases(phases, self.config.seed))
        return {**found, "random": noise.plan(setting, plan.when)}

    def _damaged(self, plans: dict[str, Plan], plan: Plan) -> dict[str, Plan]:
        """The plans whose damage on unrelated prompts is measured."""
        names = "steered", "steered_latents"
        found: dict[str, Plan] = {name: plans[name] for name in names if name in plans}
        if plan.when is not None:
            found["steered_without_condition"] = plan.with_changes(when=None)
        return found

    def _mean_difference(self, scorer: Scorer, proposals: Proposals) -> Setting:
        """One layer, one vector at replies: the best of some layers and doses."""
        n = self.lm.n_layers
        layers = sorted({round((n - 1) * i / 8) for i in range(1, 9)})
        settings = [Setting((), 0.0, (layer,), dose) for layer in layers for dose in (0.6, 1.2)]
        contents = len(scorer.contents)
        few = range(min(max(1, self.config.search.rows // len(settings)), contents))
        more = range(min(self.config.search.first, contents))
        for places, kept in ((few, 4), (more, 1)):
            plans = [proposals.plan(setting) for setting in settings]
            scores = scorer.scores(plans, places, "mean difference at one layer")
            order = sorted(range(len(settings)), key=lambda i: -scores[i].value)  # noqa: B023
            settings = [settings[i] for i in order[:kept]]
        return settings[0]

    def _latent_phases(self, phases: Phases) -> list[LatentPhases]:
        found = [
            LatentPhases.of(
                self.lm, sae, phases.tail, phases.replies, phases.scope, self.config.latents
            )
            for sae in self.saes
        ]
        layers = [one.layer for one in found]
        if len(set(layers)) < len(layers):
            raise UserError("`sae` names two SAEs of one layer: give one for each layer")
        return found

    def _in_latents(
        self,
        scorer: Scorer,
        proposals: Proposals,
        wrapped: Sequence[LatentPhases],
        chosen: Tried,
        when: Condition | None,
    ) -> LatentResult:
        """Directions at the SAEs' layers alone, then the fewest latents that do nearly as much.

        Each phase at each layer takes as many as hold the same share of its squared length.
        """
        layers = tuple(sorted(one.layer for one in wrapped))
        places = range(min(self.config.search.first, len(scorer.contents)))
        few = max(2, self.config.search.rows // len(places))
        total = max(chosen.setting.reply_dose * len(chosen.setting.reply_layers), 0.8)
        schedule = chosen.setting.schedule
        # Few layers have to do what many did: the doses of each are larger.
        tries = [
            Setting(layers, a, layers, min(share * total / len(layers), 2.5), "set-to", schedule)
            for a in (1.5, 2.2)
            for share in (0.6, 1.0, 1.5, 2.2)
        ][:few]
        stage = "directions at the SAEs' layers"
        scores = scorer.scores([proposals.plan(one) for one in tries], places, stage)
        best = max(range(len(tries)), key=lambda i: scores[i].value)
        setting, whole = tries[best], scores[best]
        floor = Score(scorer.unsteered.marks[: len(places)], scorer.scale).value
        shares = SHARES[-few:]
        candidates = [self._latent_plan(proposals, wrapped, setting, share) for share in shares]
        tried = scorer.scores(candidates, places, "latents in place of directions")
        ranked = sorted(range(len(tried)), key=lambda i: -tried[i].value)
        enough = [i for i in range(len(tried)) if _keeps(tried[i], whole, floor)]
        # A few contents flatter whichever does best on them: those in question answer more.
        short = sorted((enough or ranked)[:3])
        more = range(len(places), len(scorer.contents))
        if more:
            asked = [proposals.plan(setting), *(candidates[i] for i in short)]
            stage = "latents on more contents"
            whole, *others = (
                before.joined(after)
                for before, after in zip(
                    [whole, *(tried[i] for i in short)],
                    scorer.scores(asked, more, stage),
                    strict=True,
                )
            )
            floor = scorer.unsteered.value
            for i, score in zip(short, others, strict=True):
                tried[i] = score
        enough = [i for i in short if _keeps(tried[i], whole, floor)]
        pick = enough[0] if enough else max(short, key=lambda i: tried[i].value)
        counts = [sum(len(part.latents) for part in plan.parts) for plan in candidates]
        return LatentResult(
            plan=candidates[pick].with_changes(when=when),
            directions=proposals.plan(setting, when),
            setting=setting,
            latents=counts[pick],
            effect_kept=_ratio(tried[pick].value - floor, whole.value - floor),
            by_share=tuple(
                (share, count, score.value)
                for share, count, score in zip(shares, counts, tried, strict=True)
            ),
            directions_value=whole.value,
            unsteered_value=floor,
            layers=tuple(one.row(shares[pick], self.lm) for one in wrapped),
        )

    def _latent_plan(
        self, proposals: Proposals, wrapped: Sequence[LatentPhases], setting: Setting, share: float
    ) -> Plan:
        tails, replies = (
            {one.layer: one.part(self.lm, phase, one.count(phase, share)) for one in wrapped}
            for phase in ("tail", "replies")
        )
        return proposals.with_parts(tails, replies).plan(setting)


def _keeps(latents: Score, directions: Score, floor: float) -> bool:
    """Whether latents keep enough of what directions do beyond the unsteered model."""
    return latents.value >= floor + KEPT_EFFECT * (directions.value - floor)


def _outputs(scorer: Scorer) -> list[str]:
    """The model's own answers, plain and prompted: what is natural to it."""
    return [mark.output for one in (scorer.unsteered, scorer.prompted) for mark in one.marks]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
