"""Published settings by name, with their units converted.

Reconstruction is measured here so that the mean as a reconstruction costs 1, and inputs have mean
length sqrt(d_model). For a publication whose inputs have length 1, thresholds and bandwidths are
therefore multiplied by sqrt(d_model), which `units` of `JumpReLUConfig` says; for one whose inputs
have length sqrt(d_model), weights beside a summed squared error are divided by d_model. The weights
of sparsity are not taken over: `l0` says what they are for, and they are controlled. Numbers of
steps belong to runs of hundreds of thousands: of those, a fifth of the run is the most.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from saesteer.checkpoints.errors import UsageError, none_of
from saesteer.sae.config import JumpReLUConfig, TrainConfig
from saesteer.sae.training.architectures import check_name, check_settings

_MOST_OF_A_RUN = 5


@dataclass(frozen=True)
class Recipe:
    """Settings of a publication."""

    source: str
    """Where they are published."""
    settings: Mapping[str, Any]
    """Fields of `TrainConfig`."""
    jumprelu: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `JumpReLUConfig`."""
    differs: str = ""
    """What is not done as published."""


RECIPES: dict[str, Recipe] = {
    "topk-gao": Recipe(
        "Gao et al. 2024, arXiv 2406.04093",
        {"arch": "topk", "k": (32,), "auxk": 1 / 32, "clip_norm": 1.0, "decay_share": 0.2},
        differs="the batch is yours (theirs 131,072), and there is no average of the weights",
    ),
    "batchtopk-saebench": Recipe(
        "SAEBench suite, arXiv 2503.09532; method arXiv 2412.06410",
        {"arch": "batchtopk", "lr": 3e-4, "batch_tokens": 2048, "auxk": 1 / 32, "clip_norm": 1.0,
         "decay_share": 0.2},
    ),
    "matryoshka-saebench": Recipe(
        "SAEBench suite, arXiv 2503.09532; method arXiv 2503.17547",
        {"arch": "matryoshka", "lr": 3e-4, "batch_tokens": 2048, "auxk": 1 / 32, "clip_norm": 1.0,
         "decay_share": 0.2},
        differs="AuxK weighs as printed beside the reconstruction; the suite's code divides that "
        "twice by the number of prefixes",
    ),
    "jumprelu-deepmind": Recipe(
        "Rajamanoharan et al. 2024, arXiv 2407.14435 (Gemma Scope 1)",
        {"arch": "jumprelu", "lr": 7e-5, "beta1": 0.0, "batch_tokens": 4096, "decay_share": 0.0,
         "sparsity_warmup_steps": 10_000, "auxk": 0.0},
        {"penalty": "step", "bandwidth": 1e-3, "threshold": 1e-3, "units": "unit"},
        differs="the learning rate rises linearly (theirs as a cosine)",
    ),
    "jumprelu-anthropic": Recipe(
        "Anthropic, Circuits Updates, January 2025",
        {"arch": "jumprelu", "lr": 2e-4, "clip_norm": 1.0, "decay_share": 0.2,
         "sparsity_warmup_steps": 200_000, "auxk": 0.0},
        {"penalty": "tanh", "bandwidth": 2.0, "threshold": 1.1051709180756477, "to_input": True,
         "log_threshold": True, "pre_act_loss": 3e-6},
        differs="decoder rows have length 1 and the encoder starts as their transpose; the "
        "coefficient rises over a fifth of the run (theirs over all of it), so that it can be "
        "controlled; the batch is yours (theirs 32,768)",
    ),
    "gemma-scope-2": Recipe(
        "Gemma Scope 2 technical report, December 2025",
        {"arch": "gemma-scope-2", "sparsity_warmup_steps": 50_000, "auxk": 0.0},
        {"penalty": "quadratic-per-token", "frequency_knee": 0.1},
        differs="the weight of the penalty on frequency and the bandwidth are ours: they are not "
        "published",
    ),
    "standard-2024": Recipe(
        "Anthropic, Circuits Updates, April 2024",
        {"arch": "standard", "lr": 5e-5, "batch_tokens": 4096, "clip_norm": 1.0,
         "decay_share": 0.2, "auxk": 0.0},
        differs="decoder rows have length 1, which has the same minima",
    ),
}  # fmt: skip
"""Each value of `recipe`."""


def with_recipe(
    recipe: str, given: Mapping[str, Any], jumprelu: Mapping[str, Any]
) -> tuple[TrainConfig, list[str]]:
    """The settings of a recipe and those that were given, which win; and a line for each of those
    that the recipe has otherwise, and for what it does not do as published.

    Args:
        given: fields of `TrainConfig`, without `jumprelu`.
        jumprelu: fields of `JumpReLUConfig`.

    Raises UsageError for an unknown name, and for settings that `TrainConfig` refuses.
    """
    if recipe not in RECIPES:
        raise none_of("`recipe`", RECIPES, recipe)
    one = RECIPES[recipe]
    told = [f"recipe {recipe}: {one.source}" + (f"; {one.differs}" if one.differs else "")]
    for ours, theirs in ((given, one.settings), (jumprelu, one.jumprelu)):
        told += [
            f"`{key}` {_shown(ours[key])} was given and wins: the recipe {recipe} has "
            f"{_shown(theirs[key])}"
            for key in theirs
            if key in ours and ours[key] != theirs[key]
        ]
    details = JumpReLUConfig(**{**one.jumprelu, **jumprelu})
    config = TrainConfig(**{**one.settings, **given}, jumprelu=details)
    if config.arch != one.settings["arch"]:
        _check_other_arch(recipe, config)
    rising, most = config.sparsity_warmup_steps, config.steps // _MOST_OF_A_RUN
    if "sparsity_warmup_steps" not in given and rising is not None and rising > most:
        config = replace(config, sparsity_warmup_steps=most)
    return config, told


def _check_other_arch(recipe: str, config: TrainConfig) -> None:
    """Refuse what another architecture cannot take: else a setting of the recipe would be refused
    as if it had been given."""
    check_name(config.arch)
    try:
        check_settings(config)
    except UsageError as error:
        raise UsageError(
            f"`arch` {config.arch} does not go with the recipe {recipe}, which is for "
            f"{RECIPES[recipe].settings['arch']} ({error}): leave one of them out"
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def recipe_lines() -> list[str]:
    """A line for each recipe, for help: its name, architecture and source."""
    return [f"{name} ({one.settings['arch']}; {one.source})" for name, one in RECIPES.items()]
