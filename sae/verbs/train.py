"""`train`: SAEs from a live model or from shards. Prepares the run for `TrainingRun.fit`."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import claim_output, read_json
from saesteer.checkpoints.locks import folder_lock
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.batches import ActivationSource, LiveSource, ShardSource
from saesteer.sae.activations.reader import open_activations
from saesteer.sae.config import Progress, TrainConfig, no_progress
from saesteer.sae.model.hooks import keep_only_read, resolve_site
from saesteer.sae.model.language_model import LanguageModel, as_language_model, pick_device
from saesteer.sae.runs.facts import as_given, model_facts
from saesteer.sae.runs.memory_use import resolved_text
from saesteer.sae.runs.processes import is_one_of_many
from saesteer.sae.training.architectures import architecture_named, check_settings
from saesteer.sae.training.held_out import held_back_of_shards
from saesteer.sae.training.init_from import check_start, differences
from saesteer.sae.training.run import TrainingRun
from saesteer.sae.training.sae_trainer import Variant


def train(
    out: str | Path,
    config: TrainConfig,
    *,
    model: str | LanguageModel | None = None,
    activations: str | Path | None = None,
    replies: Sequence[str] = (),
    replies_folder: Path | None = None,
    device: str = "auto",
    lm_dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    consume_model: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda message: None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Train SAEs live from a model, or from shards.

    One SAE is trained for every combination of the layers, widths, k and seeds in `config`, all
    from one stream of activations. A single SAE is written to `out`, several to folders in it.

    Args:
        out: receives `cfg.json`, `sae_weights.safetensors`, `run.json`, `metrics.jsonl`, `state/`.
        model: what to train on live; or
        activations: a folder of shards; no model or tokenizer is then loaded.
        replies: user texts that the model answers first (live only); see `harvest`.
        resume: continue from the last saved state in `out`, or start when there is none. With more
            `tokens` than before, a run that is finished goes on, too.
        consume_model: free the weights of `model` that are not needed; see `harvest`.
        say: called with one line about the memory, before anything large is taken, and with what
            else is good to know.
        warn: called with one line about what makes the result worth less.

    Returns:
        The `run.json` of each SAE, with its `folder`.

    Raises:
        UserError: something the message explains; Interrupted after Ctrl-C, with the state saved;
        NonFiniteError when a loss is not finite, with the last good state saved.
    """
    if (model is None) == (activations is None):
        raise UsageError("train needs either `model` (live) or `activations` (shards), not both")
    if activations is not None and replies:
        raise UsageError("`replies` needs `model`: shards hold the replies they were made with")
    check_settings(config)
    if is_one_of_many():
        raise UsageError(
            "train runs in one process: start it without torchrun (harvest can share a corpus out)"
        )
    folder = Path(out).expanduser()
    start = None
    if config.init_from is not None:
        config = replace(config, init_from=as_given(config.init_from))
        start = load_sae(str(config.init_from))
        config = replace(config, d_sae=config.d_sae or (start.spec.d_sae,))
    with folder_lock(folder):
        if resume or not force:
            claim_output(folder, resume=resume, force=force, can_resume=True)
        compute = pick_device(device)
        source: ActivationSource
        if model is not None:
            lm = as_language_model(model, device=device, dtype=lm_dtype)
            before = _batch_size_before(folder) if resume else None
            config = replace(config, text=resolved_text(lm, config.text, before))
            live, facts = _live_source(lm, config, replies, replies_folder, progress)
            source, points = live, live.stream.points
            if consume_model or not isinstance(model, LanguageModel):
                keep_only_read(lm, points)
            d_model, dtype = lm.d_model, lm.dtype
        else:
            assert activations is not None
            reader = ShardReader(activations)
            source, facts = _shard_source(reader, config)
            d_model, dtype = reader.d_model, reader.dtype
        # What `reproduce` needs in addition to the config.
        facts["recipe"] = {
            "model": None if model is None else as_given(lm.name),
            "blocks": None if model is None else lm.blocks_path,
            "activations": None if activations is None else str(Path(activations).absolute()),
            "replies": list(replies),
            "device": str(compute),
            "lm_dtype": None if model is None else facts["model"]["dtype"],
        }
        variants = _variants(config, source.places, d_model)
        run = TrainingRun(
            folder, config, variants, source, facts, d_model, dtype, compute, progress, warn
        )
        if start is not None:
            facts["recipe"]["init_from"] = {"source": config.init_from, "sha256": start.sha256}
            _tell_of_start(start, variants, facts, say, warn)
            run.start = start
        say(run.check_memory())
        if activations is not None:
            _tell_of_shards(reader, facts["rows"], config, say, warn)
        run.check_disk()
        if force:
            # Only now, after all checks: this empties the folder.
            claim_output(folder, force=True)
        if resume and (told := run.resume()):
            say(told)
        return run.fit()


def _variants(config: TrainConfig, places: Sequence[Place], d_model: int) -> list[Variant]:
    """The SAEs of a run: every combination of places, widths, settings and seeds."""
    variants = [
        Variant((place,), (place,), d_sae, architecture.at_width(d_sae), seed)
        for place in places
        for d_sae in config.d_sae or (8 * d_model,)
        for architecture in architecture_named(config.arch).from_config(config)
        for seed in config.init_seed
    ]
    for variant in variants:
        variant.architecture.check(variant.d_sae)
    return variants


def _live_source(
    lm: LanguageModel,
    config: TrainConfig,
    replies: Sequence[str],
    replies_folder: Path | None,
    progress: Progress,
) -> tuple[LiveSource, dict[str, Any]]:
    from saesteer.checkpoints.model_files import cache_folder

    if not config.layers:
        raise UsageError("live training needs `layer`: the block to read")
    points = [resolve_site(lm, layer, config.site) for layer in config.layers]
    folder = replies_folder or cache_folder() / "replies"
    stream = open_activations(
        lm,
        points,
        config.text,
        replies=replies,
        replies_folder=folder,
        progress=progress,
        held_back=config.held_out_share,
    )
    return LiveSource(stream), {
        "model": model_facts(lm),
        "data": stream.identity(),
        "text": stream.identity(),
        "context": config.text.context,
        "prepend_bos": stream.prepend_bos,
        "hf_hook_names": {point.key: point.module_path for point in points},
    }


def _shard_source(
    reader: ShardReader, config: TrainConfig
) -> tuple[ActivationSource, dict[str, Any]]:
    manifest = reader.manifest
    model = manifest["model"] if isinstance(manifest["model"], dict) else {}
    # resid_post is the default, so it also means that no site was asked for.
    asked = None if config.site == "resid_post" and len(reader.sites) == 1 else config.site
    layers = config.layers or tuple(reader.layers)
    if any(layer < 0 for layer in layers) and "n_layers" in model:
        layers = tuple(layer % model["n_layers"] if layer < 0 else layer for layer in layers)
    places = [reader.place(layer, asked) for layer in layers]
    text = manifest.get("config") or {}
    paths = manifest.get("hf_hook_names") or []
    if len(set(places)) != len(places):
        raise UsageError(f"`layer` names a block twice: {','.join(map(str, config.layers))}")
    named = dict(zip(reader.places, paths, strict=False))
    source = ShardSource(reader, places, config.text.max_norm_ratio, config.seed)
    source.held_back = held_back_of_shards(config, reader.tokens, source.rows_at_once)
    return source, {
        "rows": reader.tokens - source.held_back,
        "model": model or {"name": str(manifest["model"])},
        "data": {"activations": str(reader.folder), "shards": manifest["shards"]},
        "text": manifest.get("data") or [],
        "context": text.get("context", config.text.context),
        "prepend_bos": bool(manifest.get("prepend_bos", False)),
        "hf_hook_names": named,
    }


def _tell_of_shards(
    reader: ShardReader,
    rows: int,
    config: TrainConfig,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """How often each of the `rows` that are trained on will be seen, and whether the harvest ever
    ended."""
    held_back = reader.tokens - rows
    but = f" of which {held_back:,} are held back" if held_back else ""
    say(
        f"the shards hold {reader.tokens:,} rows{but}: {config.tokens / rows:.1f} epochs make "
        f"{config.tokens:,}"
    )
    if reader.manifest.get("complete") is False:
        wanted = (reader.manifest.get("config") or {}).get("tokens")
        of = f" of {wanted:,}" if isinstance(wanted, int) else ""
        warn(
            f"the harvest in {reader.folder} stopped after {reader.tokens:,}{of} rows and is not "
            "complete: its own command with `resume` goes on"
        )


def _tell_of_start(
    start: SAE,
    variants: list[Variant],
    facts: dict[str, Any],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Check an SAE to start from; say what is other than in its training."""
    check_start(start, variants)
    if changed := differences(start, variants[0]):
        warn(f"`init_from` {start.source} goes on with other settings: {changed}")
    before = start.spec.metadata.get("saesteer") or {}
    model = before.get("model") if isinstance(before, dict) else None
    if isinstance(model, dict) and model.get("hash") not in (None, facts["model"].get("hash")):
        say(f"{start.source} was trained on other weights, of {model.get('name')}")


def _batch_size_before(folder: Path) -> int | None:
    """The batch size of the run in `folder`, which an automatic one keeps; None without one."""
    for path in (folder / "run.json", *sorted(folder.glob("*/run.json"))):
        with contextlib.suppress(UserError, KeyError, TypeError):
            return int(read_json(path)["config"]["text"]["batch_size"])
    return None
