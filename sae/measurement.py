"""How good an SAE is on held-out text: what it reconstructs, and what that does to the model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.config import MetricsConfig, Progress, no_progress
from saesteer.sae.harvester import SinkFilter, model_facts
from saesteer.sae.hooks import HookPoint, hooked, run_to, sae_hook_point
from saesteer.sae.models import LanguageModel, as_language_model
from saesteer.sae.text import ContextBatch, open_contexts


def metrics(
    sae: str | SAE,
    model: str | LanguageModel,
    config: MetricsConfig = MetricsConfig(),
    *,
    layer: int | None = None,
    site: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure an SAE on text it was not trained on.

    - `fvu`: sum ||x - x^||^2 / sum ||x - mean(x)||^2 over kept rows.
    - `l0`: mean number of active latents per row; `dead_fraction`: share of latents that never
      fire on the rows measured (`tokens` says how many those are).
    - `ce_plain`, `ce_spliced`, `ce_ablated`: cross-entropy in nats per token of the model as it
      is, with the reconstruction in place of the activation, and with the mean activation there;
      `ce_recovered` = (ce_ablated - ce_spliced) / (ce_ablated - ce_plain).
    - `kl`: KL(plain || spliced) in nats per token.

    Attention sinks and special tokens are left out of every figure and stay as they are in the
    spliced runs. Figures of the form {"value", "low", "high"} carry a 95 % bootstrap interval over
    documents (contexts, where a document fills several).

    Raises:
        UserError: the SAE does not fit the model, or the text is too short.
    """
    lm = as_language_model(model, device=device, dtype=dtype)
    sae = sae if isinstance(sae, SAE) else load_sae(sae, device=lm.device)
    point = sae_hook_point(sae, lm, layer=layer, site=site, force=force)
    contexts = open_contexts(lm, config.text)
    batches: list[ContextBatch] = []
    kept: list[Bool[Tensor, "rows context"]] = []
    sinks = SinkFilter(config.text.max_norm_ratio)
    total = Moments(lm.d_model)
    excluded = {"special": 0, "sinks": 0}
    progress("metrics: mean", 0, config.tokens, "tokens")
    # First pass: which rows count, their mean, and how often each latent fires.
    while total.count < config.tokens:
        batch = contexts.next_batch(config.text.batch_size)
        if batch is None:
            break
        rows, keep = _read(lm, point, batch, sinks, excluded)
        total.add(rows)
        batches.append(batch)
        kept.append(keep)
        progress("metrics: mean", min(total.count, config.tokens), config.tokens, "tokens")
    if total.count < 2:
        raise UserError(f"--data {','.join(config.text.data)} keeps fewer than 2 tokens to measure")
    mean = (total.sum / total.count).to(lm.device)
    tally = _Tally()
    fired = torch.zeros(sae.spec.d_sae, dtype=torch.bool, device=lm.device)
    done = 0
    progress("metrics: splice", 0, total.count, "tokens")
    for batch, keep in _pieces(batches, kept, lm):
        done += _measure(lm, sae, point, batch, keep.to(lm.device), mean, tally, fired)
        progress("metrics: splice", done, total.count, "tokens")
    progress("metrics: splice", total.count, total.count, "tokens")
    return {
        "sae": {"source": sae.source, "sha256": sae.sha256, "d_sae": sae.spec.d_sae},
        "model": model_facts(lm),
        "layer": point.layer,
        "site": point.site,
        "tokens": done,
        "documents": len(tally.documents),
        "excluded": excluded,
        "dead_fraction": 1 - float(fired.float().mean()),
        **tally.summary(config.bootstrap, config.text.seed),
    }


@dataclass
class Moments:
    """Count and sum of rows, in float64."""

    d_model: int
    count: int = 0
    sum: Float[Tensor, " d_model"] = field(init=False)

    def __post_init__(self) -> None:
        self.sum = torch.zeros(self.d_model, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "rows d_model"]) -> None:
        self.count += len(rows)
        self.sum += rows.double().sum(dim=0).cpu()


def _read(
    lm: LanguageModel,
    point: HookPoint,
    batch: ContextBatch,
    sinks: SinkFilter,
    excluded: dict[str, int],
) -> tuple[Float[Tensor, "kept d_model"], Bool[Tensor, "rows context"]]:
    """The kept rows of a batch and where they stand."""
    with torch.inference_mode():
        h = run_to(lm, [point], input_ids=batch.token_ids.to(lm.device))[point.key]
        text = batch.keep.to(lm.device)
        near = sinks.keep({point.key: h[text]})
        keep = text.clone()
        keep[text] = near
        excluded["special"] += int((~text).sum())
        excluded["sinks"] += int((~near).sum())
        return h[keep], keep.cpu()


class _Tally:
    """Sums of each figure by document, from which ratios and their intervals are made."""

    names = ("error", "variance", "rows", "active", "ce_plain", "ce_spliced", "ce_ablated", "kl")

    def __init__(self) -> None:
        self.documents: dict[int, dict[str, float]] = {}

    def add(self, owners: Int[Tensor, " rows"], values: dict[str, Tensor]) -> None:
        """Add per-row values to the documents that own the rows."""
        for document in owners.unique().tolist():
            mine = owners == document
            sums = self.documents.setdefault(document, dict.fromkeys(self.names, 0.0))
            for name, value in values.items():
                sums[name] += float(value[mine].double().sum())

    def summary(self, resamples: int, seed: int) -> dict[str, Any]:
        """Every figure with its interval."""
        table = np.array([[d[name] for name in self.names] for d in self.documents.values()])
        draws = np.random.default_rng(seed).integers(len(table), size=(resamples, len(table)))
        resampled = np.stack([table[draw].sum(axis=0) for draw in draws])
        figures = self._figures(table.sum(axis=0)[None])
        spread = self._figures(resampled)
        return {
            name: {
                "value": float(value[0]),
                "low": float(np.percentile(spread[name], 2.5)),
                "high": float(np.percentile(spread[name], 97.5)),
            }
            for name, value in figures.items()
        }

    def _figures(self, sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        column = dict(zip(self.names, sums.T, strict=True))
        rows = np.maximum(column["rows"], 1)
        plain, spliced, ablated = (column[f"ce_{kind}"] for kind in ("plain", "spliced", "ablated"))
        gap = ablated - plain
        return {
            "fvu": column["error"] / np.maximum(column["variance"], 1e-30),
            "l0": column["active"] / rows,
            "ce_plain": plain / rows,
            "ce_spliced": spliced / rows,
            "ce_ablated": ablated / rows,
            "ce_recovered": (ablated - spliced) / np.where(gap == 0, np.nan, gap),
            "kl": column["kl"] / rows,
        }


# Three runs' log-probabilities over the vocabulary are held at once; this many of each.
_LOG_PROBS = 2**25


def _pieces(
    batches: list[ContextBatch], kept: list[Bool[Tensor, "rows context"]], lm: LanguageModel
) -> Iterator[tuple[ContextBatch, Bool[Tensor, "rows context"]]]:
    """The batches again, cut so small that log-probabilities of a piece fit in memory."""
    vocabulary = lm.unembed.weight.shape[0]
    for batch, keep in zip(batches, kept, strict=True):
        rows = max(1, _LOG_PROBS // (batch.token_ids.shape[1] * vocabulary))
        for first in range(0, len(keep), rows):
            part = slice(first, first + rows)
            piece = ContextBatch(
                batch.token_ids[part], batch.keep[part], batch.document_ids[part]
            )
            yield piece, keep[part]


def _measure(
    lm: LanguageModel,
    sae: SAE,
    point: HookPoint,
    batch: ContextBatch,
    keep: Bool[Tensor, "rows context"],
    mean: Float[Tensor, " d_model"],
    tally: _Tally,
    fired: Bool[Tensor, " d_sae"],
) -> int:
    """Run one batch plain, spliced and mean-ablated; returns how many rows were measured.

    Every kept row is replaced; the figures are over those that have a next token to predict.
    """
    ids = batch.token_ids.to(lm.device)
    scored = keep.clone()
    scored[:, -1] = False
    values: dict[str, Tensor] = {}

    def splice(h: Float[Tensor, "rows context d_model"]) -> Float[Tensor, "rows context d_model"]:
        x = h[keep].float()
        latents = sae.encode(x)
        reconstruction = sae.decode(latents).float()
        fired.logical_or_((latents > 0).any(dim=0))
        values["error"] = _on_grid(keep, (x - reconstruction).square().sum(dim=1))
        values["variance"] = _on_grid(keep, (x - mean.float()).square().sum(dim=1))
        values["active"] = _on_grid(keep, (latents > 0).sum(dim=1).float())
        return _replaced(h, keep, reconstruction)

    def ablate(h: Float[Tensor, "rows context d_model"]) -> Float[Tensor, "rows context d_model"]:
        return _replaced(h, keep, mean.float().expand(int(keep.sum()), -1))

    with torch.inference_mode():
        plain = _log_probs(lm, ids)
        with hooked(point, splice):
            spliced = _log_probs(lm, ids)
        with hooked(point, ablate):
            ablated = _log_probs(lm, ids)
        following = ids[:, 1:, None]
        for name, log_probs in (("plain", plain), ("spliced", spliced), ("ablated", ablated)):
            nats = -log_probs[:, :-1].gather(2, following).squeeze(2)
            values[f"ce_{name}"] = torch.nn.functional.pad(nats, (0, 1))
        values["kl"] = (plain.exp() * (plain - spliced)).sum(dim=2)
    values["rows"] = scored.float()
    owners = batch.document_ids.to(lm.device)[scored]
    tally.add(owners.cpu(), {name: value[scored].cpu() for name, value in values.items()})
    return int(scored.sum())


def _log_probs(
    lm: LanguageModel, ids: Int[Tensor, "rows context"]
) -> Float[Tensor, "rows context vocabulary"]:
    logits = lm.model(input_ids=ids, use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1)


def _on_grid(
    keep: Bool[Tensor, "rows context"], values: Float[Tensor, " kept"]
) -> Float[Tensor, "rows context"]:
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
