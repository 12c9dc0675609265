"""Checks: good replies pass, plausible bad ones do not, and no text makes one raise."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.checks.catalogue import CHECKS, Verdict, run_check

PASS, FAIL, UNDETERMINED = Verdict.PASS, Verdict.FAIL, Verdict.UNDETERMINED
SOURCE = "The night train to Vienna left forty minutes late and arrived almost on time."

ARGUMENTS: dict[str, dict[str, Any]] = {
    "language": {"lang": "fr"},
    "translation": {"lang": "de"},
    "keyword": {"keyword": "sunlight"},
    "forbidden": {"keywords": ["train"]},
    "end_phrase": {"phrase": "That is all."},
    "start_phrase": {"phrase": "Well then"},
}

TRANSLATIONS = {
    "fr": [
        "Le train de nuit pour Vienne est parti avec quarante minutes de retard.",
        "Ma grand-mère garde 14 pots de confiture de prunes sur l'étagère.",
        "Il y a sept cousins sur la photo, mais quatre seulement se parlent encore.",
        "La soupe mijotait sur le feu jusqu'à ce que les carottes soient tendres.",
        "Personne n'avait lu le rapport.",
    ],
    "de": [
        "Der Nachtzug nach Wien fuhr vierzig Minuten zu spät ab und kam fast pünktlich an.",
        "Meine Großmutter hat 14 Gläser Pflaumenmarmelade im Regal.",
        "Niemand hatte den Bericht gelesen, und so endete die Sitzung früh.",
        "Das Kind will her zu mir, was alle freut.",
    ],
    "es": [
        "El tren nocturno a Viena salió cuarenta minutos tarde y llegó casi a tiempo.",
        "Los niños construyeron un fuerte con mantas y no quisieron salir a cenar.",
        "Nadie había leído el informe, así que la reunión terminó pronto.",
    ],
    "en": [SOURCE, "Nobody's neighbours didn't know that he'd read the report."],
    "zh": ["没有人读过这份报告，所以会议很早就结束了。"],
    "ja": ["誰も報告書を読んでいなかったので、会議は早く終わりました。"],
    "ko": ["아무도 보고서를 읽지 않아서 회의가 일찍 끝났습니다."],
}


@pytest.mark.parametrize(
    ("lang", "text"), [(lang, text) for lang, texts in TRANSLATIONS.items() for text in texts]
)
def test_language_knows_its_own_and_refuses_the_others(lang: str, text: str) -> None:
    assert run_check("language", text, "", lang=lang) is PASS
    for other in TRANSLATIONS:
        if other != lang:
            assert run_check("language", text, "", lang=other) is not PASS


@pytest.mark.parametrize(
    ("output", "verdict"),
    [
        ("Bonjour le monde.", UNDETERMINED),  # 14 letters
        ("1976 -- 31,000; 14:30!", UNDETERMINED),
        ("", FAIL),
        (" \n", FAIL),
        ("The soup était très bonne et the carrots were douces.", FAIL),  # half translated
        ("Un 1976, la crème de la crème of the soup was good.", FAIL),
        ("```\nprint('Le train de nuit pour Vienne')\n```", UNDETERMINED),  # code is no prose
        ("https://exemple.fr/le-train-de-nuit-pour-vienne", UNDETERMINED),
    ],
)
def test_language_french_that_is_not(output: str, verdict: Verdict) -> None:
    assert run_check("language", output, "", lang="fr") is verdict


def test_translation_wants_neither_a_copy_nor_another_length() -> None:
    german = TRANSLATIONS["de"][0]
    assert run_check("translation", german, SOURCE, lang="de") is PASS
    assert run_check("translation", german, SOURCE, lang="fr") is FAIL
    assert run_check("translation", german, german, lang="de") is FAIL
    assert run_check("translation", f"{SOURCE}\n{german}", SOURCE, lang="de") is FAIL
    assert run_check("translation", f"{german} {german} {german}", SOURCE, lang="de") is FAIL
    assert run_check("translation", german[:36], SOURCE, lang="de") is FAIL  # cut off
    assert run_check("translation", TRANSLATIONS["zh"][0], "x" * 60, lang="zh") is PASS


CASES: list[tuple[str, dict[str, Any], str, Verdict]] = [
    ("json", {}, '{"a": 1}', PASS),
    ("json", {}, '[1, "two"]', PASS),
    ("json", {}, 'Here it is:\n```json\n{"a": {"b": [1]}}\n```\nDone.', PASS),
    ("json", {"kind": "array"}, '{"a": 1}', FAIL),
    ("json", {"kind": "object"}, "[1]", FAIL),
    ("json", {}, "{}", FAIL),
    ("json", {}, '"a text"', FAIL),
    ("json", {}, "12", FAIL),
    ("json", {}, '{"a": NaN}', FAIL),
    ("json", {}, 'Sure! {"a": 1}', FAIL),
    ("json", {}, "{'a': 1}", FAIL),
    ("json", {}, '{"a": "cut o', UNDETERMINED),
    ("json", {}, '```json\n{"a": [1, 2', UNDETERMINED),
    ("json", {}, '```\n{"a": 1}\n```\n```\n{"b": 1}\n```', FAIL),
    ("json", {}, "[" * 100_000, UNDETERMINED),
    ("question", {}, "When did the night train to Vienna leave?", PASS),
    ("question", {}, "Did the train leave late?", PASS),
    ("question", {}, "What’s the train doing now?", PASS),
    ("question", {}, "In which city did the train arrive?", PASS),
    ("question", {}, '"Why was the train late?"', PASS),
    ("question", {}, "The train left late, didn't it?", PASS),
    ("question", {}, "Once it had left, did the train make up for it?", PASS),
    ("question", {}, "Here is the question: how late was it?", PASS),
    ("question", {}, SOURCE[:-1] + "?", FAIL),
    ("question", {}, "The train was late?", FAIL),
    ("question", {}, SOURCE, FAIL),
    ("question", {}, "?", FAIL),
    ("question", {}, "When did the night train to", UNDETERMINED),
    ("question", {}, "When it left. It was late.", FAIL),
    ("python", {}, "print('The night train')", PASS),
    ("python", {}, "Here:\n```python\ndef f():\n    return 1\n```\nIt returns 1.", PASS),
    ("python", {}, "```\nx = 'late'\nprint(x)\n```", PASS),
    ("python", {}, "```javascript\nf(1)\n```", FAIL),
    ("python", {}, "soup", FAIL),
    ("python", {}, "salt, pepper", FAIL),
    ("python", {}, "note: bread", FAIL),
    ("python", {}, "return home", FAIL),
    ("python", {}, "import salt", FAIL),
    ("python", {}, "'''The night train.'''", FAIL),
    ("python", {}, "# print('hello')", FAIL),
    ("python", {}, SOURCE, FAIL),
    ("python", {}, "```python\nprint('a')\nprint('b", UNDETERMINED),
    ("python", {}, "print('a')\nfor x in y:\n    if x", UNDETERMINED),
    ("python", {}, "```python\nprint('a\n```\nText.", FAIL),
    ("python", {}, "print(1)\0", FAIL),
    ("python", {}, "(" * 5_000, FAIL),
    ("python", {}, "-" * 15_000 + "1", FAIL),
    ("keyword", {"keyword": "sunlight"}, "In the Sunlight, it left.", PASS),
    ("keyword", {"keyword": "sunlight"}, "The sunlights were on.", FAIL),
    ("keyword", {"keyword": "sunlight", "ignore_case": False}, "Sunlight!", FAIL),
    ("keyword", {"keyword": "sun", "inflections": ["sunny"]}, "A sunny day.", PASS),
    ("keyword", {"keyword": "sun", "at_least": 2}, "Sun, moon.", FAIL),
    ("keyword", {"keyword": "train"}, "The train again.", UNDETERMINED),  # the source has it
    ("keyword", {"keyword": "c++ (new)"}, "He learns c++ (new) now.", PASS),
    ("uppercase", {}, "THE NIGHT TRAIN LEFT AT 23:40.", PASS),
    ("uppercase", {}, "THE NIGHT train LEFT.", FAIL),
    ("uppercase", {}, "TRAIN 1", UNDETERMINED),
    ("uppercase", {}, "誰も報告書を読んでいなかった", UNDETERMINED),
    ("lowercase", {}, "the night train left at 23:40.", PASS),
    ("lowercase", {}, SOURCE, FAIL),
    ("lowercase", {}, "...", UNDETERMINED),
    ("bullets", {}, "- one\n- two", PASS),
    ("bullets", {}, "Here:\n\n* one\n  • two", PASS),
    ("bullets", {}, "- one", FAIL),
    ("bullets", {}, "-one\n-two", FAIL),
    ("bullets", {}, "1. one\n2. two", FAIL),
    ("bullets", {"numbers": True}, "1. one\n2) two", PASS),
    *(("bullets", {}, f"{mark} one\n{mark} two", PASS) for mark in "+◦‣–●■▪►✓"),
    ("bullets", {}, "・一つ\n・二つ", PASS),
    ("bullets", {}, "\u3000• 一\n\u3000• 二", PASS),
    ("bullets", {}, "–one\n–two", FAIL),
    ("bullets", {}, "— Who is it?\n— The postman.", FAIL),  # dialogue
    ("bullets", {}, "a) one\nb) two", FAIL),
    *(
        ("bullets", {"numbers": True}, f"{first} one\n{second} two", PASS)
        for first, second in (
            ("1)", "2)"),
            ("(1)", "(2)"),
            ("(a)", "(b)"),
            ("a)", "b)"),
            ("i.", "ii."),
            ("①", "②"),
            ("１．", "２．"),
            ("१.", "२."),
        )
    ),
    ("bullets", {"numbers": True}, "1、一\n2、二", PASS),
    ("bullets", {"numbers": True}, "1.5 litres\n2.5 litres", FAIL),
    ("bullets", {"numbers": True}, "A. Varga came\nB. Kiss left", FAIL),
    ("bullets", {"maximum": 2}, "- a\n- b\n- c", FAIL),
    ("bullets", {}, "**Bold** text - and\n**more**", FAIL),
    ("bullets", {}, "- \n- \n", FAIL),
    ("quotes", {}, '"The night train."', PASS),
    ("quotes", {}, "“The night train.”\n", PASS),
    ("quotes", {}, '"The night train." It left.', FAIL),
    *(
        ("quotes", {}, text, PASS)
        for text in (
            "« Le train. »",
            "„Der Zug.“",
            "„Pociąg.”",
            "”Tåget.”",
            "»Der Zug.«",
            "「列車」",
            "『列車』",
        )
    ),
    ("quotes", {}, "«Le train.» Il part.", FAIL),
    ("quotes", {}, "「列車", UNDETERMINED),
    ("quotes", {}, "'The night train.'", FAIL),
    ("quotes", {}, '""', FAIL),
    ("quotes", {}, '"', FAIL),
    ("quotes", {}, '"The night tr', UNDETERMINED),
    ("length", {"minimum": 2, "maximum": 3}, "two words", PASS),
    ("length", {"minimum": 3}, "two words", FAIL),
    ("length", {"unit": "sentences", "maximum": 1}, "Dr. Varga came at 5 p.m. to eat.", PASS),
    ("length", {"unit": "sentences", "maximum": 1}, "He came. She left.", FAIL),
    ("length", {"unit": "paragraphs", "minimum": 2}, "One.\n \nTwo.", PASS),
    ("length", {"unit": "characters", "maximum": 3}, "abcd", FAIL),
    ("no_comma", {}, "The train left late and it came on time anyway.", PASS),
    ("no_comma", {}, "The train left late, and it came on time anyway.", FAIL),
    ("no_comma", {}, "The train left late.", UNDETERMINED),
    ("no_comma", {}, SOURCE, FAIL),  # a copy follows nothing
    ("no_comma", {}, "火车晚点四十分钟出发但是几乎准时到达维也纳车站", PASS),
    ("no_comma", {}, "火车晚点四十分钟出发，但是几乎准时到达维也纳车站", FAIL),
    ("title", {}, "<<Late Again>>\nThe train was late.", PASS),
    ("title", {}, "<Late Again>\nThe train was late.", FAIL),
    ("title", {}, "<< >>", FAIL),
    ("forbidden", {"keywords": ["late", "train"]}, "It set off behind its time.", PASS),
    ("forbidden", {"keywords": ["late", "train"]}, "It set off too LATE again.", FAIL),
    ("forbidden", {"keywords": ["late"]}, "It was later than most others.", PASS),
    ("forbidden", {"keywords": ["late"]}, "Set off.", UNDETERMINED),
    ("forbidden", {"keywords": ["cat"]}, SOURCE, FAIL),  # a copy follows nothing
    ("end_phrase", {"phrase": "That is all."}, "It was late. That is all.", PASS),
    ("end_phrase", {"phrase": "That is all."}, '"It was late. that is all."', PASS),
    ("end_phrase", {"phrase": "That is all."}, "It was late. That is all. Bye.", FAIL),
    ("end_phrase", {"phrase": "That is all."}, "That is all.", FAIL),
    ("end_phrase", {"phrase": "That's all."}, "It was late. **That’s all.**", PASS),
    ("start_phrase", {"phrase": "Well then,"}, "Well then, it was late.", PASS),
    ("start_phrase", {"phrase": "Well then,"}, "Well then,", FAIL),
    ("start_phrase", {"phrase": "Well then,"}, "So, well then, it was late.", FAIL),
    ("start_phrase", {"phrase": "The night"}, "The night was long.", UNDETERMINED),
]


@pytest.mark.parametrize(("name", "arguments", "output", "verdict"), CASES)
def test_formats(name: str, arguments: dict[str, Any], output: str, verdict: Verdict) -> None:
    assert run_check(name, output, SOURCE, **arguments) is verdict


TEXT = (
    "The bakery sells out of rye bread before breakfast. Two lemons rolled off the counter. "
    "Nobody in the flat admitted to having scorched the rice pot."
)


@pytest.mark.parametrize(
    ("output", "verdict"),
    [
        ("Bread sold out, lemons fell and rice burned.", PASS),
        ("Two lemons rolled off the counter.", FAIL),  # a copied sentence
        ("The bakery sells out of rye bread.", FAIL),  # a copied beginning
        ("Bread sold out. Rice burned.", FAIL),
        ("Bread sold out, lemons fell and rice", UNDETERMINED),
        ("Bread.", FAIL),  # under 5 % of the source
        (TEXT, FAIL),
        ("Somebody wrote at length of bread and lemons " * 2 + "and rice.", FAIL),
    ],
)
def test_summary(output: str, verdict: Verdict) -> None:
    assert run_check("summary", output, TEXT) is verdict


def test_a_summary_of_one_sentence_cannot_be_judged() -> None:
    assert run_check("summary", "A train was late.", SOURCE) is UNDETERMINED


def test_every_check_is_covered_here() -> None:
    tried = {name for name, *_ in CASES} | {"language", "translation", "summary"}
    assert tried == set(CHECKS)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_an_empty_reply_fails(name: str) -> None:
    for empty in ("", " ", "\n\t"):
        assert run_check(name, empty, SOURCE, **ARGUMENTS.get(name, {})) is FAIL


PIECES = [
    "```",
    "```python\n",
    '"',
    "{",
    "}",
    "[",
    "- ",
    "\n",
    "?",
    ". ",
    "é",
    "文",
    "x = ",
    "(",
    "'",
]
REPLIES = st.one_of(
    st.text(max_size=200),
    st.text(alphabet=st.characters(), max_size=60),  # lone surrogates too
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=30).map("".join),
)


@pytest.mark.parametrize("name", sorted(CHECKS))
@settings(max_examples=40, deadline=None)  # the first call loads the language identifier
@given(output=REPLIES, source=REPLIES)
def test_no_text_makes_a_check_raise(name: str, output: str, source: str) -> None:
    assert isinstance(run_check(name, output, source, **ARGUMENTS.get(name, {})), Verdict)


@settings(max_examples=50, deadline=None)
@given(output=REPLIES, cut=st.integers(0, 80))
def test_cutting_a_json_reply_never_turns_it_into_a_pass(output: str, cut: int) -> None:
    import json

    whole = json.dumps({"text": output, "more": [1, {"a": None}]})
    assert run_check("json", whole, "") is PASS
    if cut < len(whole):
        assert run_check("json", whole[:cut], "") is not PASS


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("shouting", {}, "unknown check 'shouting'"),
        ("language", {"lang": "tlh"}, "unknown language 'tlh'"),
        ("json", {"kind": "scalar"}, "kind must be object, array or any"),
        ("keyword", {"keyword": " "}, "must be non-empty texts"),
        (
            "keyword",
            {"keyword": "a", "at_least": 0},
            "at_least must be a whole number from 1, got 0",
        ),
        ("bullets", {"minimum": 3, "maximum": 2}, "maximum must be a whole number from 3, got 2"),
        ("length", {"unit": "lines"}, "unit must be one of words"),
        ("summary", {"shortest": 0.6}, "must be below longest"),
        ("forbidden", {"keywords": []}, "keywords must be non-empty texts"),
        ("end_phrase", {"phrase": '"'}, "phrase must be a non-empty text"),
        ("start_phrase", {"phrase": " "}, "phrase must be a non-empty text"),
    ],
)
def test_arguments_that_cannot_work(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_check(name, "x", "y", **arguments)


@pytest.mark.parametrize(
    ("name", "reply", "phrase"),
    [
        ("start_phrase", "Wellness matters to us.", "Well"),
        ("start_phrase", "Indeedy, said the clerk.", "Indeed"),
        ("end_phrase", "She sat in the carpet", "pet"),
    ],
)
def test_a_phrase_is_not_a_part_of_a_word(name: str, reply: str, phrase: str) -> None:
    assert run_check(name, reply, SOURCE, phrase=phrase) is FAIL


def test_keywords_of_scripts_without_blanks() -> None:
    assert run_check("keyword", "昨天我在河边看见一座桥。", SOURCE, keyword="桥") is PASS
    said = "強い雨 が 降った ので、 橋が 閉じ られた。"
    assert run_check("forbidden", said, SOURCE, keywords=["橋"]) is FAIL
    assert run_check("keyword", "ยังมีสะพานเก่าอยู่", SOURCE, keyword="สะพาน") is PASS


def test_thoughts_are_not_checked() -> None:
    thought = "<think>They want French, and JSON, so ...</think>\n"
    assert run_check("language", thought + TRANSLATIONS["fr"][0], SOURCE, lang="fr") is PASS
    assert run_check("json", thought + '[{"a": "`` ```"}]', SOURCE, kind="array") is PASS
    assert run_check("no_comma", thought + "One two three four five six seven eight.", "") is PASS


@pytest.mark.parametrize(
    "reply",
    ['```json\n{"a": "b ```c``` d"}\n```', '```json {"a": 1}```', '~~~\n{"a": 1}\n~~~'],
)
def test_json_in_any_fence(reply: str) -> None:
    assert run_check("json", reply, SOURCE, kind="object") is PASS
