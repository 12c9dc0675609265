"""Values from the command line and from config files."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saesteer.cli import values


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (values.count, "1_000_000", 1_000_000),
        (values.count, "200k", 200_000),
        (values.count, "1.5M", 1_500_000),
        (values.count, "2e6", 2_000_000),
        (values.count, "-5", -5),
        (values.count, "9007199254740993", 9007199254740993),  # beyond the 53 bits of a float
        (values.number, "1e-3", 1e-3),
        (values.number, "-2", -2.0),
        (values.counts, "1024,4096", (1024, 4096)),
        (values.layers, "10,20", (10, 20)),
        (values.layers, "8-12", (8, 9, 10, 11, 12)),
        (values.layers, "-1", (-1,)),
        (values.layers, "-4--2,0", (-4, -3, -2, 0)),
        (values.one_layer, "-1", -1),
        (values.names, "french, json", ("french", "json")),
        (values.dtype, "bf16", "bfloat16"),
        (values.dtype, "auto", "auto"),
        (values.stored_dtype, "fp16", "float16"),
    ],
)
def test_reads(read: Callable[[str], Any], text: str, value: object) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (values.count, "1.5", "a whole number, got '1.5'"),
        (values.count, "ten", "a whole number, got 'ten'"),
        (values.count, "", "a whole number"),
        (values.seed, "-1", "0 or more"),
        (values.number, "nan", "a number, got 'nan'"),
        (values.number, "inf", "a number"),
        (values.counts, "1,,2", "an empty item"),
        (values.counts, "32,32", "names 32 twice"),
        (values.layers, "12-8", "does not go upwards"),
        (values.layers, "8--1", "does not go upwards"),
        (values.layers, "8-10,9", "names 9 twice"),
        (values.layers, "last", "block indices such as 20, 10,20, 8-12 or -1"),
        (values.one_layer, "1,2", "one block index"),
        (values.names, "french,", "an empty item"),
        (values.dtype, "int8", "auto, float32, bfloat16 or float16"),
        (values.stored_dtype, "auto", "float32, bfloat16 or float16, got 'auto'"),
    ],
)
def test_refuses(read: Callable[[str], Any], text: str, says: str) -> None:
    with pytest.raises(ArgumentTypeError, match=says):
        read(text)


@given(st.integers(-40, 40), st.integers(0, 8))
def test_ranges_hold_both_ends(first: int, length: int) -> None:
    last = first + length
    if (first < 0) != (last < 0):
        return
    assert values.layers(f"{first}-{last}") == tuple(range(first, last + 1))


@given(st.text(max_size=12))
def test_every_text_is_a_value_or_a_complaint(text: str) -> None:
    for read in (values.count, values.number, values.counts, values.layers, values.dtype):
        try:
            read(text)
        except ArgumentTypeError as error:
            assert str(error)
