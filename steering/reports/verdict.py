"""What an evaluation says in a few sentences: does steering work, what does it break, how sure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saesteer.sae.reports.parts import Tone, box
from saesteer.steering.evaluation.intervals import difference_text, rate_text

FEW_CONTENTS = 30
"""With fewer contents an interval is wider than ±.17 where a rate is near a half."""
MANY_WRONG = 0.5
SOME_WRONG = 0.1
"""Shares of neutral questions, right before, that turn wrong: a red box, an amber one."""


@dataclass(frozen=True)
class Finding:
    """One box of the verdict."""

    tone: Tone
    title: str
    lines: tuple[str, ...] = ()

    def html(self) -> str:
        return box(self.tone, self.title, self.lines)


def verdict(task: Mapping[str, Any]) -> list[Finding]:
    """Success and damage of every steered arm of a task, and how far to trust the figures."""
    found = []
    for arm in task["arms"]:
        if arm["kind"] == "steered":
            found += [_success(task, arm), *_damage(arm)]
    return [*found, *_few(task)]


def _success(task: Mapping[str, Any], arm: Mapping[str, Any]) -> Finding:
    """Whether the arm beats the unsteered model and random latents, and prompting beside it."""
    measure, rate = arm["success"]["measure"], arm["success"]
    tests = [t for t in task["tests"] if t["ours"] == arm["name"] and t["measure"] == measure]
    lines = [f"{measure}: {rate_text(rate)}" + _others(task, arm)]
    lines += [f"{difference_text(t)} over {t['theirs']} ({_p(t)})" for t in tests]
    rivals = ("unsteered", "random")
    against = [t for t in tests if _kind(task, t["theirs"]) in rivals]
    clear = [t for t in against if t["difference"] > 0 and (t["p_holm"] or 0) < 0.05]
    if not against:
        return Finding("plain", f"{arm['name']}: nothing to compare it with was run", tuple(lines))
    if len(clear) == len(against):
        return Finding("good", f"{arm['name']} works: better than {_names(clear)}", tuple(lines))
    if clear:
        rest = [t for t in against if t not in clear]
        title = f"{arm['name']}: better than {_names(clear)}, not shown better than {_names(rest)}"
        return Finding("warn", title, tuple(lines))
    title = f"{arm['name']}: not shown to be better than {_names(against)}"
    return Finding("bad", title, tuple(lines))


def _others(task: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    """The success of prompting and of doing nothing, for the same sentence."""
    shown = [
        f"{one['name']} {rate_text(one['success'])}"
        for one in task["arms"]
        if one["kind"] in ("prompted", "unsteered") and one is not arm
    ]
    return f"; {', '.join(shown)}" if shown else ""


def _kind(task: Mapping[str, Any], name: str) -> str | None:
    """The kind of the arm that a test compares with; draws of random latents are tested as one."""
    kinds = {arm["name"]: arm["kind"] for arm in task["arms"]}
    return kinds.get(name, "random" if name.startswith("random") else None)


def _names(tests: list[Mapping[str, Any]]) -> str:
    return " and ".join(dict.fromkeys(test["theirs"] for test in tests))


def _p(test: Mapping[str, Any]) -> str:
    return "not tested" if test["p_holm"] is None else f"p {test['p_holm']:.2g}, Holm"


def _damage(arm: Mapping[str, Any]) -> list[Finding]:
    damage = arm["damage"]
    if damage is None:
        return []
    kl, name = damage.get("kl"), arm["name"]
    lines = [] if kl is None else [f"KL from the unsteered model: {kl:.3g} nats a token"]
    if (damage.get("outside_norms") or 0) > 0.5:
        lines.append("most edited residuals leave the range of lengths that the model is used to")
    wrong, before = damage.get("right_to_wrong"), damage.get("right_before")
    if wrong is None or not before:
        title = f"{name}: damage on neutral questions, answers not compared"
        return [Finding("plain", title, tuple(lines))] if lines else []
    title = f"{name}: {wrong} of {before} neutral questions that were answered right turn wrong"
    share = wrong / before
    tone: Tone = "bad" if share >= MANY_WRONG else "warn" if share >= SOME_WRONG else "good"
    return [Finding(tone, title, tuple(lines))]


def _few(task: Mapping[str, Any]) -> list[Finding]:
    n = task["n"]
    if n >= FEW_CONTENTS:
        return []
    half = 0.98 / n**0.5  # 1.96 standard errors of a rate of one half
    contents = f"{n} content{'' if n == 1 else 's'}"
    told = f"A rate near .5 is known to ± {min(half, 0.5):.2f}. More contents or seeds narrow it."
    return [Finding("warn", f"Only {contents}: smaller differences cannot be seen", (told,))]
