"""The kinds of SAE that `train` makes, one file each. A new one needs a file and a line here."""

from importlib import import_module
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError, none_of

if TYPE_CHECKING:
    from saesteer.sae.config import TrainConfig
    from saesteer.sae.training.architecture import Architecture

ARCHITECTURES = {
    "topk": "topk.TopK",
    "abstopk": "abstopk.AbsTopK",
    "batchtopk": "batchtopk.BatchTopK",
    "matryoshka": "matryoshka.Matryoshka",
    "jumprelu": "jumprelu.JumpReLU",
    "gemma-scope-2": "gemma_scope_2.GemmaScope2",
    "standard": "standard.Standard",
    "gated": "gated.Gated",
    "transcoder": "transcoder.Transcoder",
    "skip-transcoder": "transcoder.SkipTranscoder",
    "crosscoder": "crosscoder.Crosscoder",
}
"""Each value of `arch`, and the module and class that implement it."""

_ELSEWHERE = {
    "relu": "standard",
    "vanilla": "standard",
    "l1": "standard",
    "batch_topk": "batchtopk",
    "batch-topk": "batchtopk",
    "matryoshka_batchtopk": "matryoshka",
    "skip_transcoder": "skip-transcoder",
    "gemma_scope_2": "gemma-scope-2",
}
"""What other trainers call them."""


def check_name(name: str) -> None:
    """Raise UsageError for a name that no architecture has."""
    if name in _ELSEWHERE:
        raise UsageError(f"`arch` {name} is called {_ELSEWHERE[name]} here")
    if name not in ARCHITECTURES:
        raise none_of("`arch`", ARCHITECTURES, name)


def architecture_named(name: str) -> "type[Architecture]":
    """The class of an architecture. Raises UsageError for an unknown name."""
    check_name(name)
    module, _, class_name = ARCHITECTURES[name].partition(".")
    architecture: type[Architecture] = getattr(import_module(f"{__name__}.{module}"), class_name)
    return architecture


def check_settings(config: "TrainConfig") -> None:
    """Raise UsageError where the settings of `config` do not fit its architecture or its widths."""
    kind = architecture_named(config.arch)
    for name in () if kind.transcodes else ("to_layer", "to_site"):
        if getattr(config, name) is not None:
            raise UsageError(
                f"`{name}` is no setting of `arch` {config.arch}, got {getattr(config, name)}: "
                "leave it out"
            )
    if kind.transcodes and config.to_layer is None and config.to_site is None:
        raise UsageError(
            f"`arch` {config.arch} needs `to_layer` or `to_site`: what is reconstructed, such as "
            "`to_site` mlp_out"
        )
    for architecture in kind.from_config(config):
        for d_sae in config.d_sae:
            architecture.check(d_sae)
