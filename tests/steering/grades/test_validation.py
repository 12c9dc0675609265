"""How often the grades are right, on answers with labels by construction (`labelled.py`).

The slow tests print the table of docs/grades.md: run them with -rP.
"""

from collections.abc import Callable, Sequence

import pytest

from saesteer.checkpoints.model_files import DEFAULT_MODEL
from saesteer.sae.model.language_model import load_model
from saesteer.steering.grades.dictionaries import bilingual
from saesteer.steering.grades.grade import GRADES, Grader, Grades
from saesteer.steering.tasks.task import load_task

from .labelled import FREE, TRANSLATIONS, TRUTH, Labelled, held_out, labelled, read

needs_dictionaries = pytest.mark.skipif(
    any(bilingual("en", lang) is None for lang in ("fr", "de", "es")),
    reason="no FreeDict dictionaries: install dict-freedict-eng-fra, -deu, -spa and the other way",
)

Pair = tuple[Labelled, Grades]


def graded(rows: Sequence[Labelled], model: bool = False) -> list[Pair]:
    """Every answer with its grades; the model, where one judges, is SmolLM2."""
    lm = load_model(DEFAULT_MODEL) if model else None
    found: list[Pair] = []
    for name in dict.fromkeys(row.task for row in rows):
        task, mine = load_task(name), [row for row in rows if row.task == name]
        # What the model said itself, stored: it gives the range of natural perplexities.
        own = [row["answer"] for row in read("prompted.jsonl") if row["task"] == name]
        own += [row["answer"] for row in read("unsteered.jsonl")]
        grader = Grader(task, lm, own=own, scored=False)
        grades = grader.grade([row.content for row in mine], [row.answer for row in mine])
        found += zip(mine, grades, strict=True)
    return found


def rate(pairs: Sequence[Pair], name: str = "strict") -> float:
    return sum(one.grade(name) is True for _, one in pairs) / len(pairs)


def precision_and_recall(pairs: Sequence[Pair], name: str) -> tuple[float, float]:
    judged = [(TRUTH[row.kind], one) for row, one in pairs]
    known = [(truth[name], one.grade(name)) for truth, one in judged if name in truth]
    hits = sum(true and said is True for true, said in known)
    return hits / sum(said is True for _, said in known), hits / sum(true for true, _ in known)


def report(pairs: Sequence[Pair], title: str) -> None:
    print(f"\n{title}: {len(pairs)} answers")
    for kind in dict.fromkeys(row.kind for row, _ in pairs):
        mine = [pair for pair in pairs if pair[0].kind == kind]
        rates = "  ".join(f"{name} {rate(mine, name):.2f}" for name in GRADES)
        print(f"  {kind:16} {len(mine):4}  {rates}")
    for name in GRADES:
        precision, recall = precision_and_recall(pairs, name)
        print(f"  {name:9} precision {precision:.3f}, recall {recall:.3f}")
    for task in dict.fromkeys(row.task for row, _ in pairs):
        mine = [pair for pair in pairs if pair[0].task == task]
        good = [pair for pair in mine if pair[0].good]
        bad = [pair for pair in mine if not pair[0].good]
        rates = f"good {rate(good):.2f} ({len(good)}), nonsense {rate(bad):.3f} ({len(bad)})"
        print(f"  {task:13} {rates}")


def test_in_the_contents_language_by_words_alone() -> None:
    """No dictionary and no model: shuffled words are the one thing that gets through, in part."""
    rows = [row for row in labelled() if row.task in ("question", "json", "bullets")]
    pairs = graded(rows)
    good = [pair for pair in pairs if pair[0].good]
    assert rate(good) >= 0.95
    nonsense = [pair for pair in pairs if pair[0].kind not in ("good", "shuffled")]
    assert rate(nonsense) <= 0.02
    shuffled = [pair for pair in pairs if pair[0].kind == "shuffled"]
    assert rate(shuffled) <= 0.2


def test_there_are_enough_answers_of_each_kind() -> None:
    rows = [*labelled(), *held_out()]
    assert len(rows) >= 300 and {row.kind for row in rows} == set(TRUTH)
    for kind in TRUTH:
        assert sum(row.kind == kind for row in rows) >= 40, kind
    good = {(row.task, row.content, row.answer) for row in rows if row.good}
    assert not [row for row in rows if not row.good and (row.task, row.content, row.answer) in good]


@pytest.mark.slow
@needs_dictionaries
@pytest.mark.parametrize("rows", [labelled, held_out], ids=["chosen on", "held out"])
def test_all_tasks_by_words_alone(rows: Callable[[], list[Labelled]]) -> None:
    pairs = graded(rows())
    report(pairs, "words alone")
    assert rate([pair for pair in pairs if pair[0].good]) >= 0.90
    assert rate([pair for pair in pairs if not pair[0].good]) <= 0.03
    assert rate([p for p in pairs if p[0].kind not in ("good", "shuffled")]) <= 0.01


@pytest.mark.slow
@needs_dictionaries
@pytest.mark.parametrize("rows", [labelled, held_out], ids=["chosen on", "held out"])
def test_all_tasks_with_the_model(rows: Callable[[], list[Labelled]]) -> None:
    pairs = graded(rows(), model=True)
    report(pairs, "words and SmolLM2-135M-Instruct")
    assert rate([pair for pair in pairs if pair[0].good]) >= 0.90
    assert rate([pair for pair in pairs if not pair[0].good]) <= 0.02


@pytest.mark.slow
@needs_dictionaries
def test_what_the_prompted_model_says_is_graded() -> None:
    """SmolLM2's own answers have no label; their rates are printed. Its translations are salad."""
    rows = [Labelled(r["task"], r["content"], r["answer"], "salad") for r in read("prompted.jsonl")]
    pairs = graded(rows)
    for task in dict.fromkeys(row.task for row in rows):
        mine = [pair for pair in pairs if pair[0].task == task]
        print(f"{task:13}", "  ".join(f"{name} {rate(mine, name):.2f}" for name in GRADES))
    salad = [pair for pair in pairs if pair[0].task in TRANSLATIONS + FREE]
    assert rate(salad, "follows") > 0.5 and rate(salad) <= 0.05
