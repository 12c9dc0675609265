"""Which latents have not fired for long, counted in tokens."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saesteer.sae.training.architecture import DeadList


class SilenceCounter:
    """For each latent the tokens since it last fired; a latent that is silent for long is dead.

    On a GPU the list of dead latents has a length that the host chose at the last log line: at
    least twice the number of dead latents at that time. So no step waits for the device.
    """

    def __init__(self, d_sae: int, dead_after_tokens: int, device: torch.device) -> None:
        self.tokens_since_fired: Int[Tensor, " d_sae"] = torch.zeros(
            d_sae, dtype=torch.int64, device=device
        )
        self.dead_after_tokens = dead_after_tokens
        self.capacity = 0
        """Length of the list of dead latents on a GPU; 0 until it is first needed."""

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents silent for at least `dead_after_tokens` tokens."""
        return self.tokens_since_fired >= self.dead_after_tokens

    def count(self, fired: Int[Tensor, " d_sae"], tokens: int) -> None:
        """Count `tokens` more tokens, in which each latent fired `fired` times."""
        silent = self.tokens_since_fired + tokens
        self.tokens_since_fired.copy_(torch.where(fired > 0, 0, silent))

    def list_length(self, tokens_seen: int) -> int | None:
        """Length of the list in the next step, which decides its shapes; None before a latent can
        be dead."""
        if tokens_seen < self.dead_after_tokens:
            return None
        if self.capacity == 0 and self.tokens_since_fired.device.type != "cpu":
            self.make_room()
        return self.capacity

    def make_room(self) -> None:
        """Set the list's length from the number of dead latents now. Waits for a GPU."""
        wanted = 2 * int(self.dead.sum()) + 64
        self.capacity = min(len(self.tokens_since_fired), 1 << (wanted - 1).bit_length())

    def listed(self, tokens_seen: int) -> DeadList | None:
        """The dead latents, on a GPU the longest silent first; None before a latent can be dead."""
        length = self.list_length(tokens_seen)
        if length is None:
            return None
        if self.tokens_since_fired.device.type == "cpu":
            return DeadList(self.dead.nonzero()[:, 0])
        ids = self.tokens_since_fired.topk(length).indices
        return DeadList(ids, ~self.dead[ids])
