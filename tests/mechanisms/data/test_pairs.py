"""Pairs from files and makers, and one line for each thing that is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.pairs import Pair, load_pairs, read_pairs, write_pairs


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return path


def test_pairs_survive_a_file(tmp_path: Path) -> None:
    pairs = [
        Pair("Say big.", "Say a cat.", " big", " cat", {"word": ((4, 7), (6, 9))}, "one", 0.25),
        Pair("a", "b"),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text(write_pairs(pairs), encoding="utf-8")
    assert read_pairs(path) == pairs
    assert load_pairs(path, n=1) == pairs[:1]


def test_one_span_holds_for_both_texts(tmp_path: Path) -> None:
    row = {"clean": "big cat", "corrupt": "old cat", "positions": {"noun": [4, 7]}}
    (pair,) = read_pairs(write(tmp_path, row))
    assert pair.positions == {"noun": ((4, 7), (4, 7))}


GOOD = {"clean": "big cat", "corrupt": "old cat"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, "{"], "line 2 is not JSON"),
        (["3"], "line 1 is not an object"),
        ([""], "holds no pair"),
        ([{"clean": "a"}], "line 1: corrupt is missing"),
        ([{**GOOD, "clean": 3}], "clean is no str: 3"),
        ([{**GOOD, "answr": " a"}], "unknown key 'answr'; known are clean"),
        ([{**GOOD, "answer": ""}], "answer is empty"),
        ([{**GOOD, "wrong": " a"}], "wrong without answer"),
        ([{**GOOD, "chance": 2}], "chance must be in 0..1, got 2"),
        ([{**GOOD, "positions": {"x": [3, 3]}}], r"position 'x' is \[3, 3\], but clean has 7"),
        ([{**GOOD, "positions": {"x": [0, 8]}}], r"'x' is \[0, 8\], but clean has 7 characters"),
        ([{**GOOD, "positions": {"x": "big"}}], r"must be \[start, end\] in characters, got 'big'"),
        ([{**GOOD, "positions": {"x": {"clean": [0, 3]}}}], "got None for corrupt"),
    ],
)
def test_bad_files(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_pairs(write(tmp_path, *rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("nonsense:x", {}, "`pairs` must be a .jsonl file or one of boxes:N, .*, got nonsense:x"),
        ("contrast:fish", {}, "contrast:animals"),
        ("boxes:many", {}, "takes a number of boxes, got 'many'"),
        ("boxes:40", {}, "takes 2..12 boxes, got 40"),
        ("boxes:3", {"n": 0}, "`n` must be at least 1"),
        ("boxes:3", {"against": "german"}, "`against` belongs to pairs of task:NAME"),
        ("task:frensh", {}, "did you mean french"),
    ],
)
def test_bad_makers(source: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_pairs(source, **options)
    with pytest.raises(UserError, match="`pairs`"):
        load_pairs("missing.jsonl")


def test_boxes_ask_for_a_letter_of_their_own_scene_alone() -> None:
    pairs = load_pairs("boxes:4", n=50, seed=3)
    assert pairs == load_pairs("boxes:4", n=50, seed=3) != load_pairs("boxes:4", n=50, seed=4)
    ordinals = set()
    for pair in pairs:
        spans = {name: (c, k) for name, (c, k) in pair.positions.items()}
        label = pair.clean[slice(*spans["query-label"][0])]
        assert pair.clean[slice(*spans["prev-label"][0])] == label
        assert f" {pair.clean[slice(*spans['object'][0])]}" == pair.answer
        foreign = pair.corrupt[slice(*spans["query-label"][1])]
        boxes = [text.split("Box ")[1][0] for text in pair.clean.split(",")]
        others = [text.split("Box ")[1][0] for text in pair.corrupt.split(",")]
        assert foreign not in boxes + others and len(set(boxes)) == 4
        assert pair.answer not in pair.corrupt and pair.wrong != pair.answer
        ordinals.add(boxes.index(label))
    assert ordinals == {0, 1, 2, 3}


def test_contrasts_differ_in_the_instruction_alone() -> None:
    for name in ("adjectives", "animals"):
        pairs = load_pairs(f"contrast:{name}", n=100)
        assert len(pairs) == 40 and len({pair.group for pair in pairs}) == 40
        for pair in pairs:
            clean, corrupt = pair.positions["query"]
            assert pair.clean[slice(*clean)] == pair.corrupt[slice(*corrupt)] == pair.group
            assert pair.clean[clean[0] :] == pair.corrupt[corrupt[0] :]


def test_tasks_pair_contents_with_and_without_the_instruction() -> None:
    plain, other = load_pairs("task:french", n=3), load_pairs("task:french", n=3, against="german")
    assert plain[0].clean == f"{plain[0].corrupt}\n" + plain[0].clean.rpartition("\n")[2]
    assert plain[0].answer is None and "instruction" not in plain[0].positions
    start, end = other[0].positions["instruction"][1]
    assert (
        other[0].corrupt[start:end].startswith("Answer in German")
        or "German" in other[0].corrupt[start:end]
    )
