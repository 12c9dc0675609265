"""`saesteer formats` agrees with what `convert` takes."""

from saesteer.cli.__main__ import make_parser

from .conftest import Cli


def test_what_is_written_is_what_convert_takes(cli: Cli) -> None:
    found = cli("formats", "--json").json()
    choices = make_parser("convert").flags()["--format"].choices
    assert choices is not None
    assert {row["format"] for row in found if row["written"]} == set(choices)
    assert {"gemma-scope", "openai"} <= {row["format"] for row in found if not row["written"]}


def test_the_table_names_them(cli: Cli) -> None:
    lines = cli("formats").out.splitlines()
    assert "sparsify             SAE            yes   yes" in lines
    assert "openai               SAE            yes   -" in lines
