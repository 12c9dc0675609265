"""Flags, aliases, config files and one-line complaints."""

import argparse
import re
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.cli.__main__ import VERBS, make_parser
from saesteer.cli.parser import VerbParser


def read(verb: str, *words: str) -> object:
    return make_parser(verb).read(words)


def value(verb: str, name: str, *words: str) -> object:
    return getattr(read(verb, *words), name)


def complaint(verb: str, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(verb, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("words", "name", "found"),
    [
        (["--layer", "-1"], "layer", (-1,)),
        (["--layer", "-1,-2"], "layer", (-1, -2)),
        (["--layers", "-4--1"], "layer", (-4, -3, -2, -1)),
        (["--layer=8-9"], "layer", (8, 9)),
        (["-m", "x"], "model", "x"),
        (["-mx"], "model", "x"),
        (["--data", "a", "--data", "b"], "data", ("a", "b")),
        (["--tokens", "2M"], "tokens", 2_000_000),
        (["-o", "x"], "out", "x"),
        ([], "device", "auto"),
        ([], "tokens", None),
    ],
)
def test_harvest_flags(words: list[str], name: str, found: object) -> None:
    assert value("harvest", name, *words) == found


@pytest.mark.parametrize("name", ["--scale", "--strength", "--alpha", "--coeff", "--multiplier"])
def test_strength_has_many_names(name: str) -> None:
    assert value("steer", "scale", name, "-1.5") == -1.5
    assert value("steer", "scale", f"{name}=-.5") == -0.5


def test_other_flags_of_steer() -> None:
    words = ["--positions", "all", "--latents", "9143:1.2,412:0.8", "-p", "- a list", "-p", "-1"]
    args = make_parser("steer").read([*words, "--no-chat"])
    assert (args.scope, args.latents) == ("all", "9143:1.2,412:0.8")
    assert args.prompt == ("- a list", "-1")
    assert args.chat is False
    assert value("steer", "chat") is None


def test_explain_takes_ids_or_nothing() -> None:
    assert value("rank", "explain") is None
    assert value("rank", "explain", "--explain") == ()
    assert value("rank", "explain", "--explain", "3,17") == (3, 17)
    assert value("rank", "explain", "--explain", "--json") == ()


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_main_names_and_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser(verb).read(["--help"])
    text = capsys.readouterr().out
    lists = verb in ("tasks", "formats", "models", "watch")  # which compute nothing
    common = ("--config", "--out", "--quiet")
    without = {"--out"} if verb == "serve" else set()
    assert [name in text for name in common] == [
        not lists and name not in without for name in common
    ]
    assert "--json" in text
    assert f"example:\n  saesteer {verb}" in text
    for alias in ("--layers", "--strength", "--alpha", "--coeff", "--multiplier", "--positions"):
        assert not re.search(rf"{alias}(?![\w-])", text)
    assert "None" not in text
    for action in make_parser(verb)._actions:
        assert action.help, action.option_strings
        if action.nargs != 0 and action.dest != "prompt" and action.help != argparse.SUPPRESS:
            stated = ("(default", "(needed", "(live training)", "needed with", "repeatable")
            own = ("--activations", "--task", "--instruction", "--contents", "--plan", "--sae",
                   "--latents", "--prompts", "--gate", "--pairs", "--models", "--tasks",
                   "--tuned")  # fmt: skip
            assert any(word in action.help for word in stated) or action.option_strings[0] in own


@pytest.mark.parametrize(
    ("verb", "words", "says"),
    [
        ("train", ["--layr", "3"], "train has no flag --layr: did you mean --layer?"),
        ("train", ["--layr=3"], "train has no flag --layr: did you mean --layer?"),
        ("train", ["--zzz"], "train has no flag --zzz: see saesteer train --help"),
        ("train", ["--tok", "3"], "train has no flag --tok"),  # abbreviations are not taken
        ("train", ["here"], "unexpected 'here'"),
        ("train", ["--tokens"], "--tokens needs a value: --tokens N"),
        ("train", ["-o"], "--out needs a value: --out DIR"),
        ("train", ["--model", "--force"], "--model needs a value: --model NAME"),
        ("train", ["--force=yes"], "--force takes no value"),
        ("train", ["--tokens", "many"], "--tokens must be a whole number, got 'many'"),
        ("train", ["--k", "8,8"], "--k names 8 twice"),
        ("train", ["--dtype", "int8"], "--dtype must be auto, float32, bfloat16 or float16"),
        ("harvest", ["--layer", "8--1"], "--layer has a range '8--1' that does not go upwards"),
        ("harvest", ["--alpha", "1"], "harvest has no flag --alpha"),  # an alias of steer's flag
        ("metrics", ["--layer", "1,2"], "--layer must be one block index"),
    ],
)
def test_complaints(verb: str, words: list[str], says: str) -> None:
    assert says in complaint(verb, *words)


# --- config files --------------------------------------------------------------------------------


def test_config_gives_values_and_flags_win(tmp_path: Path) -> None:
    first = written(
        tmp_path,
        "model: first\nlayer: [1, -1]\nbatch_tokens: 4k\nlr: 1e-3\nforce: true\n"
        "data: [a.txt, b.txt]\nreplies: french,json\nk: 8\n",
    )
    second = written(tmp_path, "model: second\nbatch-tokens: 64\n", "second.yaml")
    args = make_parser("train").read(["-c", first, "--config", second, "--k", "16"])
    assert args.model == "second"  # later files win
    assert args.layer == (1, -1)
    assert args.batch_tokens == 64  # _ and - mean the same
    assert args.lr == 1e-3
    assert args.force is True
    assert args.data == ("a.txt", "b.txt")
    assert args.replies == ("french", "json")
    assert args.k == (16,)  # flags win
    args = make_parser("train").read(["-c", first, "--data", "c.txt"])
    assert args.data == ("c.txt",)  # also over a list


def test_config_takes_what_yaml_would_change(tmp_path: Path) -> None:
    config = written(
        tmp_path, "latents: 9143:12,412:0.8\nno_chat: yes\nstrength: 2\nprompt: 'yes'\nbeta:\n"
    )
    args = make_parser("steer").read(["-c", config])
    assert args.latents == "9143:12,412:0.8"
    assert args.chat is False
    assert args.scale == 2.0
    assert args.prompt == ("yes",)
    assert args.beta is None
    explained = written(tmp_path, "explain: true\n", "explain.yaml")
    assert value("rank", "explain", "-c", explained) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tokns: 5\n", "unknown key 'tokns' for train: did you mean --tokens?"),
        ("config: x\n", "unknown key 'config' for train"),
        ("tokens: many\n", "tokens must be a whole number, got 'many'"),
        ("tokens: [1, 2]\n", "tokens must be one value, got a list"),
        ("model: {name: x}\n", "model must be one value, got a mapping"),
        ("k: [8, 8]\n", "k names 8 twice"),
        ("force: maybe\n", "force must be true or false, got 'maybe'"),
        ("a: b: c\n", "is not valid YAML at line 1"),
        ("- tokens\n", "must hold `flag: value` lines"),
    ],
)
def test_config_complaints_name_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    config = written(tmp_path, text)
    found = complaint("train", "-c", config)
    assert found.startswith(f"--config {config}")
    assert says in found


def test_config_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in complaint("train", "-c", str(tmp_path / "no.yaml"))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model: caf\xe9\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        read("train", "-c", str(latin))
    assert value("train", "model", "-c", written(tmp_path, "")) is None


def test_help_of_rank_states_what_its_config_takes() -> None:
    from dataclasses import fields

    from saesteer.steering.hooking.scope import SCOPES
    from saesteer.steering.plans.methods import METHODS, UNITS
    from saesteer.steering.ranking.config import FILTERS, READS, SCORES, RankConfig

    flags = make_parser("rank").flags()
    for field in fields(RankConfig):
        name = "rank_contents" if field.name == "contents" else field.name
        stated = flags["--" + name.replace("_", "-")].help or ""
        if field.default not in (None, (), False) and name != "seed":
            value = field.default
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert f"(default: {text})" in stated
    for words, stated in (
        (READS, flags["--read"].help),
        (SCORES, flags["--by"].help),
        (FILTERS, flags["--drop"].help),
        (UNITS, flags["--unit"].help),
        # Only plans of directions hold what `set-to` needs.
        (set(METHODS) - {"set-to"}, make_parser("steer").flags()["--method"].help),
        (SCOPES, make_parser("steer").flags()["--scope"].help),
    ):
        assert all(word in (stated or "") for word in words)


def test_a_parser_needs_no_verb_of_ours() -> None:
    parser = VerbParser("own", "Does nothing.", "saesteer own")
    parser.add_argument("--config")
    assert parser.read([]).config is None
