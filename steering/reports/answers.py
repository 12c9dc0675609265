"""All answers of an evaluation, side by side by content, to be filtered by arm and grade.

The filters are CSS alone: the page has no script.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

OPEN = 4
"""Contents that are open at first: the first ones of the split, not chosen ones."""

GRADED = {
    "all": "all answers",
    "strict": "strict",
    "follows": "follow, not strict",
    "fails": "do not follow",
}
"""What the first filter offers, by the class of an answer."""


def answers_style(arms: int) -> str:
    """What the filters hide, for pages with at most so many arms; `report.html` has the rest."""
    hidden = [
        f".answers:has(.by-{grade}:checked) .card:not(.{grade}) {{ display: none; }}"
        for grade in GRADED
        if grade != "all"
    ]
    hidden += [
        f".answers:has(.arm-{i}:not(:checked)) .card.of-{i} {{ display: none; }}"
        for i in range(arms)
    ]
    return "\n".join(hidden)


def answers_section(task: Mapping[str, Any], place: int) -> str:
    """Every answer of a task. `place` tells the filters of several tasks on one page apart."""
    arms = [arm["name"] for arm in task["arms"]]
    shown = [arm for arm in task["arms"] if arm["kind"] != "random"]
    grades = "".join(
        f'<label><input type="radio" name="grade-{place}" class="by-{name}"'
        f"{' checked' if name == 'all' else ''}> {escape(words)}</label>"
        for name, words in GRADED.items()
    )
    chosen = "".join(
        f'<label><input type="checkbox" class="arm-{i}"'
        f"{' checked' if task['arms'][i] in shown else ''}> {escape(name)}</label>"
        for i, name in enumerate(arms)
    )
    n = len(task["answers"][arms[0]])
    told = f"All {n} contents; the first {min(OPEN, n)} are open, and nothing is chosen."
    parts = [
        f'<div class="answers"><h3>Answers</h3><p>{told}</p>'
        f"<fieldset><legend>Grade</legend>{grades}</fieldset>"
        f"<fieldset><legend>Arm</legend>{chosen}</fieldset>"
    ]
    for row in range(n):
        cards = "".join(_card(task, i, row) for i in range(len(arms)))
        content = escape(task["answers"][arms[0]][row]["content"])
        parts.append(
            f"<details{' open' if row < OPEN else ''}><summary>{content}</summary>"
            f'<div class="pair">{cards}</div></details>'
        )
    return "".join([*parts, "</div>"])


def _card(task: Mapping[str, Any], arm: int, row: int) -> str:
    name = task["arms"][arm]["name"]
    answer = task["answers"][name][row]
    kept, told = grade_words(answer)
    grade = "strict" if kept else "follows" if answer["follows"] else "fails"
    text = escape(answer["output"].strip() or "(nothing)")
    return f'<div class="card {grade} of-{arm}"><b>{escape(name)} · {escape(told)}</b>{text}</div>'


def grade_words(row: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether an answer is strict, and its grades in words: what it is, and why it is not more."""
    if row["strict"]:
        return True, "strict"
    said = ["follows" if row["follows"] else "does not follow"]
    for name in ("fluent", "faithful"):
        if row[name]:
            said.append(name)
        elif row[name] is False:
            said.append(f"not {name} ({row['parts'][name]['reason']})")
    return False, ", ".join(said)
