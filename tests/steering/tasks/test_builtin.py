"""The built-in data: contents that are varied and never shared between splits, and whole tasks."""

import itertools
import json
import re
from collections import Counter

import pytest

from saesteer.steering.checks import catalogue as checks
from saesteer.steering.checks import language as language_checks
from saesteer.steering.checks import words
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.tasks.task import BUILTIN_FOLDER, DEFAULT_CONTENTS, builtin_tasks, load_task

ROWS = [json.loads(line) for line in DEFAULT_CONTENTS.read_text(encoding="utf-8").splitlines()]
TEXTS = [row["text"] for row in ROWS]
TRANSLATED = {"de", "fr", "es", "zh", "ja"}


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def _runs(split: str, length: int) -> set[tuple[str, ...]]:
    rows = (_words(row["text"]) for row in ROWS if row["split"] == split)
    return {
        tuple(words[start : start + length])
        for words in rows
        for start in range(len(words) - length + 1)
    }


def test_rows_have_unique_ids_and_known_keys() -> None:
    assert all(set(row) == {"id", "text", "split"} for row in ROWS)
    assert len({row["id"] for row in ROWS}) == len(ROWS)


def test_there_are_enough_contents_in_each_split() -> None:
    sizes = Counter(row["split"] for row in ROWS)
    assert len(ROWS) >= 400
    assert sizes["train"] >= 200 and sizes["dev"] >= 50 and sizes["test"] >= 150
    assert set(sizes) == {"train", "dev", "test"}


def test_contents_are_single_sentences_of_8_to_24_words() -> None:
    for text in TEXTS:
        assert 8 <= len(text.split()) <= 24, text
        assert len(words.sentences(text)) == 1, text
        assert text[0].isupper() and text[-1] in ".?" and text == text.strip(), text


def test_no_text_repeats() -> None:
    assert len({" ".join(_words(text)) for text in TEXTS}) == len(TEXTS)


@pytest.mark.parametrize("pair", itertools.combinations(["train", "dev", "test"], 2))
def test_no_clause_is_shared_between_two_splits(pair: tuple[str, str]) -> None:
    assert _runs(pair[0], 5) & _runs(pair[1], 5) == set()


def test_hardly_any_phrase_repeats_at_all() -> None:
    """A template grammar would repeat its phrases; written sentences do not."""
    runs = Counter(
        run
        for text in TEXTS
        for run in {tuple(_words(text)[i : i + 5]) for i in range(len(_words(text)) - 4)}
    )
    assert max(runs.values()) == 1


def test_vocabulary_and_openings_are_varied() -> None:
    tokens = [word for text in TEXTS for word in _words(text)]
    assert len(set(tokens)) >= 2000
    openings = Counter(_words(text)[0] for text in TEXTS)
    assert openings.most_common(1)[0][1] < 0.25 * len(TEXTS)
    pairs = Counter(tuple(_words(text)[:2]) for text in TEXTS)
    assert pairs.most_common(1)[0][1] < 0.03 * len(TEXTS)


def test_about_a_third_hold_a_number_or_a_name() -> None:
    capitalised = re.compile(r"\d|(?<=[a-z,] )[A-Z][a-z]+")
    share = sum(bool(capitalised.search(text)) for text in TEXTS) / len(TEXTS)
    assert 0.25 <= share <= 0.5


def test_questions_are_rare() -> None:
    assert 0 < sum(text.endswith("?") for text in TEXTS) <= 0.03 * len(TEXTS)


def test_no_content_is_an_instruction_or_names_one() -> None:
    imperatives = set(
        """add answer ask break change condense convert create describe do explain express format
        give include list make please print provide put quote repeat rephrase reply rewrite say show
        state sum summarize surround tell translate turn use wrap write""".split()
    )
    named = re.compile(r"\b(translat(e|es|ed|ion)|json|bullets?|sunlight|upper-?case)\b", re.I)
    for text in TEXTS:
        assert _words(text)[0] not in imperatives, text
        assert not named.search(text), text


def test_these_tasks_are_built_in() -> None:
    assert set(builtin_tasks()) == {
        "bullets",
        "end_phrase",
        "french",
        "french_reply",
        "german",
        "json",
        "keyword",
        "lowercase",
        "no_comma",
        "python",
        "question",
        "quotes",
        "short",
        "spanish",
        "summary",
        "uppercase",
    }


@pytest.mark.parametrize("name", builtin_tasks())
def test_each_task_is_complete(name: str) -> None:
    task = load_task(name)
    assert task.name == name == (BUILTIN_FOLDER / f"{name}.yaml").stem
    english = [v for v in task.variants if v.lang == "en"]
    assert len(english) >= 6
    assert {v.lang for v in task.variants} >= TRANSLATED
    assert sum(v.use == "evaluate" for v in english) >= 2
    assert len([v for v in task.select_variants if v.lang == "en"]) >= 6
    assert task.check_name in checks.CHECKS
    assert len(task.contents["test"]) >= 40
    selection = {v.text for v in task.select_variants}
    assert selection.isdisjoint(v.text for v in task.evaluate_variants)


@pytest.mark.parametrize("name", builtin_tasks())
def test_variants_are_in_the_language_they_name(name: str) -> None:
    script = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]"}
    for variant in load_task(name).variants:
        if variant.lang in script:
            assert re.search(script[variant.lang], variant.text), variant
        else:
            assert not re.search(r"[\u3040-\u9fff]", variant.text), variant
            # A phrase to be said word for word is English in every wording.
            own = re.sub('"[^"]*"', "", variant.text)
            agrees = language_checks._function_words_agree(own, variant.lang)
            assert agrees is not False, variant


@pytest.mark.parametrize("name", builtin_tasks())
def test_repeating_the_content_never_passes(name: str) -> None:
    """The floor: a model that echoes the content has not followed any of the instructions."""
    task = load_task(name)
    for content in task.contents["test"]:
        if name == "question" and content.endswith("?"):
            continue
        assert task.verdict(content, content) is not Verdict.PASS, content
