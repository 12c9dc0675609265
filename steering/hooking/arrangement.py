"""Which parts steer which rows: one plan for all rows, several plans in turn, or one per row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.hooks import SITES
from saesteer.steering.plans.part import PlanPart
from saesteer.steering.plans.plan import Condition, Plan, TaskIdentity
from saesteer.steering.plans.plan_file import load_plan

OnePlan = Plan | str | Path


@dataclass(frozen=True, eq=False)
class ByRow:
    """A plan for each row of a batch; None for rows that are not steered.

    There is one row per prompt, before beams and returned sequences multiply them. Plans whose
    parts add a vector at the same hook point by the same method, unit and schedule share one hook,
    and so cost no more than one plan.
    """

    plans: Sequence[OnePlan | None]
    rows: Callable[[int], Sequence[int]] | None = None
    """For several calls of `generate` inside one context: from the number of the call to the index
    in `plans` for each of its rows. By default every call has the rows of `plans`."""


Plans = OnePlan | ByRow | Sequence[OnePlan | ByRow]


@dataclass(frozen=True, eq=False)
class Group:
    """The parts that one hook applies: a single part, or alike parts of different rows' plans."""

    parts: tuple[PlanPart, ...]
    tasks: tuple[TaskIdentity | None, ...]
    """The task of the plan that each part belongs to."""
    conditions: tuple[Condition | None, ...]
    """What decides for each row whether that plan acts in it."""
    row_part: tuple[int, ...] | None = None
    """For each row of `ByRow.plans`, an index into `parts`, or -1; None: every row has part 0."""
    rows: Callable[[int], Sequence[int]] | None = None

    @property
    def is_off(self) -> bool:
        """Whether nothing is edited. A part with scale 0 never shares a group."""
        return self.parts[0].scale == 0

    def parts_of(self, call: int, count: int) -> list[int]:
        """For each row of a call, the index in `parts` of its part, or -1 for none of them.

        Raises UsageError when there are not as many plans as rows.
        """
        if self.row_part is None:
            return [0] * count
        if self.rows is None:
            chosen = list(self.row_part)
        else:
            chosen = [self.row_part[i] for i in self.rows(call)]
        if len(chosen) != count:
            raise UsageError(
                f"ByRow has plans for {len(chosen)} rows and the model was given {count} prompts: "
                "give one plan, or None, for each"
            )
        return chosen


@dataclass(frozen=True, eq=False)
class Arranged:
    """One of the plans given to `steer`, or one `ByRow`, as groups of parts."""

    plans: tuple[Plan, ...]
    groups: tuple[Group, ...]
    """In the order in which they edit. A plan has one group for each of its parts."""
    by_row: bool


def arrange(plans: Plans, changes: Mapping[str, Any]) -> list[Arranged]:
    """The groups of parts of each plan or `ByRow` given, in their order.

    `changes` replaces fields of every plan, see `Plan.with_changes`. Raises UsageError when there
    is no plan.
    """
    many = [plans] if isinstance(plans, Plan | str | Path | ByRow) else list(plans)
    if not many:
        raise UsageError("steer was given an empty list of plans: give at least one")
    return [
        _by_row(one, changes) if isinstance(one, ByRow) else _one(_opened(one, changes))
        for one in many
    ]


def _one(plan: Plan) -> Arranged:
    groups = tuple(Group((part,), (plan.task,), (plan.when,)) for part in plan.parts)
    return Arranged((plan,), groups, by_row=False)


def _by_row(rows: ByRow, changes: Mapping[str, Any]) -> Arranged:
    # A plan that several rows share is one plan.
    distinct: dict[Any, int] = {}
    opened: list[Plan] = []
    places: list[int] = []
    for plan in rows.plans:
        if plan is None:
            places.append(-1)
            continue
        key = id(plan) if isinstance(plan, Plan) else str(plan)
        if key not in distinct:
            distinct[key] = len(opened)
            opened.append(_opened(plan, changes))
        places.append(distinct[key])
    if not opened:
        raise UsageError("ByRow has no plan for any row: give at least one")
    groups: list[Group] = []
    unshared = count()
    # All first parts, then all second ones, so that the parts of each plan keep their order.
    alike: dict[tuple[int, Any], dict[int, PlanPart]] = {}
    for i, plan in enumerate(opened):
        for number, part in zip(_turns(plan), plan.parts, strict=True):
            kind = _kind(part) or (next(unshared),)
            alike.setdefault((number, kind), {})[i] = part
    for _, members in sorted(alike.items(), key=lambda entry: entry[0][0]):
        order = {i: place for place, i in enumerate(members)}
        groups.append(
            Group(
                tuple(members.values()),
                tuple(opened[i].task for i in members),
                tuple(opened[i].when for i in members),
                tuple(order.get(i, -1) for i in places),
                rows.rows,
            )
        )
    return Arranged(tuple(opened), tuple(groups), by_row=True)


def _turns(plan: Plan) -> list[int]:
    """For each part, how many of its plan have to edit before it.

    Those are the earlier ones at its own place; a module's path may be any place.
    """
    places = [(part.layer, part.site) for part in plan.parts]
    if any(site not in SITES for _, site in places):
        return list(range(len(places)))
    return [places[:number].count(place) for number, place in enumerate(places)]


def _kind(part: PlanPart) -> tuple[Any, ...] | None:
    """What parts must have in common to share a hook; None for a part that shares none."""
    if part.does.sums and not part.gate and part.scale != 0:
        scaled = part.sae.normalize_activations
        places = 0 if part.by_place is None else len(part.by_place)
        how = part.method, part.unit == "rel", part.schedule, scaled, places
        return part.layer, part.site, *how
    return None


def _opened(plan: OnePlan, changes: Mapping[str, Any]) -> Plan:
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    return plan.with_changes(**changes) if changes else plan
