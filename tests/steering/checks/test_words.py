"""Words, sentences, phrases, fences, and thoughts."""

import pytest

from saesteer.steering.checks import words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Okafor met Mrs. K. Delgado at 3.14 p.m. exactly.", None),
        ("It cost 2.50 in St. Ives.", None),
        ('"Stop!" He stopped.', ['"Stop!"', "He stopped."]),
        ("他来了。她走了。", ["他来了。", "她走了。"]),
        ("...", ["..."]),
        ("", []),
    ],
)
def test_sentences(text: str, parts: list[str] | None) -> None:
    assert words.sentences(text) == ([text] if parts is None else parts)


def test_fences_tell_open_blocks_from_closed_ones() -> None:
    assert words.fences("a\n```Python\nx = 1\n```\nb") == [("python", "x = 1\n", True)]
    assert words.fences("```json\n{") == [("json", "{", False)]
    assert words.prose("see `code` at https://a.b and\n```\ncode\n``` end").split() == [
        "see", "at", "and", "end"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("मेरी दादी बाज़ार गई थी", 5),  # Hindi: vowel signs and a nukta are marks
        ("می\u200cخواهم بروم", 2),  # Persian: a joiner inside a word
        ("நான் பாலத்தை பார்த்தேன்", 3),  # Tamil
        ("l\u2019hiver d'été", 2),
        ("cafe\u0301", 1),
    ],
)
def test_words_hold_their_marks(text: str, found: int) -> None:
    assert len(words.words(text)) == found
    assert words.words("cafe\u0301") == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("text", "phrase", "times"),
    [
        ("Cats, cat. concat", "cat", 1),
        ("我家的狗和邻居的狗", "狗", 2),
        ("今天用Rust写程序", "rust", 1),
        ("강아지가 집에 있다", "강아지", 1),  # a particle follows
        ("กาแฟร้อน", "กาแฟ", 1),
        ("กาแฟ", "กาแ", 1),
        ("กี่", "ก", 0),  # a vowel sign belongs to its letter
        ("STRASSE", "straße", 1),
        ("naïve", "nai\u0308ve", 1),
        ("don’t go", "don't", 1),
        ("so so so", "so so", 1),
    ],
)
def test_phrases_are_whole_words(text: str, phrase: str, times: int) -> None:
    assert words.occurrences(text, [phrase]) == times


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>\nIt is \n\n</think>\n\nYes.", "Yes."),
        ("the user asks ...</think>Yes.", "Yes."),  # the template wrote the opening
        ("[THINK]so[/THINK] Yes.", "Yes."),
        ("<think>never done", ""),
        ("<thinking>a</thinking>\nYes.", "Yes."),
        ("Write <think> and </think> around it.", "Write <think> and </think> around it."),
        ("No thoughts.", "No thoughts."),
    ],
)
def test_the_answer_behind_thoughts(reply: str, answer: str) -> None:
    assert words.without_thinking(reply) == answer


def test_fences_of_other_hands() -> None:
    assert words.fences('~~~json\n{"a": 1}\n~~~') == [("json", '{"a": 1}\n', True)]
    assert words.fences("````\n```\n````") == [("", "```\n", True)]
    assert words.fences('```\nprint("```")\n```') == [("", 'print("```")\n', True)]
    assert words.fences("```py print(1)```") == [("py", "print(1)", True)]
    assert words.fences("Here: ```json\n[1]\n```, done.")[0][:2] == ("json", "[1]\n")
    assert words.prose("a ~~ b ~~ c") == "a ~~ b ~~ c"
