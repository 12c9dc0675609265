"""Which plans steer which rows: one plan for all, several in turn, one for each row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.plans.methods import ADDING_METHODS
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan

OnePlan = Plan | str | Path


@dataclass(frozen=True, eq=False)
class ByRow:
    """A plan for each row of a batch, None for rows that are left alone.

    The rows are those of the prompts, before beams and returned sequences multiply them. Plans
    that add a vector by the same method, unit and schedule at the same place cost no more together
    than one.
    """

    plans: Sequence[OnePlan | None]
    rows: Callable[[int], Sequence[int]] | None = None
    """For several calls of `generate` inside one context: the number of the call gives the place
    in `plans` of each row's plan. By default every call has the rows of `plans`."""


Plans = OnePlan | ByRow | Sequence[OnePlan | ByRow]


@dataclass(frozen=True, eq=False)
class Group:
    """Plans that one hook makes: one plan, or adding plans of different rows."""

    plans: tuple[Plan, ...]
    row_plan: tuple[int, ...] | None = None
    """For each row of `ByRow.plans`, the place in `plans` or -1; None: every row has plan 0."""
    rows: Callable[[int], Sequence[int]] | None = None

    def plans_of(self, call: int, count: int) -> list[int]:
        """The place in `plans` of each of a call's rows, -1 where another or no plan is meant.

        Raises UsageError when there are not as many plans as rows.
        """
        if self.row_plan is None:
            return [0] * count
        if self.rows is None:
            chosen = list(self.row_plan)
        else:
            chosen = [self.row_plan[i] for i in self.rows(call)]
        if len(chosen) != count:
            raise UsageError(
                f"ByRow has plans for {len(chosen)} rows and the model was given {count} prompts: "
                "give one plan, or None, for each"
            )
        return chosen


def arrange(plans: Plans, changes: Mapping[str, Any]) -> list[list[Group]]:
    """The groups of hooks that each of the plans given asks for, in their order.

    `changes` replaces fields of every plan. Raises UsageError when there is no plan.
    """
    many = [plans] if isinstance(plans, Plan | str | Path | ByRow) else list(plans)
    if not many:
        raise UsageError("steer was given an empty list of plans: give at least one")
    return [_groups(one, changes) for one in many]


def _groups(one: OnePlan | ByRow, changes: Mapping[str, Any]) -> list[Group]:
    if not isinstance(one, ByRow):
        return [Group((_changed(one, changes),))]
    # A plan that several rows share is one plan.
    distinct: dict[Any, int] = {}
    opened: list[Plan] = []
    places: list[int] = []
    for plan in one.plans:
        if plan is None:
            places.append(-1)
            continue
        key = id(plan) if isinstance(plan, Plan) else str(plan)
        if key not in distinct:
            distinct[key] = len(opened)
            opened.append(_changed(plan, changes))
        places.append(distinct[key])
    if not opened:
        raise UsageError("ByRow has no plan for any row: give at least one")
    groups: dict[Any, list[int]] = {}
    for i, plan in enumerate(opened):
        groups.setdefault(_kind(plan, i), []).append(i)
    return [
        Group(
            tuple(opened[i] for i in members),
            tuple(members.index(i) if i in members else -1 for i in places),
            one.rows,
        )
        for members in groups.values()
    ]


def _kind(plan: Plan, number: int) -> tuple[Any, ...]:
    """Plans of one kind share a hook."""
    if plan.method in ADDING_METHODS and not plan.gate and plan.scale != 0:
        scaled = plan.sae.normalize_activations
        return plan.layer, plan.site, plan.method, plan.unit == "rel", plan.schedule, scaled
    return (number,)


def _changed(plan: OnePlan, changes: Mapping[str, Any]) -> Plan:
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    return dataclasses.replace(plan, **changes) if changes else plan
