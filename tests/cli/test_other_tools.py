"""Words of other tools are answered with ours, which exist."""

from functools import cache
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.cli import other_tools
from saesteer.cli.__main__ import VERBS, make_parser

from .conftest import Cli


@cache
def flags(verb: str) -> frozenset[str]:
    return frozenset(make_parser(verb).flags())


@pytest.mark.parametrize(
    "ours", sorted(other_tools._ANSWERS, key=str), ids=lambda ours: str(ours)[:40]
)
def test_every_answer_names_flags_that_a_verb_has(ours: str | tuple[str, ...]) -> None:
    verbs = [set(flags(verb)) for verb in VERBS]
    if isinstance(ours, tuple):
        for flag in ours:
            assert any(flag in found for found in verbs), flag
    else:
        named = set(other_tools.flags_in(ours))
        assert named and any(named <= found for found in verbs)
    assert "--format" in flags("convert")  # named by one of them


def test_each_word_has_one_answer() -> None:
    words = [word for text in other_tools._ANSWERS.values() for word in text.split()]
    assert len(words) == len(set(words)) == len(other_tools.WORDS)


@pytest.mark.parametrize(
    ("verb", "flag", "says"),
    [
        ("train", "--learning-rate", "here it is --lr"),
        ("train", "--learning_rate=3", "here it is --lr"),
        ("train", "--l1-coefficient", "give --k, latents per token, or --l0"),
        ("train", "--wandb", "every run writes metrics.jsonl into --out"),
        ("train", "--dict-size", "here it is --d-sae"),
        ("train", "--expansion-factor", "--d-sae, which takes the number of latents, not a mult"),
        ("train", "--steps", "--tokens, which is --batch-tokens times the number of steps"),
        ("harvest", "--hook-name", "here it is --layer and --site"),
        ("steer", "--hook-point", "here it is --layer and --site"),
        ("steer", "--features", "here it is --latents"),
        ("rank", "--features", "here it is --top"),
        ("steer", "--max-tokens", "here it is --max-new-tokens"),
        ("harvest", "--max-tokens", "here it is --tokens"),
        ("steer", "--vectors", "convert --format plan, and --plan takes that"),
        ("metrics", "--sae-release", "here it is --sae RELEASE:ID"),
        ("rank", "--top-k", "here it is --top"),
        ("steer", "--top-k", "here it is --top-p"),
        ("evaluate", "--api-key", "read from SAESTEER_JUDGE_KEY"),
        ("push", "--learning-rate", "see saesteer push --help"),  # which has none
    ],
)
def test_flags_of_other_tools(verb: str, flag: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        make_parser(verb).read([flag, "1"])
    text = str(error.value)
    assert text.startswith(f"{verb} has no flag {flag.split('=')[0]}: ") and says in text


def test_they_are_answered_in_config_files_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-3\n")
    with pytest.raises(UsageError, match="unknown key 'learning_rate' for train: here it is --lr"):
        make_parser("train").read(["-c", str(file)])


def test_verbs_of_other_tools(cli: Cli) -> None:
    assert set(other_tools.VERBS.values()) <= set(VERBS)
    assert not set(other_tools.VERBS) & set(VERBS)
    assert "unknown verb 'generate': did you mean steer?" in cli("generate").error(2)
    assert "unknown verb 'Trian': did you mean train?" in cli("Trian").error(2)
