"""How well an SAE reconstructs activations of held-out text, and what that does to the model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.config import MetricsConfig, Progress
from saesteer.sae.measuring.decoder_projection import decoder_projection, rows_wanted
from saesteer.sae.measuring.figures import OF_ROWS, OF_RUNS, Sums, figures_of_rows, figures_of_runs
from saesteer.sae.measuring.latents import LatentTally
from saesteer.sae.measuring.matching import stability
from saesteer.sae.measuring.result import Metrics
from saesteer.sae.measuring.splicing import Splicer, pieces
from saesteer.sae.measuring.tally import Tally
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.model.sae_places import SAEPlaces, is_plain, sae_places
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.text.contexts import ContextBatch, open_contexts


def metrics(
    sae: str | SAE,
    model: str | LanguageModel,
    config: MetricsConfig | None = None,
    *,
    against: str | SAE | None = None,
    layer: int | None = None,
    site: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = show_progress,
) -> Metrics:
    """Measure an SAE on text, which should be text that it was not trained on.

    Figures of the form {"value", "low", "high"} carry a 95 % bootstrap interval over documents
    (over contexts, where there are fewer than ten documents). Of the rows:

    - `fvu`: sum ||x - x^||^2 / sum ||x - mean(x)||^2 over the rows measured. For an SAE of centered
      activations (see `SAESpec.centers_input`) x is without its mean over d_model throughout.
    - `l0`: mean number of active latents per row.
    - `cosine`, `relative_norm` ||x^|| / ||x||, `token_error` ||x - x^||^2 / ||x||^2: means over
      rows; `shrinkage`: what x^ has to be multiplied by to fit x best, sum <x, x^> / sum ||x^||^2.
    - `ev_legacy`, `ev_about_zero`: two explained variances that other tools print and that are not
      1 - `fvu`; see `docs/metrics.md`.

    For a transcoder x is what it writes. For a crosscoder x is all its places side by side, each in
    its own scale, and all are replaced at once; `writes` lists them.

    Of the model's predictions, in nats per token:

    - `ce_plain`, `ce_spliced`, `ce_ablated`, `ce_zero`: cross-entropy of the model as it is, with
      the reconstruction in place of the activation, with the mean activation, with zeros;
      `ce_recovered` = (ce_ablated - ce_spliced) / (ce_ablated - ce_plain), `ce_recovered_zero` the
      same against `ce_zero`, `ce_increase` = ce_spliced - ce_plain.
    - `kl`: KL(plain || spliced).

    Of the latents, on the same rows (`tokens` says how many those are): `dead_fraction` and
    `dead_latents`, which never fire; `dense_latents`; `density_histogram`; `l0_quantiles`; and
    `decoder_projection` (see there; None for transcoders and crosscoders). With
    `against`, an SAE of another seed, `stability` says how far both learnt the same directions.

    Text is read as `config.text` says, including isolation and template: give the settings that the
    SAE was trained with. Only rows that training would keep are replaced (see
    `SinkFilter`). Figures are over those of these rows that have a next token to
    predict.

    `prepend_bos` and `trained_with_bos` say whether contexts began with BOS here and in training
    (None: not known). `seen_in_training` says whether the SAE was trained on one of these texts, as
    far as its file tells (else it is None).

    The result is a mapping with `to_frame()` and `plot()`.

    Raises:
        UserError: the SAE does not fit the model or `against`, or the text is too short.
    """
    config = config or MetricsConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    sae = (sae if isinstance(sae, SAE) else load_sae(sae)).to(lm.device)
    places = sae_places(sae, lm, layer=layer, site=site, force=force)
    # Before the model runs: what cannot be compared is told at once.
    compared = _compared(sae, against)
    text = replace(config.text, compile=False)
    stream = ActivationStream(lm, places.points, open_contexts(lm, text), text)
    batches, kept, mean = _read(stream, lm, places, config, progress)
    count = sum(int(keep.sum()) for keep in kept)
    tally = Tally((*OF_ROWS, *OF_RUNS))
    latents = LatentTally(sae.spec.d_sae, lm.device)
    splicer = Splicer(lm, sae, places, mean, text.isolate_documents, latents)
    sample: list[Tensor] = []
    progress("metrics: splice", 0, count, "tokens")
    for batch, keep in pieces(batches, kept, max(_vocabulary(lm), sae.spec.d_sae)):
        spliced = splicer.run(batch, keep)
        tally.add(batch.document_ids, spliced.scored, spliced.values)
        if sum(map(len, sample)) < rows_wanted(sae.spec.d_sae):
            sample.append(spliced.inputs)
        progress("metrics: splice", latents.rows, count, "tokens")
    progress("metrics: splice", count, count, "tokens")
    plain = is_plain(sae)
    return Metrics(
        {
            "sae": {"source": sae.source, "sha256": sae.sha256, "d_sae": sae.spec.d_sae},
            "model": model_facts(lm),
            "layer": places.reads[0].layer,
            "site": places.reads[0].site,
            **({} if plain else {"writes": [list(point.key) for point in places.writes]}),
            "tokens": latents.rows,
            "documents": tally.documents,
            "excluded": stream.excluded,
            "prepend_bos": stream.prepend_bos,
            "trained_with_bos": _trained_with_bos(sae),
            "seen_in_training": _seen_in_training(sae, stream.identity()),
            **latents.summary(),
            "decoder_projection": decoder_projection(sae, torch.cat(sample)) if plain else None,
            "stability": compared,
            **tally.summary(_figures, config.bootstrap, text.seed),
        }
    )


def _figures(sums: Sums) -> Sums:
    return figures_of_rows(sums) | figures_of_runs(sums)


def _compared(sae: SAE, against: str | SAE | None) -> dict[str, Any] | None:
    if against is None:
        return None
    other = against if isinstance(against, SAE) else load_sae(against, setting="against")
    return stability(sae, other)


def _read(
    stream: ActivationStream,
    lm: LanguageModel,
    places: SAEPlaces,
    config: MetricsConfig,
    progress: Progress,
) -> tuple[list[ContextBatch], list[Bool[Tensor, "_ context"]], Float[Tensor, " d_out"]]:
    """The text, which of its rows training would keep, and the mean of what is written there.

    Raises UserError when hardly any is kept.
    """
    batches: list[ContextBatch] = []
    kept: list[Bool[Tensor, "rows context"]] = []
    total = torch.zeros(lm.d_model * len(places.writes), dtype=torch.float64)
    count = 0
    progress("metrics: mean", 0, config.tokens, "tokens")
    while count < config.tokens:
        read = stream.next_batch()
        if read is None:
            break
        rows = places.target(read.activations)
        total += rows.double().sum(dim=0)
        count += len(rows)
        batches.append(read.source)
        kept.append(read.keep)
        progress("metrics: mean", min(count, config.tokens), config.tokens, "tokens")
    if count < 2:
        data = ",".join(config.text.data)
        raise UserError(f"`data` {data} keeps fewer than 2 tokens to measure")
    return batches, kept, (total / count).to(lm.device)


def _trained_with_bos(sae: SAE) -> bool | None:
    """Whether contexts began with BOS in its training; None where its file does not say."""
    said = sae.spec.metadata.get("prepend_bos")
    return said if isinstance(said, bool) else None


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


def _vocabulary(lm: LanguageModel) -> int:
    weight = lm.unembed.weight
    assert isinstance(weight, Tensor)
    return len(weight)
