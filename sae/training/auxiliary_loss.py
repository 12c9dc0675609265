"""The auxiliary loss that revives dead latents (AuxK), as a part of a pass."""

from jaxtyping import Float
from torch import Tensor

from saesteer.kernels.ops import auxk
from saesteer.sae.training.architecture import CompactGradients, DeadList, Parameters

MOST_AUX = 512
"""Most dead latents that the auxiliary loss uses for an example (Gao et al., appendix A.2)."""

# Most pre-activations of the auxiliary loss at once: 64 MiB in float32.
_AUX_ELEMENTS = 2**24


def with_auxiliary_loss(
    loss: Float[Tensor, ""],
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    dead: DeadList | None,
    weight: float,
) -> tuple[Float[Tensor, ""], CompactGradients | None]:
    """`loss` plus `weight` times that of `saesteer.kernels.auxk` with k_aux = min(512, number
    dead), and the gradients of what was added; `loss` itself and None where no latent is dead.

    `error` is reconstruction minus target, held constant. `weight` is in the gradients as well.
    """
    if dead is None or not len(dead.ids):
        return loss, None
    # With many dead latents, every n-th row of the batch stands for all, which bounds the memory.
    stride = max(1, -(-len(x) * len(dead.ids) // _AUX_ELEMENTS))
    extra, W_enc, b_enc, W_dec = auxk(
        x[::stride],
        -error[::stride],
        parameters["W_enc_rows"],
        parameters["b_enc"],
        parameters["W_dec"],
        dead.ids,
        MOST_AUX,
        dead.is_filler,
    )
    gradients = CompactGradients(dead.ids, weight * W_enc, weight * b_enc, weight * W_dec)
    return loss + weight * extra, gradients
