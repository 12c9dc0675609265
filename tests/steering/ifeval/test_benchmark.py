"""IFEval: all 25 checkers by hand-made cases, the loader, the accuracies, a rival's verdicts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering import generate_steered, plan_from_directions
from saesteer.steering.checks.catalogue import CHECKS
from saesteer.steering.evaluation.arms import Decoding
from saesteer.steering.ifeval import benchmark as ifeval
from saesteer.steering.ifeval.benchmark import (
    INSTRUCTION_OF,
    IFEvalPrompt,
    InstructionVerdict,
    evaluate_ifeval,
    follow,
    ifeval_scores,
    load_ifeval,
    plan_for_row,
)
from saesteer.steering.ifeval.checkers import CHECKERS
from saesteer.steering.tasks.task import Task

ENGLISH = "this is a plain english sentence about the weather in the north of the country."

# (instruction, arguments, texts that follow, texts that do not)
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["heron", "boat"]}, ["Herons by a BOAT"], ["a heron"]),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": "at least"},
     ["Ha, haha"], ["ha ha"]),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, "relation": "less than"},
     ["ha"], ["ha ha"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate"], ["A Cat."]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"},
     ["Quick quiz"], ["quick"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
     ["Ah!"], ["Ah!!"]),
    ("language:response_language", {"language": "de"},
     ["Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter."], [ENGLISH]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     ["One is here. Two is there."], ["Only one is here."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["one\n***\ntwo", "one *** two\n***\n"],
     ["one\n\ntwo", "one***two***three", "one\n***\n***\ntwo"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"},
     ["it's me"], ["one two"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
     ["one\n\n\"well, two", "one\n\nWELL two"],
     ["well\n\ntwo", "one\n\nwell\n\nthree", "one\n\nwells", "well"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[a] and [b]"], ["[a and b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Bye.\nP.S. more", "Bye. p. s. more"], ["Bye. PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"},
     ["Bye.\nP.P.S more"], ["Bye.\nP.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n- b", "-a\n-b"], ["* a", "* a\n* b\n* c", "**a**\n**b**"]),
    ("detectable_format:constrained_response", {}, ["I say: My answer is maybe."],
     ["My answer is yes"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*a* and *b*", "*a* and **b**"], ["*a*", "* * and *b*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     ["Section 1\na\nSection 2\nb"], ["Section 1\na\nPart 2\nb"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n[1]\n```'],
     ["{'a': 1}", 'Here: {"a": 1}']),
    ("detectable_format:title", {}, ["<<Herons>>\ntext"], ["<Herons>", "<<\n>>"]),
    ("combination:two_responses", {}, ["one\n******\ntwo"],
     ["one\n******\none", "one", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. I did."],
     ["I did. Say it."]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ['Done. any Questions?"'],
     ["Any questions? No."]),
    ("startend:quotation", {}, [' "all of it" '], ['"part" of it', '"']),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "at least"},
     ["The BIG HERON."], ["The BIG heron."]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, ENGLISH.upper() + " a"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.upper(), ENGLISH + " A"]),
    ("punctuation:no_comma", {}, ["one and two"], ["one, two"]),
]  # fmt: skip


def test_there_are_25_and_all_are_tried() -> None:
    assert len(CHECKERS) == 25
    assert {name for name, *_ in CASES} == set(CHECKERS)


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES)
def test_checkers(name: str, kwargs: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert CHECKERS[name](text, **kwargs), text
    for text in bad:
        assert not CHECKERS[name](text, **kwargs), text


def prompt(*names: str, kwargs: list[dict[str, Any]] | None = None) -> IFEvalPrompt:
    return IFEvalPrompt(1, "p", names, tuple(kwargs or [{} for _ in names]), "plain")


def test_strict_and_loose() -> None:
    row = prompt("detectable_format:json_format", "punctuation:no_comma")
    (json_only, comma) = follow(row, 'Sure, here it is:\n{"a": 1}')
    assert (json_only.strict, json_only.loose) == (False, True)  # without its first line
    assert (comma.strict, comma.loose) == (False, True)
    assert [one.loose for one in follow(row, " \n")] == [False, False]  # nothing follows nothing


def test_scores_by_prompt_and_by_instruction() -> None:
    yes, loose, no = (
        InstructionVerdict("a", *pair) for pair in ((True, True), (False, True), (False, False))
    )
    found = ifeval_scores([[yes, loose], [yes], [no, InstructionVerdict("b", True, True)]])
    assert (found.prompt_strict.successes, found.prompt_loose.successes) == (1, 2)
    assert (found.instruction_strict.value, found.instruction_loose.value) == (3 / 5, 4 / 5)
    assert found.by_type["a"][0].n == 4 and found.by_type["b"][0].value == 1.0
    assert found.row()["by_type"]["a"]["loose"]["successes"] == 3


ROW = {
    "key": 7, "prompt": "Say it without commas.", "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{"num_words": None}], "prompt_without_instruction": "Say it.",
}  # fmt: skip


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "ifeval.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_the_standard_file_is_read(tmp_path: Path) -> None:
    (row,) = load_ifeval(written(tmp_path, ROW, ""))
    assert row == IFEvalPrompt(7, ROW["prompt"], ("punctuation:no_comma",), ({},), "Say it.")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 1 is not JSON"),
        ({"prompt": "x"}, "lacks prompt or instruction_id_list"),
        ({**ROW, "instruction_id_list": ["a:b"]}, "names 'a:b', none of the 25 instructions"),
        ({**ROW, "kwargs": [{}, {}]}, "has 1 instructions but not as many kwargs"),
        ({**ROW, "kwargs": [{"letter": "a"}]}, "has kwargs that do not fit"),
        ({**ROW, "kwargs": ["[]"]}, "has kwargs that are no objects"),
        ({**ROW, "kwargs": ["{"]}, "has kwargs that are no JSON objects"),
        (
            {
                **ROW,
                "instruction_id_list": ["keywords:existence"],
                "kwargs": [{"keywords": ["a(b"]}],
            },
            "has a keyword that is no regular expression",
        ),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_ifeval(written(tmp_path, row))


@pytest.mark.parametrize(("key", "found"), [("1001:2:fr", "1001:2:fr"), (None, 1), (7, 7), ("", 1)])
def test_rows_are_called_what_the_data_calls_them(
    tmp_path: Path, key: Any, found: int | str
) -> None:
    (row,) = load_ifeval(written(tmp_path, {**ROW, "key": key, "kwargs": ["{}"]}))
    assert row.key == found and row.kwargs == ({},)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_a_line_of_the_file_ends_at_a_newline_alone(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "rows.jsonl"
    row = {**ROW, "prompt": f"One.{mark}Two."}
    text = json.dumps(row, ensure_ascii=mark in "\x0c\x1e") + "\r\n"
    file.write_bytes(text.encode())
    assert load_ifeval(file)[0].prompt == row["prompt"]


def test_thoughts_before_an_answer_are_not_judged() -> None:
    (comma,) = follow(prompt("punctuation:no_comma"), "<think>\nWell, well.\n</think>\n\nYes")
    assert comma.strict


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_ifeval(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no prompt"):
        load_ifeval(written(tmp_path, ""))


def test_rows_are_answered_with_and_without_their_instruction(
    lm: LanguageModel, tmp_path: Path
) -> None:
    rows = load_ifeval(written(tmp_path, ROW, {**ROW, "key": 8, "prompt": "Again, no commas."}))
    greedy = Decoding(temperature=0.0)
    found = evaluate_ifeval(lm, rows, max_new_tokens=3, decoding=greedy)
    assert found["prompts"] == 2 and set(found["arms"]) == {"prompted", "unsteered"}
    prompted = found["arms"]["prompted"]["answers"]
    assert [answer["prompt"] for answer in prompted] == [row.prompt for row in rows]
    assert found["arms"]["unsteered"]["answers"][0]["prompt"] == "Say it."
    only = evaluate_ifeval(lm, rows, only=("punctuation:no_comma",), n=1, max_new_tokens=2)
    assert only["prompts"] == 1
    with pytest.raises(UserError, match="no IFEval row is left"):
        evaluate_ifeval(lm, rows, only=("startend:quotation",))


# --- plans for the rows' own instructions --------------------------------------------------------


def task(name: str, check: str, **arguments: Any) -> Task:
    return Task(name, "Do it.", (), {}, check_name=check, check_arguments=arguments)


def test_each_row_gets_the_plan_for_its_only_instruction(lm: LanguageModel) -> None:
    comma, french, end, words = (
        plan_from_directions(lm, torch.ones(1, lm.d_model), layer=layer) for layer in range(4)
    )
    plans = [
        (task("n", "no_comma"), comma),
        (task("f", "language", lang="fr"), french),
        (task("e", "end_phrase", phrase="The end."), end),
        (task("k", "forbidden", keywords=["cat"]), words),
    ]

    def plan(*names: str, **kwargs: Any) -> Any:
        given = tuple(kwargs if i == 0 else {} for i in range(len(names)))
        return plan_for_row(IFEvalPrompt(1, "x", names, given), plans)

    assert plan("punctuation:no_comma") is comma
    assert plan("language:response_language", language="fr") is french
    assert plan("language:response_language", language="de") is None
    assert plan("startend:end_checker", end_phrase="The end.") is end
    assert plan("startend:end_checker", end_phrase="Bye.") is None
    assert plan("keywords:forbidden_words", forbidden_words=["cat"]) is words
    assert plan("keywords:forbidden_words", forbidden_words=["cat", "dog"]) is None
    assert plan("startend:quotation") is None
    assert plan("punctuation:no_comma", "startend:quotation") is None
    assert set(INSTRUCTION_OF) <= set(CHECKS) and set(INSTRUCTION_OF.values()) <= set(CHECKERS)


def test_matched_rows_are_steered_each_by_its_own_plan(lm: LanguageModel, tmp_path: Path) -> None:
    """What a row says under the plans of all rows is what it says under its own alone."""
    said = "A tuple needs a comma."
    first = {**ROW, "prompt_without_instruction": said}
    quoted = {**first, "key": 8, "instruction_id_list": ["startend:quotation"]}
    other = {**first, "key": 9, "instruction_id_list": ["detectable_format:title"]}
    bare = {key: value for key, value in ROW.items() if key != "prompt_without_instruction"}
    rows = load_ifeval(written(tmp_path, first, other, quoted, bare))
    directions = torch.randn(2, 1, lm.d_model, generator=torch.Generator().manual_seed(0))
    plans = [plan_from_directions(lm, one, layer=1, scale=0.4) for one in directions]
    matched = [(task("n", "no_comma"), plans[0]), (task("q", "quotes"), plans[1])]
    found = evaluate_ifeval(lm, rows, matched=matched, max_new_tokens=8)
    assert list(found["arms"]) == ["prompted", "unsteered", "steered", "steered + prompted"]
    steered = found["arms"]["steered"]["answers"]
    assert [row["key"] for row in steered] == [7, 8]
    alone = [generate_steered(lm, [said], one, max_new_tokens=8)[0].completion for one in plans]
    assert [row["output"] for row in steered] == alone and alone[0] != alone[1]
    assert alone[0] != found["arms"]["unsteered"]["answers"][0]["output"]
    assert [(test["ours"], test["theirs"], test["measure"]) for test in found["tests"]][:2] == [
        ("steered", "unsteered", "loose"), ("steered", "unsteered", "strict")
    ]  # fmt: skip
    assert len(found["tests"]) == 8
    with pytest.raises(UserError, match="an instruction that the plan is for"):
        evaluate_ifeval(lm, rows, matched=[(task("f", "json"), plans[0])])


# --- beside an independent package ---------------------------------------------------------------

PIECES = [
    "The heron stood still", "My answer is yes.", "*one*", "**two**", "P.S. more", "[name]",
    "<<A>>",
    "SECTION 1", "Section 2", "***", "******", "- item", "* item", ", ", ". ", "\n", "\n\n", '"',
    '{"a": 1}', "```json\n", "```", "BIG WORDS HERE", "Das ist schön und gut", "heron", "? ",
    "Any questions?", "Say it.", "qqq", "1. ", "!", "é",
]  # fmt: skip


def random_text(generator: random.Random) -> str:
    text = "".join(
        generator.choice(PIECES) + generator.choice(["", " ", "\n"])
        for _ in range(generator.randint(1, 12))
    )
    if generator.random() < 0.3:
        text = f'"{text.strip()}"'
    return generator.choice([text, text, text.upper(), text.lower()])


def test_verdicts_equal_those_of_if_verifiable() -> None:
    """Same outputs, all 25 types, strict and loose: no verdict may differ."""
    pytest.importorskip("langdetect")
    registry = pytest.importorskip("if_verifiable.ifeval.instructions_registry")
    common = pytest.importorskip("if_verifiable.common")
    import langdetect

    langdetect.DetectorFactory.seed = 0
    generator = random.Random(0)
    compared = dict.fromkeys(CHECKERS, 0)
    for name, kwargs, good, bad in CASES:
        if kwargs.get("letter") == "!":
            continue  # the released code counts a random letter in place of a mark
        row = prompt(name, kwargs=[kwargs])
        for text in [*good, *bad, *(random_text(generator) for _ in range(60))]:
            if not text.strip():
                continue
            try:
                rival, _ = common.evaluate_instructions(
                    text, [name], [kwargs], "p", registry.INSTRUCTION_DICT
                )
            except LookupError:  # NLTK's data is not there
                continue
            # The rival strips the reply before it looks.
            ours = follow(row, text.strip())
            assert [(one.strict, one.loose) for one in ours] == [
                (one.strict_pass, one.loose_pass) for one in rival
            ], (name, kwargs, text)
            compared[name] += 1
    without_data = {name for name, count in compared.items() if not count}
    assert without_data <= {
        "length_constraints:number_sentences", "change_case:capital_word_frequency"
    }  # fmt: skip
    assert ifeval.stand_ins().keys() <= without_data
