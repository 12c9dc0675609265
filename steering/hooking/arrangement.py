"""Which parts steer which rows: one plan for all rows, several plans in turn, or one per row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.plans.part import PlanPart
from saesteer.steering.plans.plan import Plan, TaskIdentity
from saesteer.steering.plans.plan_file import load_plan

OnePlan = Plan | str | Path


@dataclass(frozen=True, eq=False)
class ByRow:
    """A plan for each row of a batch; None for rows that are not steered.

    There is one row per prompt, before beams and returned sequences multiply them. Plans whose
    parts add a vector at the same hook point by the same method, unit and schedule share one hook
    and so cost no more than one plan.
    """

    plans: Sequence[OnePlan | None]
    rows: Callable[[int], Sequence[int]] | None = None
    """For several calls of `generate` inside one context: from the number of the call to the index
    in `plans` for each of its rows. By default every call has the rows of `plans`."""


Plans = OnePlan | ByRow | Sequence[OnePlan | ByRow]


@dataclass(frozen=True, eq=False)
class Group:
    """The parts that one hook applies: a single part, or adding parts of different rows' plans."""

    parts: tuple[PlanPart, ...]
    tasks: tuple[TaskIdentity | None, ...]
    """The task of the plan that each part belongs to."""
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
    groups = tuple(Group((part,), (plan.task,)) for part in plan.parts)
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
    # All first parts, then all second ones, so that the parts of each plan keep their order.
    for number in range(max(len(plan.parts) for plan in opened)):
        unshared = count()
        alike: dict[Any, list[int]] = {}
        for i, plan in enumerate(opened):
            if number < len(plan.parts):
                kind = _kind(plan.parts[number]) or (next(unshared),)
                alike.setdefault(kind, []).append(i)
        groups += [
            Group(
                tuple(opened[i].parts[number] for i in members),
                tuple(opened[i].task for i in members),
                tuple(members.index(i) if i in members else -1 for i in places),
                rows.rows,
            )
            for members in alike.values()
        ]
    return Arranged(tuple(opened), tuple(groups), by_row=True)


def _kind(part: PlanPart) -> tuple[Any, ...] | None:
    """What parts must have in common to share a hook; None for a part that shares none."""
    if part.does.adds and not part.gate and part.scale != 0:
        scaled = part.sae.normalize_activations
        return part.layer, part.site, part.method, part.unit == "rel", part.schedule, scaled
    return None


def _opened(plan: OnePlan, changes: Mapping[str, Any]) -> Plan:
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    return plan.with_changes(**changes) if changes else plan
