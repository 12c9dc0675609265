"""Whether what a steered model says is made of numbers at all."""

import threading
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.tracking.passes import PassTokens


class NotFiniteError(UserError):
    """A steered model whose outputs are infinite or not numbers: no token can be read off them."""


class FiniteOutput:
    """Watches the logits of steered passes (or the last hidden states, where none are made).

    On a CPU, and for passes over prompts, it raises at once; behind the prompts of `generate` a
    device is asked when the call ends, so that no token waits for it.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._later = threading.local()

    def look_at(self, output: Any, tokens: PassTokens) -> None:
        """Raise NotFiniteError where a real token's output is not finite, or note it."""
        found = getattr(output, "logits", None)
        if found is None:
            found = getattr(output, "last_hidden_state", None)
        if not isinstance(found, Tensor) or found.dim() != 3 or not found.is_floating_point():
            return
        low, high = found.detach().aminmax(dim=-1)
        bad = ~(low.isfinite() & high.isfinite())
        if bad.shape[1] <= tokens.length:  # generate asks for the logits of the last token only
            # What a model says at padding is read by nobody.
            bad = bad & tokens.real[:, tokens.length - bad.shape[1] :].to(bad.device)
        if tokens.after is not None and bad.device.type != "cpu":
            earlier = getattr(self._later, "bad", None)
            self._later.bad = bad.any() if earlier is None else earlier | bad.any()
        elif bad.any():
            self._raise()

    def settle(self) -> None:
        """Raise NotFiniteError for what was noted and not yet said."""
        noted, self._later.bad = getattr(self._later, "bad", None), None
        if isinstance(noted, Tensor) and bool(noted):
            self._raise()

    def _raise(self) -> None:
        dtype = str(self._lm.dtype).removeprefix("torch.")
        advice = "" if self._lm.dtype == torch.float32 else ", or load the model with float32"
        raise NotFiniteError(
            f"steered so, {self._lm.name} gives outputs that are infinite or not numbers: the dose "
            f"is more than {dtype} can hold; lower `scale`{advice}"
        )
