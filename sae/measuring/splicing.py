"""A batch of text through a model four times: plain, and with its activations replaced.

Every kept row is replaced, by the reconstruction, by the mean activation or by zeros; figures are
over those kept rows that have a next token to predict.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.measuring.figures import row_values
from saesteer.sae.measuring.latents import LatentTally
from saesteer.sae.model.forward_pass import model_inputs
from saesteer.sae.model.hooks import HookPoint, hooked
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.contexts import ContextBatch

# Most log-probabilities held at once for each of the runs.
_LOG_PROBS = 2**25

Grid = Float[Tensor, "rows context"]


def pieces(
    batches: list[ContextBatch],
    kept: list[Bool[Tensor, "_ context"]],
    width: int,
) -> Iterator[tuple[ContextBatch, Bool[Tensor, "_ context"]]]:
    """The batches again, cut into pieces for which `width` numbers per token fit in memory."""
    for batch, keep in zip(batches, kept, strict=True):
        rows = max(1, _LOG_PROBS // (batch.token_ids.shape[1] * width))
        for first in range(0, len(keep), rows):
            part = slice(first, first + rows)
            yield batch[part], keep[part]


@dataclass(frozen=True)
class Spliced:
    """What one batch gave."""

    scored: Bool[Tensor, "rows context"]
    """Kept positions that have a next token to predict; on the CPU, like the values."""
    values: dict[str, Grid]
    """Columns `figures.OF_ROWS` and `figures.OF_RUNS`; meaningful at scored positions only."""
    inputs: Float[Tensor, "scored d_model"]
    """The rows at scored positions, as the SAE saw them."""


@dataclass(frozen=True)
class Splicer:
    """An SAE at its place in a model."""

    lm: LanguageModel
    sae: SAE
    point: HookPoint
    mean: Float[Tensor, " d_model"]
    """The mean activation over everything that is measured."""
    isolate: bool
    """Whether attention sees a token's own document only."""
    latents: LatentTally
    """Counts the latents at scored positions."""

    def run(self, batch: ContextBatch, keep: Bool[Tensor, "rows context"]) -> Spliced:
        """Measure a batch whose kept positions are given."""
        inputs = model_inputs(self.lm, batch, self.isolate)
        keep = keep.to(self.lm.device)
        scored = keep.clone()
        scored[:, -1] = False
        values: dict[str, Grid] = {}
        seen: list[Tensor] = []

        def splice(h: Tensor) -> Tensor:
            x = h[keep].float()
            latents = self.sae.encode(x)
            reconstruction = self.sae.decode(latents, x).float()
            mean = self.mean.float()
            read, written = x, reconstruction
            if self.sae.spec.centers_input:
                # It reads and reconstructs rows without their mean over d_model, which stays.
                read = x - x.mean(dim=1, keepdim=True)
                written, reconstruction = reconstruction, reconstruction + (x - read)
                mean = mean - mean.mean()
            for name, value in row_values(read, written, latents, mean).items():
                values[name] = _on_grid(keep, value)
            self.latents.add(latents[scored[keep]])
            seen.append(x[scored[keep]])
            return _replaced(h, keep, reconstruction)

        def ablate(h: Tensor) -> Tensor:
            return _replaced(h, keep, self.mean.float().expand(int(keep.sum()), -1))

        def erase(h: Tensor) -> Tensor:
            return _replaced(h, keep, torch.zeros_like(h[keep]))

        with torch.inference_mode():
            plain = _log_probs(self.lm, inputs)
            following = inputs["input_ids"][:, 1:, None]
            values["ce_plain"] = _nats(plain, following)
            for name, edit in (("spliced", splice), ("ablated", ablate), ("zero", erase)):
                with hooked(self.point, edit):
                    edited = _log_probs(self.lm, inputs)
                values[f"ce_{name}"] = _nats(edited, following)
                if name == "spliced":
                    values["kl"] = (plain.exp() * (plain - edited)).sum(dim=2)
        on_cpu = {name: value.cpu() for name, value in values.items()}
        return Spliced(scored.cpu(), on_cpu, seen[0])


def _log_probs(
    lm: LanguageModel, inputs: dict[str, Tensor]
) -> Float[Tensor, "rows context vocabulary"]:
    logits = lm.model(**inputs, use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1)


def _nats(log_probs: Float[Tensor, "rows context vocabulary"], following: Tensor) -> Grid:
    """Cross-entropy at each position; 0 at the last, which has nothing to predict."""
    nats = -log_probs[:, :-1].gather(2, following).squeeze(2)
    return torch.nn.functional.pad(nats, (0, 1))


def _on_grid(keep: Bool[Tensor, "rows context"], values: Float[Tensor, " kept"]) -> Grid:
    grid = torch.zeros(keep.shape, dtype=values.dtype, device=values.device)
    grid[keep] = values
    return grid


def _replaced(
    h: Float[Tensor, "rows context d_model"],
    keep: Bool[Tensor, "rows context"],
    rows: Float[Tensor, "kept d_model"],
) -> Float[Tensor, "rows context d_model"]:
    new = h.clone()
    new[keep] = rows.to(h.dtype)
    return new
