"""What an SAE finds of the features that synthetic activations are made of.

The definitions are those of SynthSAEBench (arXiv 2602.14687), as SAELens computes them: directions
are compared by |cosine|, and a latent is judged as a detector of the feature that is nearest to it.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.measuring.matching import match, unit_rows
from saesteer.sae.synthetic.features import SCORING, SyntheticFeatures

# Latents and features held at once, as numbers.
_NUMBERS = 2**24


class DetectorTally:
    """Counts of right and wrong firings of each latent, as a detector of its nearest feature."""

    def __init__(self, nearest: Tensor) -> None:
        self.nearest = nearest
        zeros = torch.zeros(len(nearest), dtype=torch.int64)
        self.both, self.latent, self.feature = zeros, zeros.clone(), zeros.clone()

    def add(self, latents: Float[Tensor, "rows d_sae"], acts: Float[Tensor, "rows n"]) -> None:
        """Count a batch."""
        fires, present = latents != 0, acts[:, self.nearest] > 0
        self.both = self.both + (fires & present).sum(dim=0)
        self.latent = self.latent + fires.sum(dim=0)
        self.feature = self.feature + present.sum(dim=0)

    def scores(self) -> dict[str, float]:
        """Means over all latents; what is undefined, as of a latent that never fires, counts 0."""
        precision = self.both / self.latent.clamp(min=1)
        recall = self.both / self.feature.clamp(min=1)
        f1 = 2 * self.both / (self.latent + self.feature).clamp(min=1)
        return {
            "f1": float(f1.double().mean()),
            "precision": float(precision.double().mean()),
            "recall": float(recall.double().mean()),
        }


@torch.no_grad()
def score_truth(
    sae: str | Path | SAE,
    truth: str | Path | SyntheticFeatures,
    *,
    samples: int = 50_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare an SAE with the features behind the activations that it was trained on.

      On `samples` fresh rows, none of which `synthesise` writes:

      - `f1`, `precision`, `recall`: of each latent as a detector of the feature whose direction has
        the largest |cosine| with its decoder row; means over latents;
    XX
      - `uniqueness`: how many features are nearest to some latent, over the number of latents;
      - `explained_variance`: 1 - FVU; `l0` and `true_l0`, active latents and features per row;
        `relative_norm`, mean of ||x^|| / ||x||; `dead_latents`, which fired on none of the rows.

      Args:
          sae: an SAE or where it lies.
          truth: a folder made by `synthesise`, or the features.
          seed: of the rows.

      Raises:
          UserError: no truth there, or an SAE of another width.
    """
    if samples < 2:
        raise UsageError(f"`samples` must be at least 2, got {samples}")
    features = truth if isinstance(truth, SyntheticFeatures) else SyntheticFeatures.load(truth)
    sae = sae if isinstance(sae, SAE) else load_sae(sae)
    if sae.W_dec.shape[1] != features.config.d_model or sae.spec.d_model != features.config.d_model:
        raise UserError(
            f"`sae` {sae.source or '(in memory)'} has d_model {sae.spec.d_model}, `truth` has "
            f"{features.config.d_model}: give an SAE that was trained on these activations"
        )
    similarity = (unit_rows(sae.W_dec) @ unit_rows(features.directions).T).abs()
    nearest = similarity.argmax(dim=1)
    detectors = DetectorTally(nearest)
    error = square = active = true_active = norms = 0.0
    total = torch.zeros(features.config.d_model, dtype=torch.float64)
    most = max(1, min(features.rows_at_once, _NUMBERS // sae.spec.d_sae))
    for number, first in enumerate(range(0, samples, most)):
        rows = features.sample(min(most, samples - first), SCORING + seed, number)
        x = rows.x
        latents = sae.encode(x)
        reconstruction = sae.decode(latents, x)
        detectors.add(latents, rows.acts)
        error += float((x - reconstruction).double().square().sum())
        square += float(x.double().square().sum())
        total += x.double().sum(dim=0)
        active += float((latents != 0).sum())
        true_active += float((rows.acts > 0).sum())
        norms += float((reconstruction.norm(dim=1) / x.norm(dim=1).clamp(min=1e-30)).sum())
    variance = square - float(total.square().sum()) / samples
    return {
        **detectors.scores(),
        "mcc": float(match(similarity).similarity.mean()),
        "uniqueness": len(nearest.unique()) / len(nearest),
        "explained_variance": 1 - error / max(variance, 1e-30),
        "l0": active / samples,
        "true_l0": true_active / samples,
        "relative_norm": norms / samples,
        "dead_latents": int((detectors.latent == 0).sum()),
        "samples": samples,
    }
