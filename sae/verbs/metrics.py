"""How well an SAE reconstructs activations of held-out text, and what that does to the model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.config import MetricsConfig, Progress, no_progress
from saesteer.sae.model.forward_pass import model_inputs
from saesteer.sae.model.hooks import HookPoint, hooked, sae_hook_point
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.text.contexts import ContextBatch, open_contexts


def metrics(
    sae: str | SAE,
    model: str | LanguageModel,
    config: MetricsConfig | None = None,
    *,
    layer: int | None = None,
    site: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure an SAE on text, which should be text that it was not trained on.

    - `fvu`: sum ||x - x^||^2 / sum ||x - mean(x)||^2 over the rows measured. For an SAE of centered
      activations (see `SAESpec.centers_input`) x is without its mean over d_model in both sums.
    - `l0`: mean number of active latents per row; `dead_fraction`: share of latents that never
      fire on the rows measured (`tokens` says how many those are).
    - `ce_plain`, `ce_spliced`, `ce_ablated`: cross-entropy in nats per token of the model as it
      is, with the reconstruction in place of the activation, and with the mean activation there;
      `ce_recovered` = (ce_ablated - ce_spliced) / (ce_ablated - ce_plain).
    - `kl`: KL(plain || spliced) in nats per token.

    Text is read as `config.text` says, including isolation and template: give the settings that the
    SAE was trained with. In the spliced and ablated runs only rows that training would keep (see
    `SinkFilter`) are replaced. Figures are over those of these rows that have a next token to
    predict.

    Figures of the form {"value", "low", "high"} carry a 95 % bootstrap interval over documents
    (over contexts, where there are fewer than ten documents). `prepend_bos` and `trained_with_bos`
    say whether contexts began with BOS here and in training (None: not known). `seen_in_training`
    says whether the SAE was trained on one of these texts, as far as its file tells (else it is
    None).

    Raises:
        UserError: the SAE does not fit the model, or the text is too short.
    """
    config = config or MetricsConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    sae = (sae if isinstance(sae, SAE) else load_sae(sae)).to(lm.device)
    point = sae_hook_point(sae, lm, layer=layer, site=site, force=force)
    text = replace(config.text, compile=False)
    stream = ActivationStream(lm, [point], open_contexts(lm, text), text)
    batches: list[ContextBatch] = []
    kept: list[Bool[Tensor, "rows context"]] = []
    total = torch.zeros(lm.d_model, dtype=torch.float64)
    count = 0
    progress("metrics: mean", 0, config.tokens, "tokens")
    # First pass: which rows training would keep, and their mean.
    while count < config.tokens:
        read = stream.next_batch()
        if read is None:
            break
        rows = read.activations[point.key]
        total += rows.double().sum(dim=0)
        count += len(rows)
        batches.append(read.source)
        kept.append(read.keep)
        progress("metrics: mean", min(count, config.tokens), config.tokens, "tokens")
    if count < 2:
        raise UserError(f"`data` {','.join(text.data)} keeps fewer than 2 tokens to measure")
    mean = (total / count).to(lm.device)
    tally = _Tally()
    fired = torch.zeros(sae.spec.d_sae, dtype=torch.bool, device=lm.device)
    measured = 0
    progress("metrics: splice", 0, count, "tokens")
    for batch, keep in _pieces(batches, kept, max(_vocabulary(lm), sae.spec.d_sae)):
        inputs = model_inputs(lm, batch, text.isolate_documents)
        measured += _measure(lm, sae, point, batch, inputs, keep.to(lm.device), mean, tally, fired)
        progress("metrics: splice", measured, count, "tokens")
    progress("metrics: splice", count, count, "tokens")
    return {
        "sae": {"source": sae.source, "sha256": sae.sha256, "d_sae": sae.spec.d_sae},
        "model": model_facts(lm),
        "layer": point.layer,
        "site": point.site,
        "tokens": measured,
        "documents": tally.documents,
        "excluded": stream.excluded,
        "prepend_bos": stream.prepend_bos,
        "trained_with_bos": _trained_with_bos(sae),
        "seen_in_training": _seen_in_training(sae, stream.identity()),
        "dead_fraction": 1 - float(fired.float().mean()),
        **tally.summary(config.bootstrap, text.seed),
    }


def _trained_with_bos(sae: SAE) -> bool | None:
    """Whether contexts began with BOS in its training; None where its file does not say."""
    said = sae.spec.metadata.get("prepend_bos")
    return said if isinstance(said, bool) else None


# Fewer documents than this say little about their spread: contexts are resampled instead.
_FEW_DOCUMENTS = 10


class _Tally:
    """Sums of each figure by document and context; ratios and intervals are made from them."""

    names = ("error", "variance", "rows", "active", "ce_plain", "ce_spliced", "ce_ablated", "kl")

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._contexts = 0

    @property
    def documents(self) -> int:
        """How many documents have a row."""
        return len({document for document, _ in self._sums})

    def add(
        self,
        owners: Int[Tensor, "rows context"],
        scored: Bool[Tensor, "rows context"],
        values: dict[str, Float[Tensor, "rows context"]],
    ) -> None:
        """Add the values at the scored positions of some contexts to the documents they are of."""
        numbers = self._contexts + torch.arange(len(owners))[:, None].expand_as(owners)
        self._contexts += len(owners)
        keys, inverse = torch.stack([owners[scored], numbers[scored]], dim=1).unique(
            dim=0, return_inverse=True
        )
        table = torch.stack([values[name][scored].double() for name in self.names], dim=1)
        sums = torch.zeros(len(keys), len(self.names), dtype=torch.float64)
        sums.index_add_(0, inverse, table)
        for (document, number), row in zip(keys.tolist(), sums.numpy(), strict=True):
            self._sums[document, number] = row

    def _table(self) -> NDArray[np.float64]:
        """The sums of each unit that is resampled (document or context), `[units, figures]`."""
        if self.documents < _FEW_DOCUMENTS:
            return np.stack(list(self._sums.values()))
        units: dict[int, NDArray[np.float64]] = {}
        for (document, _), row in self._sums.items():
            units[document] = units.get(document, np.zeros(len(self.names))) + row
        return np.stack(list(units.values()))

    def summary(self, resamples: int, seed: int) -> dict[str, Any]:
        """Every figure with its interval."""
        table = self._table()
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


def _seen_in_training(sae: SAE, text: list[dict[str, Any]]) -> bool | None:
    """Whether the SAE was trained on one of these texts; None where its file does not say."""
    trained_on = (sae.spec.metadata.get("saesteer") or {}).get("text")
    if not isinstance(trained_on, list):
        return None
    return not set(_texts(trained_on)).isdisjoint(_texts(text))


def _texts(identities: list[dict[str, Any]]) -> Iterator[str]:
    """Hashes of the texts that a corpus' `identity` names, or its name where it has none."""
    for identity in identities:
        if "parts" in identity:
            yield from _texts(identity["parts"])
        else:
            hashes = identity.get("sha256") or identity.get("name")
            yield from hashes if isinstance(hashes, list) else [str(hashes)]


# Most log-probabilities held at once for each of the three runs.
_LOG_PROBS = 2**25


def _vocabulary(lm: LanguageModel) -> int:
    weight = lm.unembed.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _pieces(
    batches: list[ContextBatch], kept: list[Bool[Tensor, "_ context"]], width: int
) -> Iterator[tuple[ContextBatch, Bool[Tensor, "_ context"]]]:
    """The batches again, cut into pieces for which `width` numbers per token fit in memory."""
    for batch, keep in zip(batches, kept, strict=True):
        rows = max(1, _LOG_PROBS // (batch.token_ids.shape[1] * width))
        for first in range(0, len(keep), rows):
            part = slice(first, first + rows)
            yield batch[part], keep[part]


def _measure(
    lm: LanguageModel,
    sae: SAE,
    point: HookPoint,
    batch: ContextBatch,
    inputs: dict[str, Tensor],
    keep: Bool[Tensor, "rows context"],
    mean: Float[Tensor, " d_model"],
    tally: _Tally,
    fired: Bool[Tensor, " d_sae"],
) -> int:
    """Run one batch plain, spliced and mean-ablated; returns how many rows were measured.

    Every kept row is replaced; the figures are over those that have a next token to predict.
    """
    ids = inputs["input_ids"]
    scored = keep.clone()
    scored[:, -1] = False
    values: dict[str, Tensor] = {}

    def splice(h: Float[Tensor, "rows context d_model"]) -> Float[Tensor, "rows context d_model"]:
        x = h[keep].float()
        latents = sae.encode(x)
        reconstruction = sae.decode(latents, x).float()
        deviation = x - mean.float()
        if sae.spec.centers_input:
            # It reads and reconstructs rows without their mean over d_model: add the mean back.
            reconstruction = reconstruction + x.mean(dim=1, keepdim=True)
            deviation = deviation - deviation.mean(dim=1, keepdim=True)
        fired.logical_or_((latents != 0).any(dim=0))
        values["error"] = _on_grid(keep, (x - reconstruction).square().sum(dim=1))
        values["variance"] = _on_grid(keep, deviation.square().sum(dim=1))
        values["active"] = _on_grid(keep, (latents != 0).sum(dim=1).float())
        return _replaced(h, keep, reconstruction)

    def ablate(h: Float[Tensor, "rows context d_model"]) -> Float[Tensor, "rows context d_model"]:
        return _replaced(h, keep, mean.float().expand(int(keep.sum()), -1))

    with torch.inference_mode():
        plain = _log_probs(lm, inputs)
        with hooked(point, splice):
            spliced = _log_probs(lm, inputs)
        with hooked(point, ablate):
            ablated = _log_probs(lm, inputs)
        following = ids[:, 1:, None]
        for name, log_probs in (("plain", plain), ("spliced", spliced), ("ablated", ablated)):
            nats = -log_probs[:, :-1].gather(2, following).squeeze(2)
            values[f"ce_{name}"] = torch.nn.functional.pad(nats, (0, 1))
        values["kl"] = (plain.exp() * (plain - spliced)).sum(dim=2)
    values["rows"] = scored.float()
    on_cpu = {name: value.cpu() for name, value in values.items()}
    tally.add(batch.document_ids, scored.cpu(), on_cpu)
    return int(scored.sum())


def _log_probs(
    lm: LanguageModel, inputs: dict[str, Tensor]
) -> Float[Tensor, "rows context vocabulary"]:
    logits = lm.model(**inputs, use_cache=False).logits
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
