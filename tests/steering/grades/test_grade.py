"""The three grades and strict: which rule fails what, and what is not graded."""

import dataclasses
import json
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.grades import grade as module
from saesteer.steering.grades import natural as nature
from saesteer.steering.grades.faithful import FLOORS, KINDS, faithful
from saesteer.steering.grades.fluent import content_language, fluent, with_naturalness
from saesteer.steering.grades.grade import GRADES, Grader, grade, not_graded
from saesteer.steering.grades.natural import MARGIN, Naturalness, naturalness, own_range
from saesteer.steering.tasks.task import Task, load_task

from .dictd_files import write_french

SPOON = "Leila stirs the porridge with the handle of a wooden spoon."
FRENCH = "Leila remue la bouillie avec le manche d'une cuillère en bois."
SALAD = "La belle en parmade d'un dul peu de bon je suis d'abot."
COUNTED = "They served 130 bowls of noodles before the gas ran out."


def judge(reply: str, check: str, lang: str = "en", source: str = SPOON) -> tuple[bool | None, str]:
    found = fluent(reply, source, check_name=check, lang=lang, source_lang="en")
    return found.passes, found.reason


def kept(reply: str, check: str, source: str = SPOON, **more: object) -> tuple[bool | None, str]:
    given = {"lang": "en", "source_lang": "en", **more}
    found = faithful(reply, source, check_name=check, **given)  # type: ignore[arg-type]
    return found.passes, found.reason


# --- fluent --------------------------------------------------------------------------------------


def test_what_is_not_fluent() -> None:
    assert judge(FRENCH, "translation", "fr") == (True, "")
    assert judge(SALAD, "translation", "fr") == (False, "75% of its words exist")
    assert judge("  ", "question") == (False, "empty")
    assert judge("a spoon of wood is " * 9, "question") == (False, "a loop")
    opening = f"Sure, here is the text for you: {FRENCH}"
    assert judge(opening, "translation", "fr")[0] is False
    order = "Why the of a was stirred porridge spoon with?"
    assert judge(order, "question")[1].endswith("function words stand where none can")
    scrambled = "Spoon wooden handle the Leila porridge stirs with the?"
    assert judge(scrambled, "question")[0] is False


def test_the_form_that_was_asked_for_is_no_lack_of_fluency() -> None:
    assert judge(json.dumps({"text": SPOON, "id": 7}), "json") == (True, "")
    assert judge(f"```python\ndef xqz():\n    print({SPOON!r})\n```", "python") == (True, "")
    assert judge(SPOON.upper(), "uppercase") == (True, "")
    assert judge("- Leila stirs.\n- The spoon is wooden.", "bullets") == (True, "")


def test_fluency_without_a_list_is_not_graded() -> None:
    passes, why = judge("これは木のスプーンです。", "language", "ja")
    assert (
        passes is None and why == "not graded: wordfreq has no list of words for the language 'ja'"
    )


def test_a_model_can_only_fail_a_reply() -> None:
    found = fluent(FRENCH, SPOON, check_name="translation", lang="fr", source_lang="en")
    same = with_naturalness(found, Naturalness(2.0, 1.5))
    assert (same.passes, same.nats, same.order_gain) == (True, 2.0, 1.5)
    assert with_naturalness(found, Naturalness(9.0, 1.5, "too high")).reason == "too high"


def test_the_language_of_contents() -> None:
    assert content_language(SPOON) == "en" and content_language(FRENCH) == "fr"
    assert content_language("14:30") == "en"


# --- natural -------------------------------------------------------------------------------------


def test_naturalness_is_nats_and_the_gain_over_shuffled_words(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in model that finds "b" after "a" likely, and everything else not."""

    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> object:
            rows = [ord(word[0]) for word in text.split()]
            return type("Encoded", (), {"input_ids": rows})

    def nats(model: object, rows: list[list[int]]) -> list[float | None]:
        good = [sum(b == a + 1 for a, b in zip(r, r[1:], strict=False)) for r in rows]
        return [
            5.0 - 4.0 * g / (len(r) - 1) if len(r) > 1 else None
            for g, r in zip(good, rows, strict=True)
        ]

    monkeypatch.setattr(nature, "cross_entropies", nats)
    model = dataclasses.replace(lm, tokenizer=Words())
    ordered, scrambled, short = naturalness(model, ["a b c d e f g h", "c a h f b d g e", "a b"])
    assert ordered.nats == 1.0 and ordered.order_gain is not None
    assert ordered.order_gain > 2 and ordered.unlike == ""
    assert scrambled.order_gain is not None and scrambled.order_gain < nature.LEAST_GAIN
    assert scrambled.unlike.startswith("its words in another order are as likely")
    assert (short.nats, short.order_gain, short.unlike) == (1.0, None, "")
    (outside,) = naturalness(model, ["a b c d e f g h"], within=(2.0, 4.0))
    assert outside.unlike == "1.00 nats per token, out of the model's own 2.00 to 4.00"


def test_the_range_of_own_answers() -> None:
    assert own_range([1.0] * 7) is None
    low, high = own_range([float(i) for i in range(101)]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((1 - MARGIN, 99 + MARGIN))


# --- faithful ------------------------------------------------------------------------------------


def test_the_floor_of_a_task_decides() -> None:
    half = "Leila stirs the porridge at home."  # 3 of 6 content words
    assert kept(half, "keyword") == (True, "") and FLOORS[KINDS["keyword"]] == 0.5
    assert kept("Leila stirs it.", "keyword") == (False, "33% of the content is there")
    assert kept("Does Leila stir it?", "question") == (True, "")
    assert kept("A wooden boat!", "no_comma") == (False, "17% of the content is there")
    assert kept("The spoon.", "no_comma", "A spoon fell down.")[0] is False  # one word is chance


def test_copies_keep_order_and_numbers() -> None:
    assert kept(SPOON.upper(), "uppercase") == (True, "")
    backwards = " ".join(reversed(SPOON.upper().split()))
    assert kept(backwards, "uppercase") == (False, "the content's words are in another order")
    lost = COUNTED.upper().replace("130", "13")
    assert kept(lost, "uppercase", COUNTED) == (False, "a number is not there")


def test_json_by_its_values_and_programs_by_their_strings() -> None:
    assert kept(json.dumps({"who": "Leila", "does": "stirs porridge"}), "json") == (True, "")
    assert kept(json.dumps({"Leila stirs porridge": "spoon"}), "json")[0] is False  # a key
    assert kept("Leila stirs the porridge", "json") == (False, "no JSON")
    assert kept(f"print({SPOON!r})", "python") == (True, "")
    assert kept(f"print({SPOON!r}", "python") == (False, "no program")
    assert kept("print('Hello, world!')", "python")[0] is False


def test_translations_through_a_dictionary(tmp_path: Path) -> None:
    folder = write_french(tmp_path)
    given = {"lang": "fr", "dictionaries": folder}
    found = faithful(
        FRENCH, SPOON, check_name="translation", lang="fr", source_lang="en", dictionaries=folder
    )
    # "porridge" is found backwards, "wooden" by a phrase, and the name as it stands.
    assert found.found == ("Leila", "stirs", "porridge", "handle", "wooden", "spoon")
    assert kept("Le pont est fermé en hiver.", "translation", **given)[0] is False
    assert kept(SALAD, "translation", **given)[0] is False
    bridge = "The bridge was closed for the winter of 1994."
    assert kept("Le pont était fermé pour l'hiver de 1994.", "translation", bridge, **given)[0]
    lost = kept("Le pont était fermé pour l'hiver.", "translation", bridge, **given)
    assert lost == (False, "a number is not there")


def test_without_a_dictionary_it_is_not_graded(tmp_path: Path) -> None:
    passes, why = kept(FRENCH, "translation", lang="fr", dictionaries=tmp_path)
    assert passes is None
    assert why.startswith("not graded: install the Debian packages dict-freedict-eng-fra")
    passes, why = kept("木のスプーン", "language", lang="ja")
    assert passes is None and "'ja' cannot be told" in why
    assert kept("It is.", "question", "It is so.")[0] is None


# --- all together --------------------------------------------------------------------------------


def test_strict_is_all_three(tmp_path: Path) -> None:
    task = load_task("french")
    answers = [FRENCH, SALAD, "The porridge is stirred with a wooden spoon by Leila."]
    found = grade(task, [SPOON] * 3, answers, dictionaries=write_french(tmp_path))
    assert [[one.grade(name) for name in GRADES] for one in found] == [
        [True, True, True, True],
        [True, False, False, False],  # the old grade gave it an A
        [False, False, True, False],
    ]
    row = json.loads(json.dumps(found[1].row(), allow_nan=False))
    assert row["parts"]["fluent"]["unknown"] == ["parmade", "dul", "abot"]
    assert row["parts"]["check"] == "pass" and row["parts"]["instructed"] is None
    assert not_graded(found) == {}


def test_strict_is_none_where_a_grade_is(tmp_path: Path) -> None:
    found = grade("french", [SPOON] * 2, [FRENCH, SALAD], dictionaries=tmp_path)
    assert [one.strict for one in found] == [None, None]
    assert [one.fluent for one in found] == [True, False]
    assert set(not_graded(found)) == {"faithful", "strict"}


def test_thoughts_are_no_part_of_an_answer() -> None:
    asked = "Why does Leila stir the porridge with the handle?"
    (one,) = grade("question", [SPOON], [f"<think>blarf zonk</think>{asked}"])
    assert one.strict is True


def test_a_model_judges_what_the_words_let_through(lm: LanguageModel) -> None:
    task = load_task("question")
    names = "Ann Bob Eve Ida Jim Leo Max Tom".split()
    own = [f"Why did {name} stir the porridge?" for name in names]
    grader = Grader(task, lm, own=own)
    assert grader.within is not None and grader.floors()["nats"] == list(grader.within)
    good, bad = grader.grade(
        [SPOON] * 2,
        ["Why does Leila stir the porridge with a spoon?", "Why blarf the zonk quibrel?"],
    )
    assert good.fluency.nats is not None and good.fluency.order_gain is not None
    assert bad.fluency.nats is None  # the words had failed it already
    assert good.instructed is not None and good.instructed.gain is not None
    assert Grader(task, lm, scored=False).grade([SPOON], [SPOON])[0].instructed is None


def test_own_answers_are_made_where_the_language_is_the_contents(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answers(lm: LanguageModel, task: Task, contents: list[str], **more: object) -> list[str]:
        asked.append(task.name)
        return ["It is late."] * 9

    monkeypatch.setattr(module, "own_answers", answers)
    for name in ("question", "french"):
        module.make_grader(load_task(name), [SPOON], lm)
    assert asked == ["question"]


def test_what_is_refused() -> None:
    task = load_task("question")
    with pytest.raises(UsageError, match="`answers` has 1 entries for 2 contents"):
        grade(task, [SPOON] * 2, ["a"])
    with pytest.raises(UserError, match="has no check, so no answer can be graded"):
        Grader(dataclasses.replace(task, check_name=None, check_arguments=None))
