"""Where an SAE reads and writes in a model: one place, or several.

An SAE reads and writes one place. A transcoder reads one and writes another, a crosscoder several
at once; their files say which (`metadata`: `hook_name_out`, and our own `crosscoder`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.sae_file import SAE
from saesteer.checkpoints.sae_spec import parse_hook_name
from saesteer.sae.model.hooks import HookPoint, layer_index, resolve_site, sae_hook_point
from saesteer.sae.model.language_model import LanguageModel


@dataclass(frozen=True)
class SAEPlaces:
    """The hook points of an SAE in a model."""

    reads: tuple[HookPoint, ...]
    """Side by side, its input."""
    writes: tuple[HookPoint, ...]
    """Side by side, its output."""
    scales: tuple[float, ...]
    """Of each place written: what its activations are multiplied by where places are weighed
    against each other."""

    @property
    def points(self) -> list[HookPoint]:
        """All of them, each once."""
        return list({point.key: point for point in (*self.reads, *self.writes)}.values())

    def input(self, rows: Mapping[Place, Tensor]) -> Float[Tensor, "rows d_in"]:
        """The SAE's input from the rows of each place."""
        return _side_by_side([rows[point.key] for point in self.reads])

    def target(self, rows: Mapping[Place, Tensor]) -> Float[Tensor, "rows d_out"]:
        """What it should reconstruct."""
        return _side_by_side([rows[point.key] for point in self.writes])


def sae_places(
    sae: SAE,
    lm: LanguageModel,
    *,
    layer: int | None = None,
    site: str | None = None,
    force: bool = False,
) -> SAEPlaces:
    """All places of an SAE. `layer` and `site` are those of `sae_hook_point`; of transcoders and
    crosscoders, whose files say them, they must be one of the places written, if given.

    Raises what `sae_hook_point` raises, and UserError for a transcoder or crosscoder whose places
    this model does not have.
    """
    parts = crosscoder_parts(sae)
    if not sae.spec.is_transcoder and parts is None:
        point = sae_hook_point(sae, lm, layer=layer, site=site, force=force)
        return SAEPlaces((point,), (point,), (1.0,))
    name = sae.source or "(in memory)"
    models = _models(sae, parts)
    if len({str(model.get("hash") or model.get("name")) for model in models}) > 1:
        names = ", ".join(str(model.get("name")) for model in models)
        raise UserError(
            f"`sae` {name} is a crosscoder over models ({names}): no hook of one of them reads it. "
            "It steers each of them, and is read from Python (load_sae)"
        )
    _check_model(models[0], lm, name, force)
    if parts is not None:
        reads = writes = tuple(_hook(lm, name, part["hook_name"], part) for part in parts)
        scales = tuple(float(part.get("input_scale", 1.0)) for part in parts)
    else:
        reads = (_hook(lm, name, sae.spec.hook_name or sae.spec.hf_hook_name),)
        writes, scales = (_written_hook(sae, lm, name),), (1.0,)
    if sum(lm.d_model for _ in reads) != sae.spec.d_model:
        raise UserError(
            f"`sae` {name} reads a width of {sae.spec.d_model}, and {len(reads)} places of `model` "
            f"{lm.name} have {len(reads) * lm.d_model}: use the model it was trained on"
        )
    if layer is not None or site is not None:
        _one_of(writes, lm, name, layer, site)
    return SAEPlaces(reads, writes, scales)


def is_plain(sae: SAE) -> bool:
    """Whether an SAE reads and writes one place, the same."""
    return not sae.spec.is_transcoder and crosscoder_parts(sae) is None


def steered(
    sae: SAE,
    lm: LanguageModel,
    *,
    layer: int | None = None,
    site: str | None = None,
    force: bool = False,
) -> tuple[HookPoint, SAE]:
    """The place at which an SAE steers, and the SAE with the decoder of that place.

    A transcoder steers where it writes, a crosscoder at one of its places: the one that `layer` and
    `site` say. One over models steers each of them. Raises what `sae_places` raises, UsageError
    where a crosscoder is not told where.
    """
    parts = crosscoder_parts(sae)
    name = sae.source or "(in memory)"
    models = _models(sae, parts)
    if parts is None and sae.spec.is_transcoder:
        _check_model(models[0], lm, name, force)
        point = _written_hook(sae, lm, name)
        _one_of([point], lm, name, layer, site)
        return point, sae
    if parts is None:
        return sae_hook_point(sae, lm, layer=layer, site=site, force=force), sae
    own = [i for i, model in enumerate(models) if model.get("hash") == lm.fingerprint]
    if not own:
        _check_model(models[0], lm, name, force)
        own = [i for i, model in enumerate(models) if model == models[0]]
    points = [_hook(lm, name, parts[i]["hook_name"], parts[i]) for i in own]
    at = own[_one_of(points, lm, name, layer, site)]
    widths = [int(part["d_model"]) for part in parts]
    if sum(widths) != sae.spec.d_model or widths[at] != lm.d_model:
        raise UserError(
            f"`sae` {name} lists places of widths {widths}, and reads {sae.spec.d_model}; `model` "
            f"{lm.name} has {lm.d_model}: use the model it was trained on"
        )
    columns = slice(sum(widths[:at]), sum(widths[: at + 1]))
    facts = {**sae.spec.metadata["saesteer"], "model": models[at]}
    del facts["crosscoder"]
    metadata = {
        **sae.spec.metadata,
        "hook_name_out": parts[at]["hook_name"],
        "hf_hook_name_out": parts[at].get("hf_hook_name", ""),
        "saesteer": facts,
    }
    view = replace(
        sae,
        W_dec=sae.W_dec[:, columns].contiguous(),
        b_dec=sae.b_dec[columns].contiguous(),
        spec=replace(sae.spec, d_out=lm.d_model, metadata=metadata),
    )
    return points[own.index(at)], view


def _written_hook(sae: SAE, lm: LanguageModel, name: str) -> HookPoint:
    """What a transcoder writes."""
    metadata = sae.spec.metadata
    return _hook(lm, name, metadata.get("hook_name_out") or metadata.get("hf_hook_name_out"))


def _models(sae: SAE, parts: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """The model of each place of a crosscoder; one of another SAE."""
    own = sae.spec.metadata.get("saesteer")
    usual = own.get("model") if isinstance(own, dict) else None
    found = [part.get("model") or usual for part in parts or [{}]]
    return [model if isinstance(model, dict) else {} for model in found]


def _check_model(model: Mapping[str, Any], lm: LanguageModel, name: str, force: bool) -> None:
    if model.get("hash") not in (None, lm.fingerprint) and not force:
        raise UserError(
            f"`sae` {name} was trained on {model.get('name')} with weights {model.get('hash')}, "
            f"`model` {lm.name} has weights {lm.fingerprint}: use that model, or `force`"
        )


def _one_of(
    points: Sequence[HookPoint],
    lm: LanguageModel,
    name: str,
    layer: int | None,
    site: str | None,
) -> int:
    """The number of the place written that `layer` and `site` say. Raises UsageError where that is
    none or several."""
    wanted = None if layer is None else layer_index(lm, layer)
    fitting = [
        number
        for number, point in enumerate(points)
        if wanted in (None, point.layer) and site in (None, point.site)
    ]
    if len(fitting) != 1:
        where = ", ".join(f"layer {point.layer} {point.site}" for point in points)
        given = (("layer", layer), ("site", site))
        asked = " ".join(f"`{key}` {value}" for key, value in given if value is not None)
        raise UsageError(
            f"`sae` {name} writes {where}; asked: {asked or 'none of them'}: give `layer` and "
            "`site` of one"
        )
    return fitting[0]


def _hook(
    lm: LanguageModel, name: str, hook_name: Any, part: Mapping[str, Any] | None = None
) -> HookPoint:
    """The hook point of a name in a file."""
    layer, site = parse_hook_name(hook_name if isinstance(hook_name, str) else None)
    if part is not None and isinstance(part.get("layer"), int):
        layer = part["layer"]
    if layer is None or site is None:
        raise UserError(
            f"`sae` {name} names {hook_name or 'no hook'}, which is none of our sites: use it from "
            "Python (load_sae)"
        )
    if layer >= lm.n_layers:
        raise UserError(
            f"`sae` {name} has a place in layer {layer}, `model` {lm.name} has {lm.n_layers} "
            "blocks: use the model it was trained on"
        )
    return resolve_site(lm, layer, site)


def crosscoder_parts(sae: SAE) -> list[dict[str, Any]] | None:
    """The places of a crosscoder, as its file lists them; None for other SAEs."""
    own = sae.spec.metadata.get("saesteer")
    parts = own.get("crosscoder") if isinstance(own, dict) else None
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and "hook_name" in part for part in parts
    ):
        return None
    return parts


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
