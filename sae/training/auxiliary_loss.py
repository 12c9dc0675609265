"""The auxiliary loss that revives dead latents (AuxK), as a part of a pass."""

from jaxtyping import Float
from torch import Tensor

from saesteer.kernels.ops import auxk
from saesteer.sae.training.architecture import CompactGradients, DeadList, Parameters

MOST_AUX = 512
"""Most dead latents that the auxiliary loss uses for an example (Gao et al., appendix A.2)."""

# Most pre-activations of the auxiliary loss at once: 64 MiB in float32.
_AUX_ELEMENTS = 2**24


def auxiliary_loss(
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    dead: DeadList,
    weight: float,
) -> tuple[Float[Tensor, ""], CompactGradients]:
    """The loss of `saesteer.kernels.auxk` with k_aux = min(512, number dead), and its gradients.

    `error` is reconstruction minus target, held constant. Both results are multiplied by `weight`.
    """
    # With many dead latents, every n-th row of the batch stands for all, which bounds the memory.
    stride = max(1, -(-len(x) * len(dead.ids) // _AUX_ELEMENTS))
    loss, W_enc, b_enc, W_dec = auxk(
        x[::stride],
        -error[::stride],
        parameters["W_enc_rows"],
        parameters["b_enc"],
        parameters["W_dec"],
        dead.ids,
        MOST_AUX,
        dead.is_filler,
    )
    return weight * loss, CompactGradients(dead.ids, weight * W_enc, weight * b_enc, weight * W_dec)
