"""A recorded harvest gives its rows again to the bit, and what does not is named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import Interrupted, UsageError, UserError
from saesteer.checkpoints.files import read_json, read_tensors, write_json, write_tensors
from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.model.language_model import LanguageModel, load_model
from saesteer.sae.verbs.harvest import harvest
from saesteer.sae.verbs.reproduce import reproduce

CONFIG = HarvestConfig(
    layers=(1, -1), tokens=400, shard_tokens=150, keep_positions=True,
    text=TextConfig(context=32, batch_size=2, max_norm_ratio=1.3, seed=3),
)  # fmt: skip


@pytest.fixture
def lm(tiny_model_dir: Callable[..., Path]) -> LanguageModel:
    return load_model(str(tiny_model_dir("llama")), device="cpu")


def test_the_same_rows_again(lm: LanguageModel, tmp_path: Path) -> None:
    harvest(lm, tmp_path / "acts", CONFIG, replies=["Say one.", "Say two."])
    found = reproduce(tmp_path / "acts")
    assert found["equal"] and found["shards"]["shards_equal"] and found["again"] is None
    assert found["shards"]["tokens"] == [400, 400] and found["differences"] == []
    kept = reproduce(tmp_path / "acts", tmp_path / "again")
    assert kept["equal"] and kept["again"] == str(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes", [{"shuffle": True}, {"store_dtype": "bfloat16"}, {"site": "mlp_out"}]
)
def test_settings_are_those_recorded(
    lm: LanguageModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    harvest(lm, tmp_path / "acts", replace(CONFIG, **changes))
    found = reproduce(tmp_path / "acts")
    assert found["equal"] and found["shards"]["shards_equal"]


def test_a_harvest_that_was_stopped_has_other_shards_and_the_same_rows(
    lm: LanguageModel, stop_at: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        harvest(lm, tmp_path / "acts", CONFIG, progress=stop_at("harvest", 90))
    harvest(lm, tmp_path / "acts", CONFIG, resume=True)
    found = reproduce(tmp_path / "acts")
    assert found["equal"] and not found["shards"]["shards_equal"]


def test_what_differs_is_said(
    lm: LanguageModel, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    harvest(lm, tmp_path / "acts", CONFIG)
    manifest = read_json(tmp_path / "acts" / "manifest.json")
    other = reproduce(tmp_path / "acts", model=str(tiny_model_dir("llama", seed=1)))
    assert not other["equal"] and other["shards"]["max_abs_difference"] > 0
    assert "model.hash" in [difference["what"] for difference in other["differences"]]
    # One number of the second shard's tenth row; 150 rows lie before it, or a few more.
    entry = manifest["shards"][2]
    path = tmp_path / "acts" / entry["file"]
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    tensors["activations"][9, 5] += 0.5
    entry["sha256"] = write_tensors(path, tensors)
    manifest["versions"]["torch"] = "1.0"
    write_json(tmp_path / "acts" / "manifest.json", manifest)
    found = reproduce(tmp_path / "acts")
    shards = found["shards"]
    assert not found["equal"] and shards["tokens_equal"]
    assert shards["first_differing_row"] == manifest["shards"][0]["tokens"] + 9
    assert shards["max_abs_difference"] == pytest.approx(0.5, abs=1e-6)
    assert [d["what"] for d in found["differences"]] == ["versions.torch"]


def test_harvests_that_are_not_repeated(lm: LanguageModel, tmp_path: Path) -> None:
    harvest(lm, tmp_path / "acts", CONFIG)
    path = tmp_path / "acts" / "manifest.json"
    manifest = read_json(path)
    for changes, words in (
        ({"complete": False}, "was not finished"),
        ({"recipe": None}, "names no recipe"),
        ({"processes": 2}, "written by 2 processes"),
        ({"config": 3}, "is not an object"),
        (
            {"config": {**manifest["config"], "surprise": 1}},
            "restore manifest.json.*'surprise'",
        ),
        (
            {"config": {**manifest["config"], "context": "x"}},
            "'text.context' must be a whole",
        ),
        ({"layers": "x"}, "key 'layers' must be a list, got 'x'"),
    ):
        write_json(path, {**manifest, **changes})
        with pytest.raises(UserError, match=words) as error:
            reproduce(tmp_path / "acts")
        assert "\n" not in str(error.value)
    write_json(path, manifest)
    with pytest.raises(UsageError, match="this run is a harvest, give `model`"):
        reproduce(tmp_path / "acts", activations=tmp_path)
