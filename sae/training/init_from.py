"""An SAE that exists as the start of a training."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.folds import canonical, unfold_centred_scale
from saesteer.checkpoints.sparse_autoencoder import SAE
from saesteer.sae.training.architecture import Architecture
from saesteer.sae.training.sae_trainer import SAETrainer, Variant

# Worse than this a reconstruction is that of other activations: the mean alone has 1.
_WORST_FVU = 1.0
_ROWS = 4096
_ROWS_AT_ONCE = 256


def check_start(sae: SAE, variants: list[Variant]) -> None:
    """Refuse an SAE that the one SAE of a run cannot start from, before anything is read.

    Raises UsageError for several SAEs, another width or another architecture.
    """
    if len(variants) != 1:
        raise UsageError(f"`init_from` starts one SAE, and these settings make {len(variants)}")
    (variant,) = variants
    if variant.reads != variant.writes or len(variant.reads) != 1 or sae.spec.is_transcoder:
        raise UsageError("`init_from` starts SAEs that read and write one place, no transcoders")
    if sae.spec.d_sae != variant.d_sae:
        raise UsageError(
            f"`init_from` {sae.source} has {sae.spec.d_sae} latents, and `d_sae` is "
            f"{variant.d_sae}: leave `d_sae` out"
        )
    was, will_be = trained_as(sae.spec.architecture, sae.spec.metadata), architecture_of(variant)
    if was != will_be:
        raise UsageError(
            f"`init_from` {sae.source} was trained with `arch` {was}, and `arch` is {will_be}: "
            "give that one"
        )


def trained_as(architecture: str, metadata: Mapping[str, Any]) -> str:
    """The architecture of a training, which may be saved as another one that infers the same."""
    return str(metadata.get("training_architecture", architecture))


def architecture_of(variant: Variant) -> str:
    """`trained_as` of what a variant will save."""
    spec = variant.architecture.spec()
    return trained_as(spec["architecture"], spec.get("metadata", {}))


def differences(sae: SAE, variant: Variant) -> str | None:
    """Settings of the architecture that will be others than in the training before; None without
    any."""
    before = {"k": sae.spec.k, **sae.spec.metadata}
    changed = [
        f"{name} {before[name]:g} before, {value:g} now"
        for name, value in variant.architecture.settings.items()
        if isinstance(before.get(name), int | float) and before[name] != value
    ]
    return ", ".join(changed) or None


@torch.no_grad()
def start_from(sae: SAE, trainer: SAETrainer, rows: Float[Tensor, "rows d_model"]) -> float:
    """Give a trainer the parameters of an SAE, in the units of the training; its optimiser starts
    anew. Returns the SAE's FVU on `rows`, a sample of the activations.

    Raises UserError for an SAE without canonical form, another width, or one that does not
    reconstruct these activations.
    """
    if sae.spec.d_model != trainer.d_in:
        raise UserError(
            f"`init_from` {sae.source} reads {sae.spec.d_model} numbers, the activations have "
            f"{trainer.d_in}: it is of another model"
        )
    raw = canonical(sae.to("cpu", torch.float32))
    fvu = _fvu(raw, rows[:_ROWS])
    if not fvu < _WORST_FVU:
        (place,) = trainer.variant.reads
        raise UserError(
            f"`init_from` {sae.source} does not reconstruct the activations of layer {place[0]} "
            f"{place[1]} (FVU {fvu:.3g}; their mean alone has 1): was it trained on another layer, "
            "site or model, or on activations of another scale?"
        )
    (scale,) = trainer.read
    found = unfold_centred_scale(raw.tensors(), scale.mean, scale.factor)
    architecture: Architecture = trainer.architecture
    for ours, name in architecture.canonical_names.items():
        values = found["log_threshold" if ours == "log_threshold" else name]
        trainer.optimiser.set_parameter(ours, values)
    for ours, name in architecture.canonical_buffers.items():
        trainer.buffers[ours].copy_(trainer.own(found[name]))
    return fvu


def _fvu(sae: SAE, rows: Float[Tensor, "rows d_model"]) -> float:
    mean = rows.double().mean(dim=0)
    error = deviation = 0.0
    for piece in rows.split(_ROWS_AT_ONCE):
        x = piece.cpu().float()
        error += float((x - sae.reconstruct(x)).square().sum(dtype=torch.float64))
        deviation += float((x.double() - mean).square().sum())
    return error / max(deviation, 1e-30)
