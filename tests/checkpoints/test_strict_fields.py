"""Dataclasses from YAML and JSON: what is read, what is refused, and in which words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.strict_fields import read_fields


@dataclass(frozen=True)
class Row:
    id: int
    score: float | None = None
    lens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    name: str
    layers: tuple[int, ...]
    scale: float = 1.0
    mode: Literal["add", "clamp", "scale"] = "add"
    shuffle: bool = False
    size: int | float = 1
    pair: tuple[int, str] = (0, "resid_post")
    row: Row = Row(0)
    rows: tuple[Row, ...] = ()
    plain: list[int] = field(default_factory=list)
    other: Row | None = None
    contents: str | tuple[Any, ...] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    loose: dict = field(default_factory=dict)  # type: ignore[type-arg]
    anything: Any = None
    derived: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("`layers` needs at least one")


LEAST = {"name": "a", "layers": [1]}


def test_the_least_document() -> None:
    assert read_fields(Document, LEAST, "f.yaml") == Document("a", (1,))


def test_every_kind_of_field() -> None:
    data = {
        "name": "a", "layers": [1, -1], "scale": 2, "mode": "clamp", "shuffle": True, "size": 3,
        "pair": [4, "mlp_out"], "row": {"id": 1, "score": 2}, "rows": [{"id": 5, "lens": ["x"]}],
        "plain": [1], "other": {"id": 6}, "contents": ["x", {"text": "y"}],
        "numbers": {"a": 1, "b": 0.5}, "facts": {"deep": [{"x": None}]}, "loose": {"y": 1},
        "anything": [1, "x"],
    }  # fmt: skip
    read = read_fields(Document, data, "f.yaml")
    assert read == Document(
        "a", (1, -1), 2.0, "clamp", True, 3, (4, "mlp_out"), Row(1, 2.0), (Row(5, None, ("x",)),),
        [1], Row(6), ("x", {"text": "y"}), {"a": 1.0, "b": 0.5}, {"deep": [{"x": None}]}, {"y": 1},
        [1, "x"],
    )  # fmt: skip
    assert type(read.scale) is float and type(read.size) is int and type(read.row.score) is float
    assert type(read.numbers["a"]) is float
    assert read_fields(Document, {**LEAST, "size": 0.5}, "f").size == 0.5
    assert read_fields(Document, {**LEAST, "contents": "c.jsonl"}, "f").contents == "c.jsonl"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the content must be a mapping with name, layers, scale"),
        (None, "the content must be a mapping with name"),
        ({"name": "a"}, "key 'layers' is missing; needed: name, layers"),
        ({**LEAST, "derived": 3}, "unknown key 'derived'; allowed: name, layers, scale"),
        ({**LEAST, 3: 3}, "unknown key '3'; allowed: name"),
        ({**LEAST, "a\nb": 3}, r"unknown key 'a\nb'; allowed: name"),
        ({**LEAST, "name": None}, "key 'name' must be a text, got None"),
        ({**LEAST, "layers": 3}, "key 'layers' must be a list, got 3"),
        ({**LEAST, "layers": "3"}, "key 'layers' must be a list, got '3'"),
        ({**LEAST, "layers": [1, True]}, "key 'layers[2]' must be a whole number, got True"),
        ({**LEAST, "layers": [1.0]}, "key 'layers[1]' must be a whole number, got 1.0"),
        ({**LEAST, "layers": []}, "`layers` needs at least one"),
        ({**LEAST, "scale": "1"}, "key 'scale' must be a number, got '1'"),
        ({**LEAST, "scale": False}, "key 'scale' must be a number, got False"),
        ({**LEAST, "scale": 2**53}, "key 'scale' must be a number, got 9007199254740992"),
        ({**LEAST, "scale": 16**9999}, "key 'scale' must be a number, got a whole number too long"),
        ({**LEAST, "mode": "double"}, "key 'mode' must be add, clamp or scale, got 'double'"),
        ({**LEAST, "mode": ["add"]}, "key 'mode' must be add, clamp or scale, got ['add']"),
        ({**LEAST, "shuffle": 1}, "key 'shuffle' must be true or false, got 1"),
        ({**LEAST, "pair": [1]}, "key 'pair' must be a list of 2, got [1]"),
        ({**LEAST, "pair": ["x", 1]}, "key 'pair[1]' must be a whole number, got 'x'"),
        ({**LEAST, "row": 3}, "key 'row' must be a mapping with id, score, lens, got 3"),
        ({**LEAST, "row": {}}, "key 'row.id' is missing; needed: id"),
        ({**LEAST, "rows": [{"id": 1}, {"id": 2, "x": 3}]}, "unknown key 'rows[2].x'; allowed: id"),
        ({**LEAST, "rows": [{"id": 1, "lens": [2]}]}, "key 'rows[1].lens[1]' must be a text"),
        ({**LEAST, "other": 1}, "key 'other' must be a mapping with id, score, lens or null, got"),
        ({**LEAST, "contents": 1}, "key 'contents' must be a text or a list or null, got 1"),
        ({**LEAST, "numbers": {"a": "x"}}, "key 'numbers.a' must be a number, got 'x'"),
        ({**LEAST, "numbers": {1: 1.0}}, "key 'numbers.1' must be a text, got 1"),
        ({**LEAST, "facts": []}, "key 'facts' must be a mapping, got []"),
        ({**LEAST, "plain": {}}, "key 'plain' must be a list, got {}"),
    ],
)
def test_faults_are_named_with_file_and_key(data: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_fields(Document, data, "f.yaml")
    message = str(error.value)
    assert message.startswith(f"f.yaml: {said}") and "\n" not in message and len(message) < 300


def test_the_kind_of_error_is_the_callers() -> None:
    with pytest.raises(UsageError, match="^f: key 'layers' is missing"):
        read_fields(Document, {"name": "a"}, "f", UsageError)


def test_a_long_value_is_cut() -> None:
    with pytest.raises(UserError) as error:
        read_fields(Document, {**LEAST, "scale": "x" * 10_000}, "f")
    assert "..." in str(error.value) and len(str(error.value)) < 200


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["id", "score", "lens"]), inner)
    ),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(Document.__dataclass_fields__)), value=junk)
def test_junk_gives_the_error_or_a_document(key: str, value: Any) -> None:
    try:
        read = read_fields(Document, {**LEAST, key: value}, "f")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(read, Document)
