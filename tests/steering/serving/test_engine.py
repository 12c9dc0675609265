"""What a row is answered does not depend on the rows beside it."""

from collections.abc import Callable

import pytest
import torch

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.generation import SteeredText, generate_steered
from saesteer.steering.plans.plan import Plan

from ..small_plans import small_plan
from .engine_help import ask, ask_all, generation, in_float64, running

TEXTS = (
    "The museum opens at nine.",
    "Rain",
    "Peter bought three oranges and a melon, and carried them home in a paper bag.",
    "Two words",
    "A list of the rivers of the north, from the longest to the shortest one of them",
    "x",
)
LENGTHS = (12, 5, 9, 14, 3, 8)


def plans_of(lm: LanguageModel) -> list[Plan | None]:
    """One for each text, of every kind that rows can have side by side."""
    add = small_plan(lm, [3, 5], method="add", scale=0.4)
    return [
        add,
        None,
        small_plan(lm, [2], method="add-keep-norm", scale=0.7, schedule="linear:6"),
        add.with_changes(scale=-0.3, scope="first:3"),
        small_plan(lm, [1, 4], method="project"),
        add.with_changes(unit="rel", scale=0.5, scope="all", schedule="decay:1,2"),
    ]


def expected(lm: LanguageModel, plans: list[Plan | None], **fields: object) -> list[SteeredText]:
    """What `steer` answers each text alone."""
    return [
        generate_steered(lm, [text], plan, max_new_tokens=length, **fields)[0]
        for text, plan, length in zip(TEXTS, plans, LENGTHS, strict=True)
    ]


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "one by one"])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_rows_are_answered_as_steer_answers_them_alone(
    lm: LanguageModel, apart: bool, rows: int
) -> None:
    in_float64(lm)
    plans = plans_of(lm)
    wanted = expected(lm, plans)
    requests = [
        generation(lm, text, plans=[plan] if plan else [], max_new_tokens=length)
        for text, plan, length in zip(TEXTS, plans, LENGTHS, strict=True)
    ]
    with running(lm, settings={"max_batch": rows}) as engine:
        found = ask_all(engine, requests, apart=apart)
    assert [list(a.facts().token_ids) for a in found] == [one.token_ids for one in wanted]
    assert [a.text().strip() for a in found] == [one.completion for one in wanted]
    assert len({tuple(a.facts().token_ids) for a in found}) == len(TEXTS)  # they do differ
    for answers, one in zip(found, wanted, strict=True):
        assert answers.facts().tokens_touched == one.tokens_touched
        if one.relative_dose is None:
            assert answers.facts().relative_dose is None
        else:
            assert answers.facts().relative_dose == pytest.approx(one.relative_dose, rel=1e-5)
