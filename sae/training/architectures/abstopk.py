"""The AbsTopK sparse autoencoder (arXiv 2510.00404): latents may be negative.

Each example keeps its k pre-activations of largest size, with their signs, so that one latent can
stand for two opposite meanings.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.sae.training.architecture import Parameters
from saesteer.sae.training.architectures.topk import TopK

# Most pre-activations held at once: 64 MiB in float32.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class AbsTopK(TopK):
    """Each example keeps its k largest pre-activations by absolute value."""

    name: ClassVar[str] = "abstopk"

    def encode(
        self, parameters: Parameters, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """Signed activations and their latents, in ascending order of latent.

        Among equal sizes the choice is arbitrary. In plain PyTorch, with the dense pre-activations
        of a part of the examples at a time.
        """
        W, b = parameters["W_enc_rows"], parameters["b_enc"]
        acts, indices = [], []
        for rows in x.split(max(1, _CHUNK_ELEMENTS // len(W))):
            pre_acts = (rows @ W.t()).to(torch.promote_types(x.dtype, torch.float32)) + b
            chosen = pre_acts.abs().topk(self.k, dim=1, sorted=False).indices.sort(dim=1).values
            acts.append(pre_acts.gather(1, chosen))
            indices.append(chosen)
        return torch.cat(acts), torch.cat(indices)
