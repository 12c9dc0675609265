"""The verdict says success and damage alike, and how far figures can be trusted."""

from typing import Any

import pytest

from saesteer.steering.reports.verdict import verdict

RATE = {"value": 0.5, "low": 0.4, "high": 0.6}


def arm(name: str, kind: str, **damage: Any) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "success": {"measure": "strict", **RATE},
        "damage": {"kl": 0.25, **damage} if damage else None,
    }  # fmt: skip


def against(name: str, difference: float, p: float) -> dict[str, Any]:
    return {
        "ours": "steered", "theirs": name, "measure": "strict", "difference": difference,
        "low": difference - 0.1, "high": difference + 0.1, "p_holm": p,
    }  # fmt: skip


def task(*tests: dict[str, Any], n: int = 100, **damage: Any) -> dict[str, Any]:
    arms = [arm("unsteered", "unsteered"), arm("prompted", "prompted")]
    arms += [arm("steered", "steered", **damage), arm("random latents 1", "random")]
    return {"arms": arms, "tests": list(tests), "n": n}


@pytest.mark.parametrize(
    ("tests", "tone", "title"),
    [
        ([(0.4, 0.001), (0.3, 0.01)], "good", "works: better than unsteered and random latents"),
        ([(0.4, 0.001), (0.1, 0.2)], "warn", "better than unsteered, not shown better than random"),
        ([(0.1, 0.4), (0.1, 0.2)], "bad", "not shown to be better than unsteered and random"),
        ([(-0.4, 0.001), (-0.3, 0.01)], "bad", "not shown to be better"),
    ],
)
def test_success(tests: list[tuple[float, float]], tone: str, title: str) -> None:
    names = ("unsteered", "random latents")
    found, *rest = verdict(task(*(against(n, *t) for n, t in zip(names, tests, strict=True))))
    assert (found.tone, rest) == (tone, []) and title in found.title
    assert "strict: 0.50 [0.40, 0.60]; unsteered 0.50" in found.lines[0]
    assert f"p {tests[0][1]:.2g}, Holm" in found.lines[1]


@pytest.mark.parametrize(("wrong", "tone"), [(17, "bad"), (9, "bad"), (4, "warn"), (1, "good")])
def test_damage_is_as_loud_as_success(wrong: int, tone: str) -> None:
    tests = (against("unsteered", 0.4, 0.001),)
    success, damage = verdict(task(*tests, right_to_wrong=wrong, right_before=17))
    assert success.tone == "good" and damage.tone == tone
    assert f"{wrong} of 17 neutral questions that were answered right turn wrong" in damage.title
    assert "0.25 nats a token" in damage.lines[0]
    assert f'class="box tone-{tone}"' in damage.html()


def test_nothing_is_said_of_what_was_not_measured() -> None:
    (found,) = verdict(task())
    assert found.tone == "plain" and "nothing to compare it with" in found.title


@pytest.mark.parametrize(("n", "told"), [(1, "0.50"), (12, "0.28"), (29, "0.18")])
def test_few_contents_are_told(n: int, told: str) -> None:
    *_, few = verdict(task(n=n))
    assert few.tone == "warn" and f"Only {n} content" in few.title and f"± {told}" in few.lines[0]


def test_enough_contents_are_not_told() -> None:
    assert len(verdict(task(n=30))) == 1


def test_text_of_others_is_escaped() -> None:
    given = task()
    given["arms"][2]["name"] = "<script>"
    (found,) = verdict(given)
    assert "<script>" not in found.html() and "&lt;script&gt;" in found.html()
