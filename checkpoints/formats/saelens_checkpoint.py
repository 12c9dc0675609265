"""SAELens training checkpoints: weights that still expect scaled activations.

Next to `cfg.json` and `sae_weights.safetensors` lie `activation_scaler.json` and, for whitening,
`activation_whitening.safetensors`. What SAELens folds at the end of training is folded here, so
that a checkpoint reads raw activations like a finished SAE. Pickles in the folder are not read.
"""

import dataclasses

import torch
from torch import Tensor

from saesteer.checkpoints import folds, safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats import saelens
from saesteer.checkpoints.formats.sae_files import (
    SAEFiles,
    all_float,
    exactly,
    number,
    scalar,
    with_notes,
)
from saesteer.checkpoints.sae_spec import TOPK_FAMILY
from saesteer.checkpoints.sparse_autoencoder import SAE

SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"


def read(name: str, place: SAEFiles) -> SAE:
    """The SAE that SAELens would have saved, had training ended at this checkpoint."""
    config, notes = saelens.modern_config(place.config(saelens.CFG), place.source)
    tensors = safe_reading.read_safetensors(place.weights_file())
    threshold = _pop_threshold(place, tensors, str(config.get("architecture")))
    rescaled = bool(config.get("rescale_acts_by_decoder_norm"))
    trained_as = config.get("architecture")
    details = _details(config)
    if threshold is not None:
        # It becomes a jumprelu after its rows were normalised; to fold them it has to be a topk.
        config = {**config, "architecture": "topk", "k": 1}
    sae = saelens.from_parts(name, place, config, tensors, notes)
    scaler = place.config(SCALER, optional=True)
    factor = 1.0
    # SAELens sets the mode to "none" when it folds: the checkpoints called final_N are folded.
    if config.get("normalize_activations") == "expected_average_only_in":
        if scaler.get("scaling_factor") is not None:
            factor = number(place, scaler, "scaling_factor")
            sae = with_notes(
                folds.fold_average_norm(sae, factor), [f"folded the input scale {factor:.6g}"]
            )
    if config.get("normalize_activations") == "covariance_whitening" and place.has(WHITENING):
        sae = folds.fold_whitening(sae, *_whitening(place))
        sae = with_notes(sae, ["folded the whitening of the input"])
    if sae.spec.architecture in TOPK_FAMILY and sae.spec.rescale_acts_by_decoder_norm:
        sae = with_notes(folds.fold_decoder_norms(sae), ["decoder rows have length 1 now"])
    if threshold is not None:
        # The threshold is in units of latents times row norms, which the input's scale divided.
        value = threshold / factor if rescaled else threshold
        spec = dataclasses.replace(
            sae.spec,
            architecture="jumprelu",
            k=None,
            rescale_acts_by_decoder_norm=False,
            metadata={
                **sae.spec.metadata,
                "training_architecture": trained_as,
                "training_architecture_details": details,
            },
        )
        sae = dataclasses.replace(sae, spec=spec, threshold=torch.full_like(sae.b_enc, value))
        sae = with_notes(sae, [f"{trained_as} became jumprelu with threshold {value:.6g}"])
    return sae.check(f"`sae` {place.source}")


def _pop_threshold(place: SAEFiles, tensors: dict[str, Tensor], architecture: str) -> float | None:
    """The batch's running threshold of the BatchTopK family; None for the others."""
    if (architecture in saelens.BATCH_TOPK) != ("topk_threshold" in tensors):
        raise UserError(
            f"`sae` {place.source} has architecture {architecture!r} and "
            f"{'a' if 'topk_threshold' in tensors else 'no'} topk_threshold; the config and the "
            "weights do not belong together"
        )
    if "topk_threshold" not in tensors:
        return None
    value = scalar(place, tensors, "topk_threshold")
    del tensors["topk_threshold"]
    return value


def _details(config: dict[str, object]) -> dict[str, object]:
    """Settings of the training architecture, for the metadata."""
    names = ("k", "matryoshka_widths", "topk_threshold_lr")
    return {name: config[name] for name in names if name in config}


def _whitening(place: SAEFiles) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, matrix and inverse matrix of the whitening. Raises UserError."""
    tensors = safe_reading.read_safetensors(place.file(WHITENING))
    names = ("mean", "matrix", "inverse_matrix")
    exactly(place, tensors, names)
    all_float(place, tensors)
    if not all(bool(torch.isfinite(tensors[name]).all()) for name in names):
        raise UserError(f"`sae` {place.source}: {WHITENING} holds NaN or infinity; refused")
    mean, matrix, inverse = (tensors[name] for name in names)
    return mean, matrix, inverse
