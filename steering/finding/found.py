"""What `find` found: the plan, the report on test contents, and the files of both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.files import plain, write_json, write_text
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.found_pages import latent_pages
from saesteer.sae.runs.facts import model_facts
from saesteer.steering.evaluation.damage import Damage
from saesteer.steering.finding.gating import Gate
from saesteer.steering.finding.scoring import Score
from saesteer.steering.finding.search import Tried
from saesteer.steering.finding.setting import Setting
from saesteer.steering.grades.grade import DEFINITIONS
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import save_plan
from saesteer.steering.reports.find_page import render_find
from saesteer.steering.tasks.task import Task

if TYPE_CHECKING:
    from saesteer.steering.finding.find import FindConfig

LATENT_FOLDER = "latents"
"""The folder of the plan in latents, inside that of the plan."""


@dataclass(frozen=True, kw_only=True)
class LatentResult:
    """The plan in latents, beside directions at the same layers."""

    plan: Plan
    directions: Plan
    setting: Setting
    latents: int
    """Of both phases at all layers."""
    effect_kept: float | None
    """Of the directions' effect on development contents; None where they have none."""
    by_share: tuple[tuple[float, int, float], ...]
    """Shares of the directions' squared length, the latents that they take, and the search's value
    with these."""
    directions_value: float
    unsteered_value: float
    layers: tuple[Mapping[str, object], ...]

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "setting": self.setting.row(),
            "latents": self.latents,
            "effect_kept": self.effect_kept,
            "by_share": [
                {"share": share, "latents": count, "value": value}
                for share, count, value in self.by_share
            ],
            "value_of_directions": self.directions_value,
            "value_unsteered": self.unsteered_value,
            "layers": [dict(layer) for layer in self.layers],
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search."""

    task: Task
    lm: LanguageModel
    config: "FindConfig"
    plan: Plan
    chosen: Tried
    arms: Mapping[str, Score]
    """On test contents: unsteered, prompted, mean_difference, steered and, with SAEs,
    directions_at_saes and steered_latents."""
    tried: tuple[Tried, ...]
    """On development contents, in the order in which they were tried."""
    damage: Mapping[str, Damage]
    """On unrelated questions: `steered`, and `steered_without_condition` where it has one."""
    problems: tuple[str, ...]
    """What is over the budget."""
    gate: Gate | None
    latents: LatentResult | None
    replies_used: tuple[int, int]
    seconds: float

    @property
    def within_budget(self) -> bool:
        """Whether nothing is over the budget."""
        return not self.problems

    def final_plan(self) -> Plan:
        """The plan, with what was found about it in its metrics."""
        return _with_facts(self.plan, self, "steered")

    def document(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        gate = self.gate
        return {
            "schema_version": 1,
            "task": {"name": self.task.name, "hash": self.task.hash},
            "model": model_facts(self.lm),
            "definitions": dict(DEFINITIONS),
            "seconds": self.seconds,
            "arms": {name: score.row() for name, score in self.arms.items()},
            "setting": self.chosen.setting.row(),
            "within_budget": self.within_budget,
            "over_budget": list(self.problems),
            "damage": {name: damage.row() for name, damage in self.damage.items()},
            "when": None
            if gate is None
            else {
                "source": gate.condition.source,
                "layer": gate.condition.layer,
                "contents_kept": gate.kept,
                "others_stopped": gate.stopped,
            },
            "latents": None if self.latents is None else self.latents.row(),
            "replies_that_follow": list(self.replies_used),
            "tried": [
                {
                    "stage": one.stage,
                    "setting": one.setting.row(),
                    "says": str(one.setting),
                    **one.score.row(samples=1),
                }
                for one in self.tried
            ],
            "config": plain(asdict(self.config)),
        }


def _with_facts(plan: Plan, found: Found, arm: str) -> Plan:
    score = found.arms[arm]
    facts = {
        "task": found.task.name,
        "test_contents": len(score.marks),
        **score.rates(),
        "neutral_nats": None if arm not in found.damage else found.damage[arm].delta_ce,
        "within_budget": found.within_budget,
        "over_budget": list(found.problems),
    }
    return plan.with_changes(metrics={**plan.metrics, "find": facts})


def save_found(folder: str | Path, found: Found) -> dict[str, Any]:
    """Write the plan, `find.json`, `find.html` and, in a folder inside, the plan in latents.

    Returns the document.
    """
    folder = Path(folder)
    document = found.document()
    save_plan(found.final_plan(), folder)
    if found.latents is not None:
        latents = _with_facts(found.latents.plan, found, "steered_latents")
        save_plan(latents, folder / LATENT_FOLDER)
    write_json(folder / "find.json", document)
    near = [folder.parent]
    if found.latents is not None:
        near += [Path(str(row["sae"])) for row in found.latents.layers]
    pages = latent_pages((), near, folder)
    write_text(folder / "find.html", render_find([document], f"Found: {found.task.name}", pages))
    return document


def budget_problems(score: Score, prompted: Score, limit: float) -> list[str]:
    """Losses of quality and of ability within the task against the prompted answers."""
    found = []
    for grade in _BUDGETED:
        ours, theirs = score.rate(grade), prompted.rate(grade)
        if ours is not None and theirs is not None and theirs.value - ours.value > limit:
            found.append(
                f"{grade}: {ours.value:.2f} against {theirs.value:.2f} prompted, allowed is a "
                f"loss of {limit:g}"
            )
    return found


_BUDGETED: Sequence[str] = ("fluent", "faithful")
