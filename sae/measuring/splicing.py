"""A batch of text through a model four times: plain, and with its activations replaced.

Every kept row is replaced, by the reconstruction, by the mean activation or by zeros; figures are
over those kept rows that have a next token to predict.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.measuring.figures import row_values
from saesteer.sae.measuring.latents import LatentTally
from saesteer.sae.model.forward_pass import model_inputs
from saesteer.sae.model.hooks import capture, hooked
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import SAEPlaces
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
    """An SAE at its places in a model.

    What it reads comes from the plain run; its reconstruction then takes the place of all that it
    writes, in one run.
    """

    lm: LanguageModel
    sae: SAE
    places: SAEPlaces
    mean: Float[Tensor, " d_out"]
    """The mean of what it writes, over everything that is measured."""
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
        with torch.inference_mode():
            with capture(self.places.points) as seen:
                plain = _log_probs(self.lm, inputs)
            rows = {key: h[keep].float() for key, h in seen.items()}
            x, target, mean = self.places.input(rows), self.places.target(rows), self.mean.float()
            acts = self.sae.encode(x)
            self.latents.add(acts[scored[keep]])
            reconstruction = written = self.sae.decode(acts, x).float()
            if self.sae.spec.centers_input:
                # It reads and reconstructs rows without their mean over d_model, which stays.
                centre = target.mean(dim=1, keepdim=True)
                target, reconstruction, mean = target - centre, written + centre, mean - mean.mean()
            units = self._units(target)
            of_rows = row_values(target * units, written * units, acts, mean * units)
            values = {name: _on_grid(keep, value) for name, value in of_rows.items()}
            following = inputs["input_ids"][:, 1:, None]
            values["ce_plain"] = _nats(plain, following)
            for name, new in (
                ("spliced", reconstruction),
                ("ablated", self.mean.float().expand(len(x), -1)),
                ("zero", torch.zeros_like(reconstruction)),
            ):
                edited = self._replaced(inputs, keep, new)
                values[f"ce_{name}"] = _nats(edited, following)
                if name == "spliced":
                    values["kl"] = (plain.exp() * (plain - edited)).sum(dim=2)
        on_cpu = {name: value.cpu() for name, value in values.items()}
        return Spliced(scored.cpu(), on_cpu, x[scored[keep]])

    def _units(self, target: Float[Tensor, "kept d_out"]) -> Float[Tensor, " d_out"]:
        """What each column is multiplied by, so that of several places none outweighs the rest."""
        each = target.shape[1] // len(self.places.scales)
        return torch.tensor(self.places.scales, device=target.device).repeat_interleave(each)

    def _replaced(
        self,
        inputs: dict[str, Tensor],
        keep: Bool[Tensor, "rows context"],
        new: Float[Tensor, "kept d_out"],
    ) -> Float[Tensor, "rows context vocabulary"]:
        """Log-probabilities with rows at the kept positions of all places written replaced."""
        parts = new.chunk(len(self.places.writes), dim=1)
        with contextlib.ExitStack() as stack:
            for point, part in zip(self.places.writes, parts, strict=True):
                stack.enter_context(hooked(point, partial(_with_rows, keep=keep, rows=part)))
            return _log_probs(self.lm, inputs)


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


def _with_rows(
    h: Float[Tensor, "rows context d_model"],
    keep: Bool[Tensor, "rows context"],
    rows: Float[Tensor, "kept d_model"],
) -> Float[Tensor, "rows context d_model"]:
    new = h.clone()
    new[keep] = rows.to(h.dtype)
    return new
