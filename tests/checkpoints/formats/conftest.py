"""SAEs of every architecture, with no value at 0 or 1 that would hide a mistake."""

from typing import Any

import torch

from saesteer.checkpoints.sae_spec import SAESpec
from saesteer.checkpoints.sparse_autoencoder import SAE

D_MODEL, D_SAE, D_OUT, K = 12, 40, 9, 5


def make(architecture: str = "topk", skip: bool = False, seed: int = 0, **changes: Any) -> SAE:
    """Biases at the scale of raw activations, decoder rows of different lengths."""
    options: dict[str, Any] = {
        "architecture": architecture,
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "k": K if architecture in ("topk", "abstopk", "groupmax") else None,
        "hook_name": "blocks.3.hook_resid_post",
        "hf_hook_name": "model.layers.3",
        "model_name": "tiny",
        "metadata": {"context_size": 64, "prepend_bos": False},
    }
    spec = SAESpec(**{**options, **changes})
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = spec.d_out or spec.d_model
    # Normalised tokens are about 1 long in each coordinate, raw ones 30.
    size = 1.0 if spec.scales_tokens else 30.0
    tensors = {
        "W_enc": noise(spec.d_model, spec.d_sae),
        "b_enc": size * noise(spec.d_sae),
        "W_dec": noise(spec.d_sae, width) * (0.5 + noise(spec.d_sae, 1).abs()),
        "b_dec": size * noise(width) / 2,
    }
    if architecture == "jumprelu":
        tensors["threshold"] = size * noise(spec.d_sae).abs()
    if architecture == "gated":
        tensors["b_mag"] = size * noise(spec.d_sae)
        tensors["r_mag"] = noise(spec.d_sae) / 2
    if architecture == "matching_pursuit":
        # With rows much longer than 1, each round overshoots and the pursuit never ends.
        lengths = 0.8 + 0.2 * torch.rand(spec.d_sae, 1, generator=generator)
        tensors["W_dec"] *= lengths / tensors["W_dec"].norm(dim=1, keepdim=True)
        tensors["W_enc"] = tensors["W_dec"].T.contiguous()
        tensors["b_enc"] = torch.zeros(spec.d_sae)
        if not spec.apply_b_dec_to_input:
            tensors["b_dec"] = torch.zeros(width)
    if skip:
        tensors["W_skip"] = noise(width, spec.d_model)
    return SAE(spec=spec, **tensors).check("the made-up SAE")


def activations(rows: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return 30 * torch.randn(rows, D_MODEL, generator=generator) + 15


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / ours.abs().max())
