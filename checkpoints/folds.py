"""Rewrites of an SAE's weights that compute the same function.

Each takes an SAE and returns a new one. Sums are taken in float64 and rounded once, to the dtype of
the weights. Where latents change their units, the docstring says so.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_spec import TOPK_FAMILY
from saesteer.checkpoints.sparse_autoencoder import SAE


def fold_input_bias(sae: SAE) -> SAE:
    """Stop subtracting b_dec from the input: b_enc -= b_dec W_enc. Latents stay the same."""
    return _shift_input_bias(sae, remove=True) if sae.spec.apply_b_dec_to_input else sae


def unfold_input_bias(sae: SAE) -> SAE:
    """Subtract b_dec from the input, and add b_dec W_enc to b_enc. Latents stay the same.

    Raises UserError for a transcoder.
    """
    if sae.spec.is_transcoder:
        raise UserError("a transcoder's b_dec cannot be subtracted from its input")
    return sae if sae.spec.apply_b_dec_to_input else _shift_input_bias(sae, remove=False)


def fold_average_norm(sae: SAE, scale: float) -> SAE:
    """Weights for raw activations, of an SAE that was trained on `scale` times them.

    W_enc *= scale, W_dec /= scale, b_dec /= scale; latents keep the values that they had on scaled
    activations, and so does the threshold.
    """
    _refuse_pursuit(sae)
    if not math.isfinite(scale) or scale <= 0:
        raise UserError(f"the scale of the input must be a positive number, got {scale}")
    return _with(
        sae,
        W_enc=_wide(sae.W_enc) * scale,
        W_dec=_wide(sae.W_dec) / scale,
        b_dec=_wide(sae.b_dec) / scale,
        normalize_activations="none",
    )


def fold_decoder_norms(sae: SAE) -> SAE:
    """Make decoder rows unit vectors; a latent then is the length that it adds along its row.

    With `rescale_acts_by_decoder_norm` latents had these units already, and the option is switched
    off. A row of zeros stays.

    Raises UserError for topk, abstopk and groupmax without it, whose choice of latents would
    change, unless the rows have length 1 already.
    """
    norms = torch.linalg.vector_norm(_wide(sae.W_dec), dim=-1)
    n = torch.where(norms > 0, norms, torch.ones_like(norms)).clamp(min=1e-8)
    architecture = sae.spec.architecture
    chooses = architecture in (*TOPK_FAMILY, "groupmax", "matching_pursuit")
    if chooses and not sae.spec.rescale_acts_by_decoder_norm:
        # 1e-3: bfloat16 rows that were normalised before rounding.
        if bool(((norms - 1).abs() < 1e-3).all()):
            return sae
        raise UserError(
            f"the decoder rows of this {architecture} SAE have different lengths, and its latents "
            "are chosen without regard to them: making them 1 would change which are chosen"
        )
    changes: dict[str, Any] = {
        "W_enc": _wide(sae.W_enc) * n,
        "b_enc": _wide(sae.b_enc) * n,
        "W_dec": _wide(sae.W_dec) / n[:, None],
        "rescale_acts_by_decoder_norm": False,
    }
    for name in ("threshold", "b_mag"):
        if (tensor := getattr(sae, name)) is not None:
            changes[name] = _wide(tensor) * n
    return _with(sae, **changes)


def fold_centred_scale(
    trained: Mapping[str, Tensor],
    read: Sequence[tuple[Tensor, float]],
    write: Sequence[tuple[Tensor, float]],
) -> dict[str, Float[Tensor, "..."]]:
    """Weights for raw activations, of an SAE with unit decoder rows that was trained on
    x~ = a (x - mean), with a mean and an a for each place that it reads, and that it writes.

    Latents f = f~ / a come out in units of the first place written, of factor a: each is the length
    that it adds there. W_enc takes each read place's factor over a (1 for an SAE of one place),
    b_enc = b_enc~ / a - mean W_enc, and a threshold is divided by a. The reconstruction is W_dec
    with a over the factor of each place written (1 for the first), and b_dec = mean + b_dec~ /
    factor. A skip connection takes the factor of each place read over that of each place written,
    and b_dec loses mean W_skip^T. Products are taken in float64; float32 tensors on the CPU come
    out.

    Args:
        trained: `W_enc` latent-major, `[d_sae, d_in]`; `b_enc`; `W_dec`; `b_dec`; perhaps
            `threshold` or `log_threshold`; `b_mag` and `r_mag` of a gated SAE; `W_skip`.
        read: mean `[d_model]` and factor of each place side by side in the input.
        write: the same of the output.
    """
    wide = {name: _wide(tensor.cpu()) for name, tensor in trained.items()}
    mean_in, factors_in = _columns(read)
    mean_out, factors_out = _columns(write)
    factor = write[0][1]
    encoder = wide["W_enc"].T * (factors_in / factor)[:, None]
    folded = {
        "W_enc": encoder.float().contiguous(),
        "b_enc": (wide["b_enc"] / factor - mean_in @ encoder).float(),
        "W_dec": (wide["W_dec"] * (factor / factors_out)).float().contiguous(),
        "b_dec": (mean_out + wide["b_dec"] / factors_out).float(),
    }
    if "log_threshold" in wide:
        wide["threshold"] = wide["log_threshold"].exp()
    if "threshold" in wide:
        folded["threshold"] = (wide["threshold"] / factor).float()
    if "r_mag" in wide:
        # The magnitude's bias, on the same product times exp(r_mag).
        shift = (mean_in @ encoder) * wide["r_mag"].exp()
        folded["b_mag"] = (wide["b_mag"] / factor - shift).float()
        folded["r_mag"] = wide["r_mag"].float()
    if "W_skip" in wide:
        skip = wide["W_skip"] * factors_in / factors_out[:, None]
        folded["W_skip"] = skip.float()
        folded["b_dec"] = (mean_out + wide["b_dec"] / factors_out - skip @ mean_in).float()
    return folded


def unfold_centred_scale(
    raw: Mapping[str, Tensor], mean: Float[Tensor, " d_model"], factor: float
) -> dict[str, Float[Tensor, "..."]]:
    """The inverse of `fold_centred_scale` for an SAE of one place: weights for x~ = a (x - mean).

    Args:
        raw: the tensors of an SAE in canonical form; `W_enc` is `[d_model, d_sae]`.

    Returns:
        The same names in float32, `W_enc` latent-major; with `threshold` its `log_threshold`, too.
    """
    wide = {name: _wide(tensor.cpu()) for name, tensor in raw.items()}
    mean = _wide(mean.cpu())
    shift = mean @ wide["W_enc"]
    found = {
        "W_enc": wide["W_enc"].T,
        "b_enc": (wide["b_enc"] + shift) * factor,
        "W_dec": wide["W_dec"],
        "b_dec": (wide["b_dec"] - mean) * factor,
    }
    if "threshold" in wide:
        found["threshold"] = wide["threshold"] * factor
        found["log_threshold"] = found["threshold"].clamp_min(1e-12).log()
    if "r_mag" in wide:
        found["r_mag"] = wide["r_mag"]
        found["b_mag"] = (wide["b_mag"] + shift * wide["r_mag"].exp()) * factor
    return {name: values.float().contiguous() for name, values in found.items()}


def _columns(places: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    """The means of places side by side, and the factor of each column."""
    means = [_wide(mean.cpu()) for mean, _ in places]
    factors = [
        torch.full_like(mean, factor) for mean, (_, factor) in zip(means, places, strict=True)
    ]
    return torch.cat(means), torch.cat(factors)


def fold_whitening(sae: SAE, mean: Tensor, matrix: Tensor, inverse: Tensor) -> SAE:
    """Weights for raw activations x, of an SAE that was trained on (x - mean) @ matrix.

    `inverse` is the inverse of `matrix`. Raises UserError for shapes that do not fit.
    """
    _refuse_pursuit(sae)
    width = sae.spec.d_model
    shapes = (tuple(mean.shape), tuple(matrix.shape), tuple(inverse.shape))
    if shapes != ((width,), (width, width), (width, width)):
        raise UserError(f"a whitening of width {width} is needed, got shapes {shapes}")
    if sae.spec.rescale_acts_by_decoder_norm:
        sae = fold_decoder_norms(sae)
    mean, matrix, inverse = _wide(mean), _wide(matrix), _wide(inverse)
    encoder = matrix @ _wide(sae.W_enc)
    changes: dict[str, Any] = {
        "W_enc": encoder,
        "W_dec": _wide(sae.W_dec) @ inverse,
        "b_dec": _wide(sae.b_dec) @ inverse + mean,
        "normalize_activations": "none",
    }
    if not sae.spec.apply_b_dec_to_input:
        changes.update(_shifted(sae, -(mean @ encoder)))
    return _with(sae, **changes)


def as_jumprelu(sae: SAE) -> SAE:
    """The same function as a JumpReLU, of a ReLU or of a gated SAE. Latents stay the same.

    A gated latent is active where u + b_gate > 0 and its magnitude u exp(r_mag) + b_mag > 0, which
    both are thresholds of the magnitude: W_enc exp(r_mag), b_mag, and
    max(0, b_mag - b_gate exp(r_mag)).

    Raises UserError for other architectures.
    """
    if sae.spec.architecture == "jumprelu":
        return sae
    if sae.spec.architecture == "standard":
        return _with(sae, architecture="jumprelu", threshold=torch.zeros_like(sae.b_enc))
    if sae.spec.architecture != "gated" or sae.b_mag is None or sae.r_mag is None:
        raise UserError(
            f"an SAE of architecture {sae.spec.architecture} chooses its latents by comparing them:"
            " it has no form as a jumprelu"
        )
    scale = _wide(sae.r_mag).exp()
    b_mag = _wide(sae.b_mag)
    changed = _with(
        sae,
        architecture="jumprelu",
        W_enc=_wide(sae.W_enc) * scale,
        b_enc=b_mag,
        threshold=(b_mag - _wide(sae.b_enc) * scale).clamp(min=0),
    )
    return dataclasses.replace(changed, b_mag=None, r_mag=None)


def canonical(sae: SAE) -> SAE:
    """Unit decoder rows and no input bias, so that doses compare across SAEs.

    Raises UserError where there is no such form: for token-wise normalisation, and for topk whose
    rows have different lengths.
    """
    if sae.spec.scales_tokens:
        raise UserError(
            f"normalize_activations {sae.spec.normalize_activations!r} scales each token, which no "
            "weights can say: leave out `canonical`"
        )
    folded = fold_decoder_norms(fold_input_bias(sae))
    return _with(folded, normalize_activations="none")


def _shift_input_bias(sae: SAE, remove: bool) -> SAE:
    _refuse_pursuit(sae)
    shift = _wide(sae.b_dec) @ _wide(sae.W_enc)
    return _with(sae, **_shifted(sae, -shift if remove else shift), apply_b_dec_to_input=not remove)


def _shifted(sae: SAE, shift: Tensor) -> dict[str, Any]:
    """The encoder's biases after `shift` was added to the pre-activations."""
    changes: dict[str, Any] = {"b_enc": _wide(sae.b_enc) + shift}
    if sae.b_mag is not None and sae.r_mag is not None:
        changes["b_mag"] = _wide(sae.b_mag) + shift * _wide(sae.r_mag).exp()
    return changes


def _with(sae: SAE, **changes: Any) -> SAE:
    """A copy in which tensors (rounded to the SAE's dtype) and fields of the spec are replaced."""
    kind = sae.W_enc.dtype
    tensors: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, Tensor):
            tensors[name] = value.to(kind)
    fields = {name: value for name, value in changes.items() if name not in tensors}
    return dataclasses.replace(sae, **tensors, spec=dataclasses.replace(sae.spec, **fields))


def _refuse_pursuit(sae: SAE) -> None:
    """Raise UserError for a matching_pursuit SAE, whose encoder is its decoder."""
    if sae.spec.architecture == "matching_pursuit":
        raise UserError(
            "a matching_pursuit SAE reads by its decoder's rows: nothing of its input can be folded"
        )


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float64."""
    return tensor.detach().to(torch.float64)
