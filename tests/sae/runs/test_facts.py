"""What a run remembers of its model and text, and how a later one is told from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs.facts import as_given, check_same_run, model_facts


def test_a_model_is_known_by_its_weights(fresh_lm: Callable[..., LanguageModel]) -> None:
    one, same, other = (model_facts(fresh_lm(seed=seed)) for seed in (0, 0, 1))
    assert one == same and one["hash"] != other["hash"]
    assert (one["n_layers"], one["d_model"], one["dtype"]) == (4, 32, "float32")


def test_a_folder_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert as_given("model") == str(tmp_path / "model")
    assert as_given("owner/model") == "owner/model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"k": [5]}}, r"made with `k` \[4\], now it is \[5\]"),
        ({"layers": [2]}, r"made with `layer` \[1\], now it is \[2\]"),
        ({"model": {"hash": "ef", "dtype": "float32"}}, "`model` of hash ab, now it is ef"),
        ({"data": ["other"]}, "made from other text.* one row added or deleted changes the order"),
    ],
)
def test_a_run_that_differs_is_not_resumed(change: dict[str, Any], message: str) -> None:
    before = {
        "config": {"k": [4], "gone": 1}, "layers": [1], "data": ["text"],
        "model": {"hash": "ab", "dtype": "float32", "name": "a"},
    }  # fmt: skip
    now = {**before, "config": {"k": (4,)}, "model": {"hash": "ab", "dtype": "float32"}}
    check_same_run(before, now, Path("run"))
    newer = {**now, "config": {"k": (4,), "prefixes": ()}}
    check_same_run(before, newer, Path("run"), {"prefixes": ()})
    with pytest.raises(UserError, match=r"made with `prefixes` \[\], now it is \[3\]"):
        set_since = {**now, "config": {"prefixes": (3,)}}
        check_same_run(before, set_since, Path("run"), {"prefixes": ()})
    with pytest.raises(UserError, match=message):
        check_same_run(before, {**now, **change}, Path("run"))
