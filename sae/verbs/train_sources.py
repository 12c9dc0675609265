"""What `train` reads: rows from a model that runs, or from one or several folders of shards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.batches import ActivationSource, LiveSource, ShardSource
from saesteer.sae.activations.joint_shards import JointShards
from saesteer.sae.activations.reader import open_activations
from saesteer.sae.config import Progress, TrainConfig
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.training.architectures import architecture_named
from saesteer.sae.training.architectures.transcoder import written_places
from saesteer.sae.training.held_out import held_back_of_shards


@dataclass(frozen=True)
class Source:
    """Rows, and what is known of them."""

    rows: ActivationSource
    facts: dict[str, Any]
    """What the run is recorded with."""
    reads: list[Place]
    """The places asked for."""
    writes: list[Place]
    """What transcoders write, for each of them; the same places for other architectures."""
    widths: Mapping[Place, int]
    dtype: torch.dtype


def live_source(
    lm: LanguageModel,
    config: TrainConfig,
    replies: Sequence[str],
    replies_folder: Path | None,
    progress: Progress,
) -> Source:
    """Rows straight from a model. Raises what `resolve_site` and `open_activations` raise."""
    from saesteer.checkpoints.model_files import cache_folder

    if not config.layers:
        raise UsageError("live training needs `layer`: the block to read")
    read = [resolve_site(lm, layer, config.site) for layer in config.layers]
    written = read
    if architecture_named(config.arch).transcodes:
        wanted = written_places([p.key for p in read], config.to_layer, config.to_site)
        written = [resolve_site(lm, layer, site) for layer, site in wanted]
    if len({point.key for point in read}) != len(read):
        named = ",".join(str(point.layer) for point in read)
        raise UsageError(f"`layer` names a block twice: {named}")
    points = list({point.key: point for point in (*read, *written)}.values())
    stream = open_activations(
        lm,
        points,
        config.text,
        replies=replies,
        replies_folder=replies_folder or cache_folder() / "replies",
        progress=progress,
        held_back=config.held_out_share,
    )
    facts = {
        "model": model_facts(lm),
        "data": stream.identity(),
        "text": stream.identity(),
        "context": config.text.context,
        "prepend_bos": stream.prepend_bos,
        "hf_hook_names": {point.key: point.module_path for point in points},
    }
    return Source(
        LiveSource(stream),
        facts,
        [point.key for point in read],
        [point.key for point in written],
        {point.key: lm.d_model for point in points},
        lm.dtype,
    )


def shard_source(
    folders: Sequence[str | Path],
    config: TrainConfig,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Source:
    """Rows from shards; of several folders that hold the same tokens, side by side.

    `say` and `warn` are told how often each row will be seen and whether a harvest ever ended.
    Raises UserError for shards that do not fit.
    """
    kind = architecture_named(config.arch)
    reader: ShardReader | JointShards
    if len(folders) == 1:
        reader = ShardReader(folders[0])
        readers, named = [reader], [reader.places]
    else:
        if not kind.transcodes and config.arch != "crosscoder":
            raise UsageError(
                f"several folders of `activations` are for `arch` crosscoder and the transcoders, "
                f"got {len(folders)} and {config.arch}: give one"
            )
        reader = JointShards(folders)
        readers, named = reader.readers, reader.of_reader
    several = config.arch == "crosscoder"
    reads = [
        place
        for number in range(len(readers) if several else 1)
        for place in _places(readers[number], named[number], config)
    ]
    writes = reads
    if kind.transcodes:
        last = readers[-1]
        wanted = written_places(reads, _from_start(last, config.to_layer), config.to_site)
        if len(readers) > 1 and config.to_site is None and len(last.sites) == 1:
            wanted = [(layer, last.sites[0]) for layer, _ in wanted]
        # A layer or site that is not given is that of what is read.
        asked = (
            "layer" if config.to_layer is None else "to_layer",
            "site" if config.to_site is None else "to_site",
        )
        writes = [named[-1][last.places.index(last.place(*at, asked))] for at in wanted]
    if len(set(reads)) != len(reads):
        raise UsageError(f"`layer` names a block twice: {','.join(map(str, config.layers))}")
    places = list(dict.fromkeys((*reads, *writes)))
    rows = ShardSource(reader, places, config.text.max_norm_ratio, config.seed)
    rows.held_back = held_back = held_back_of_shards(config, reader.tokens, rows.rows_at_once)
    _tell(readers, reader.tokens, held_back, config, say, warn)
    widths = {place: r.d_model for r, own in zip(readers, named, strict=True) for place in own}
    facts = {"rows": reader.tokens - held_back, **_facts(readers, named, config)}
    return Source(rows, facts, reads, writes, widths, reader.dtype)


def _places(reader: ShardReader, named: Sequence[Place], config: TrainConfig) -> list[Place]:
    """The places asked for that a folder holds, by their names in the run."""
    # resid_post is the default, so it also means that no site was asked for.
    asked = None if config.site == "resid_post" and len(reader.sites) == 1 else config.site
    layers = [_from_start(reader, layer) for layer in config.layers or reader.layers]
    return [named[reader.places.index(reader.place(layer, asked))] for layer in layers]


def _from_start(reader: ShardReader, layer: int | None) -> int | None:
    """A layer that is counted from the end, where the shards say how many there are."""
    model = reader.manifest["model"]
    if layer is None or layer >= 0 or not isinstance(model, dict) or "n_layers" not in model:
        return layer
    return int(layer % model["n_layers"])


def _facts(
    readers: Sequence[ShardReader], named: Sequence[Sequence[Place]], config: TrainConfig
) -> dict[str, Any]:
    manifest = readers[0].manifest
    models = [r.manifest["model"] if isinstance(r.manifest["model"], dict) else {} for r in readers]
    models = [
        model or {"name": str(r.manifest["model"])}
        for model, r in zip(models, readers, strict=True)
    ]
    text = manifest.get("config") or {}
    hooks = {
        place: path
        for r, own in zip(readers, named, strict=True)
        for place, path in zip(own, r.manifest.get("hf_hook_names") or [], strict=False)
    }
    shards = [shard for r in readers for shard in r.manifest["shards"]]
    return {
        "model": models[0],
        "models": models,
        "data": {"activations": ",".join(str(r.folder) for r in readers), "shards": shards},
        "text": manifest.get("data") or [],
        "context": text.get("context", config.text.context),
        "prepend_bos": bool(manifest.get("prepend_bos", False)),
        "hf_hook_names": hooks,
    }


def _tell(
    readers: Sequence[ShardReader],
    tokens: int,
    held_back: int,
    config: TrainConfig,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """How often each row that is trained on will be seen, and whether a harvest ever ended."""
    rows = tokens - held_back
    but = f" of which {held_back:,} are held back" if held_back else ""
    say(
        f"the shards hold {tokens:,} rows{but}: {config.tokens / rows:.1f} epochs make "
        f"{config.tokens:,}"
    )
    for reader in readers:
        if reader.manifest.get("complete") is False:
            wanted = (reader.manifest.get("config") or {}).get("tokens")
            of = f" of {wanted:,}" if isinstance(wanted, int) else ""
            warn(
                f"the harvest in {reader.folder} stopped after {reader.tokens:,}{of} rows and is "
                "not complete: its own command with `resume` goes on"
            )
