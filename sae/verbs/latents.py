"""What the latents of an SAE are: contexts, statistics, neighbours, descriptions; in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.hooks import HookPoint
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.model.sae_places import sae_places, steered
from saesteer.sae.reading.card import TaskMark
from saesteer.sae.reading.collect import Collector, collect
from saesteer.sae.reading.config import LatentsConfig
from saesteer.sae.reading.describe import Describer
from saesteer.sae.reading.effect import steering_effects
from saesteer.sae.reading.lens import lens
from saesteer.sae.reading.neighbours import nearest_by_cofiring, nearest_by_decoder
from saesteer.sae.reading.pieces import Pieces
from saesteer.sae.reading.result import Found, Latents
from saesteer.sae.reading.telling import telling_tokens
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.text.contexts import open_contexts


def latents(
    sae: str | SAE,
    model: str | LanguageModel,
    config: LatentsConfig = LatentsConfig(),  # noqa: B008 (frozen: one may serve all)
    *,
    describer: Describer | None = None,
    tasks: Mapping[int, Sequence[TaskMark]] | None = None,
    layer: int | None = None,
    site: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
) -> Latents:
    """Read text once and keep what tells what each latent is; `latents(...)[4]` is a card.

    Of each latent: its strongest contexts, contexts drawn at random in parts from weak to strong, a
    histogram of its activations, density, mean when active; the tokens that its decoder row raises
    and lowers (logit lens); the nearest latents, by decoder row and by where they fire; a
    description made of its most telling tokens, and how well that tells held-out text in which it
    fires from other text; for the first `config.steer` of them what a neutral prompt becomes with
    its direction added. Sinks, special tokens and what `config.text` leaves out are not counted.

    Memory besides the model: about 8 kB a latent whose contexts are kept, 4 bytes a token read,
    64 MB for the rows from which co-firing is counted (of more text every second, fourth, ... row
    is counted), and a few hundred MB of working space.

    Args:
        sae: a folder or `RELEASE:ID`, or a loaded `SAE`.
        model: a name, folder or `.gguf` file, or a loaded `LanguageModel`.
        describer: asks a chat model for descriptions; None asks nobody.
        tasks: the rankings that hold a latent, by its number.
        layer, site: what the SAE reads, where it does not say; of a crosscoder the place whose
            decoder is shown.
        force: accept an SAE that was trained on other weights.

    Raises:
        UserError: SAE and model do not fit, or the text is too short.
        UsageError: a latent that the SAE does not have.
    """
    lm = as_language_model(model, device=device, dtype=dtype)
    sae = (sae if isinstance(sae, SAE) else load_sae(sae)).to(lm.device)
    check_ids(config.ids, sae.spec.d_sae)
    places = sae_places(sae, lm, layer=layer, site=site, force=force)
    point, view = steered(sae, lm, layer=layer, site=site, force=force)
    if describer is not None:
        describer.check()  # before the model runs
    text = replace(config.text, compile=False)
    stream = ActivationStream(lm, places.points, open_contexts(lm, text), text)
    collected = collect(stream, sae, places, config, config.ids or None, progress)
    ids = _chosen(collected, view, config)
    if not ids:
        raise UserError(
            f"`sae` {sae.source}: no latent fires on these {collected.tally.rows} tokens: read "
            "more `tokens`, or other `data`"
        )
    found = _found(lm, view, collected, ids, config, progress)
    effects = {}
    if config.steer:
        some = ids[: config.steer]
        directions = found.directions[: config.steer]
        given = steering_effects(lm, point, directions, config, progress)
        effects = dict(zip(some, given, strict=True))
    result = Latents(
        ids=ids,
        facts=_facts(sae, lm, point, stream, collected),
        config=config,
        collected=collected,
        found=found,
        pieces=Pieces(lm.tokenizer),
        steered=effects,
        tasks=tasks or {},
    )
    return result if describer is None else _described(result, describer, progress)


def check_ids(ids: Sequence[int], d_sae: int) -> None:
    """Raise UsageError for a latent that the SAE does not have."""
    for latent in ids:
        if not 0 <= latent < d_sae:
            raise UsageError(
                f"`ids` {latent} is out of range: the SAE has {d_sae} latents, 0..{d_sae - 1}"
            )


def _chosen(collected: Collector, view: SAE, config: LatentsConfig) -> list[int]:
    """The latents that get a page."""
    if config.ids:
        return list(config.ids)
    if config.every:
        return collected.ids.tolist()
    written = collected.tally.size.cpu() * view.W_dec.float().norm(dim=1).double().cpu()
    order = written.argsort(descending=True, stable=True)[: config.top]
    alive = collected.tally.fired.cpu()[order] > 0
    return [int(latent) for latent in order[alive]]


def _found(
    lm: LanguageModel,
    view: SAE,
    collected: Collector,
    ids: list[int],
    config: LatentsConfig,
    progress: Progress,
) -> Found:
    steps = 4
    progress("latents: compare", 0, steps, "steps")
    own = torch.tensor(ids, dtype=torch.int64)
    directions = view.W_dec[own.to(view.W_dec.device)].float()
    ends = lens(lm, directions, config.lens)
    progress("latents: compare", 1, steps, "steps, lens")
    near = nearest_by_decoder(view.W_dec, own, config.neighbours)
    progress("latents: compare", 2, steps, "steps, decoder")
    fires, held_out = collected.rows.matrix(), collected.rows.held_out()
    cofires = nearest_by_cofiring(fires, own, config.neighbours)
    progress("latents: compare", 3, steps, "steps, co-firing")
    tokens = collected.rows.tokens()
    telling = telling_tokens(fires[~held_out], tokens[~held_out], ids, config.telling)
    progress("latents: compare", 4, steps, "steps")
    return Found(ends, near, cofires, telling, directions.cpu())


def _described(found: Latents, describer: Describer, progress: Progress) -> Latents:
    described = {}
    progress("latents: describe", 0, len(found.ids), "latents")
    for count, latent in enumerate(found.ids, 1):
        contexts = found.shown_to_describer(latent)
        if contexts:
            described[latent] = describer.describe(contexts, found.windows(latent))
        progress("latents: describe", count, len(found.ids), "latents")
    return replace(found, described=described)


def _facts(
    sae: SAE, lm: LanguageModel, point: HookPoint, stream: ActivationStream, collected: Collector
) -> dict[str, Any]:
    spec, tally = sae.spec, collected.tally
    return {
        "sae": {
            "source": sae.source,
            "sha256": sae.sha256,
            "architecture": spec.architecture,
            "d_sae": spec.d_sae,
        },
        "model": model_facts(lm),
        "layer": point.layer,
        "site": point.site,
        "hook_name": point.name,
        "tokens": tally.rows,
        "contexts": len(collected.contexts()[0]),
        "context": stream.config.context,
        "excluded": dict(stream.excluded),
        "dead": int((tally.fired == 0).sum()),
        "l0": float(tally.fired.sum()) / max(1, tally.rows),
        "cofiring_rows": collected.rows.rows,
        "data": stream.identity(),
        "bytes": collected.bytes(),
    }
