"""The kinds of SAE that `train` makes, one file each. A new one is a file and a line here."""

from importlib import import_module
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError

if TYPE_CHECKING:
    from saesteer.sae.config import TrainConfig
    from saesteer.sae.training.architecture import Architecture

ARCHITECTURES = {
    "topk": "topk.TopK",
    "abstopk": "abstopk.AbsTopK",
    "batchtopk": "batchtopk.BatchTopK",
    "matryoshka": "matryoshka.Matryoshka",
    "jumprelu": "jumprelu.JumpReLU",
}
"""The value of `arch`, and where its class is."""


def architecture_named(name: str) -> "type[Architecture]":
    """The class of an architecture. Raises UsageError for an unknown name."""
    if name not in ARCHITECTURES:
        raise UsageError(f"`arch` must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    module, _, kind = ARCHITECTURES[name].partition(".")
    found: type[Architecture] = getattr(import_module(f"{__name__}.{module}"), kind)
    return found


def check_settings(config: "TrainConfig") -> None:
    """Raise UsageError where the settings of `config` do not fit its architecture or its widths."""
    for architecture in architecture_named(config.arch).from_config(config):
        for d_sae in config.d_sae:
            architecture.check(d_sae)
