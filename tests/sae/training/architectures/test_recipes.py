"""Published settings: their units, what wins, and that each can train."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import JumpReLUConfig, TrainConfig
from saesteer.sae.training.architectures import architecture_named, check_settings
from saesteer.sae.training.architectures.jumprelu import JumpReLU
from saesteer.sae.training.architectures.recipes import RECIPES, recipe_lines, with_recipe
from saesteer.sae.verbs.train import train


@pytest.mark.parametrize("name", RECIPES)
def test_it_names_its_source_and_settings_that_fit(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.source and set(recipe.settings) <= {f.name for f in fields(TrainConfig)}
    config, told = with_recipe(name, {}, {})
    check_settings(replace(config, d_sae=(512,)))
    assert len(told) == 1 and recipe.source in told[0]
    assert any(line.startswith(name) and recipe.source in line for line in recipe_lines())


def test_units() -> None:
    """A bandwidth of 1e-3 for inputs of length 1 is 0.024 for those of length sqrt(576)."""
    config, _ = with_recipe("jumprelu-deepmind", {}, {})
    (kind,) = architecture_named("jumprelu").from_config(config)
    assert isinstance(kind, JumpReLU)
    assert kind.in_training_units(kind.options.bandwidth, 576) == pytest.approx(0.024)
    start = kind.initialise(576, 576, 40, 0, __import__("torch").device("cpu"))["threshold"]
    assert start.tolist() == pytest.approx([0.024] * 40)
    config, _ = with_recipe("jumprelu-anthropic", {}, {})
    (kind,) = architecture_named("jumprelu").from_config(config)
    assert isinstance(kind, JumpReLU)
    assert kind.in_training_units(kind.options.bandwidth, 576) == 2.0


def test_what_is_given_wins_and_is_told() -> None:
    given = {"lr": 1e-3, "clip_norm": 1.0, "tokens": 2_000_000}
    config, told = with_recipe("jumprelu-anthropic", given, {"bandwidth": 4.0})
    assert config.lr == 1e-3 and config.jumprelu.bandwidth == 4.0 and config.jumprelu.to_input
    assert told[1:] == [
        "`lr` 0.001 was given and wins: the recipe jumprelu-anthropic has 0.0002",
        "`bandwidth` 4 was given and wins: the recipe jumprelu-anthropic has 2",
    ]
    assert config.sparsity_warmup_steps == config.steps // 5
    config, _ = with_recipe("jumprelu-anthropic", {"sparsity_warmup_steps": 700}, {})
    assert config.sparsity_warmup_steps == 700
    with pytest.raises(UsageError, match="`recipe` must be one of topk-gao, .*, got 'x'"):
        with_recipe("x", {}, {})
    with pytest.raises(UsageError, match="`arch` gated does not go with the recipe topk-gao"):
        with_recipe("topk-gao", {"arch": "gated"}, {})
    with pytest.raises(UsageError, match="^`arch` must be one of"):
        with_recipe("topk-gao", {"arch": "x"}, {})
    assert JumpReLUConfig() == with_recipe("standard-2024", {}, {})[0].jumprelu


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name: str, shards: Path, tmp_path: Path) -> None:
    given = {"d_sae": (48,), "layers": (1,), "tokens": 6400, "batch_tokens": 64}
    given |= {"buffer_tokens": 512, "lr": 3e-3}
    counts = "topk" in name or "matryoshka" in name
    given |= {"k": (4,)} if counts else {"l0": (4.0,)}
    config, _ = with_recipe(name, given, {})
    (run,) = train(tmp_path, config, activations=shards, device="cpu")
    assert run["final"]["fvu"] < 0.7
