"""`train`: SAEs from a live model or from shards. Prepares the run for `TrainingRun.fit`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import claim_output, plain, read_json
from saesteer.checkpoints.locks import folder_lock
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.activations.batches import LiveSource
from saesteer.sae.config import Progress, TrainConfig
from saesteer.sae.model.hooks import keep_only_read
from saesteer.sae.model.language_model import LanguageModel, as_language_model, pick_device
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.runs.endings import one_voice
from saesteer.sae.runs.facts import as_given
from saesteer.sae.runs.memory_use import resolved_text
from saesteer.sae.runs.processes import ALONE, Processes, join_processes
from saesteer.sae.runs.trackers import check_tracker, open_tracker
from saesteer.sae.training.architectures import architecture_named, check_settings
from saesteer.sae.training.init_from import check_start, differences
from saesteer.sae.training.mesh.limits import check_mesh
from saesteer.sae.training.result import Trained
from saesteer.sae.training.run import TrainingRun
from saesteer.sae.training.sae_trainer import Variant
from saesteer.sae.training.saved_state import identity
from saesteer.sae.verbs.train_sources import Source, live_source, shard_source

if TYPE_CHECKING:  # torch.distributed takes a while to import, and most runs are of one process
    from saesteer.sae.training.mesh.mesh import Mesh


def train(
    out: str | Path,
    config: TrainConfig,
    *,
    model: str | LanguageModel | None = None,
    activations: str | Path | Sequence[str | Path] | None = None,
    replies: Sequence[str] = (),
    replies_folder: Path | None = None,
    device: str = "auto",
    lm_dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    consume_model: bool = False,
    log_to: str = "none",
    progress: Progress = show_progress,
    say: Callable[[str], None] = lambda message: None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Trained]:
    """Train SAEs live from a model, or from shards.

    One SAE is trained for every combination of the layers, widths, k and seeds in `config`, all
    from one stream of activations. A single SAE is written to `out`, several to folders in it.

    Args:
        out: receives `cfg.json`, `sae_weights.safetensors`, `run.json`, `metrics.jsonl`, `state/`.
        model: what to train on live; or
        activations: a folder of shards; no model or tokenizer is then loaded. For a crosscoder or a
            transcoder also several folders, which hold the same tokens.
        replies: user texts that the model answers first (live only); see `harvest`.
        resume: continue from the last saved state in `out`, or start when there is none. With more
            `tokens` than before, a run that is finished goes on, too.
        consume_model: free the weights of `model` that are not needed; see `harvest`.
        log_to: trackio, wandb or tensorboard: send the log there as well (needs the package, an
            extra of that name). Without an account wandb writes to the folder, and `wandb sync`
            uploads it; TensorBoard's events are in the folder `tensorboard`.
        say: called with one line about the memory, before anything large is taken, and with what
            else is good to know.
        warn: called with one line about what makes the result worth less.

    Under torchrun every process calls this, and they train together: `latent_shards` of them share
    the latents out, the others the rows of every batch, of which `batch_tokens` is the size of all.

    Returns:
        Each SAE with its record: `.sae`, `.folder`, `.log`, `.to_frame()`, `.plot()`; as a mapping
        it is the content of `run.json`, with the `folder`. Under torchrun the first process alone
        gets them, the others an empty list.

    Raises:
        UserError: something the message explains; Interrupted after Ctrl-C, with the state saved;
        NonFiniteError when a loss is not finite, with the last good state saved.
    """
    if (model is None) == (activations is None):
        raise UsageError("train needs either `model` (live) or `activations` (shards), not both")
    if activations is not None and replies:
        raise UsageError("`replies` needs `model`: shards hold the replies they were made with")
    check_settings(config)
    check_tracker(log_to)
    folders = as_folders(activations)
    processes = join_processes(config.rank_timeout)
    folder = Path(out).expanduser()
    start = None
    if config.init_from is not None:
        config = replace(config, init_from=as_given(config.init_from))
        start = load_sae(str(config.init_from), setting="init_from")
        config = replace(config, d_sae=config.d_sae or (start.spec.d_sae,))
    with one_voice(processes), _held(folder, processes):
        if (resume or not force) and processes.first:
            claim_output(folder, resume=resume, force=force, can_resume=True)
        processes.wait_for_first()
        compute = pick_device(device)
        told: list[str] = []
        if model is not None:
            lm = as_language_model(model, device=device, dtype=lm_dtype)
            before = _batch_size_before(folder) if resume else None
            config = replace(config, text=resolved_text(lm, config.text, before, processes))
            mesh = _mesh(config, processes, compute)
            source = live_source(lm, config, replies, replies_folder, progress, _reading(mesh))
            if consume_model or not isinstance(model, LanguageModel):
                assert isinstance(source.rows, LiveSource)
                keep_only_read(lm, source.rows.stream.points)
        else:
            mesh = _mesh(config, processes, compute)
            source = shard_source(folders, config, told.append, warn, _reading(mesh))
        facts = source.facts
        # What `reproduce` needs in addition to the config.
        facts["recipe"] = {
            "model": None if model is None else as_given(lm.name),
            "blocks": None if model is None else lm.blocks_path,
            "activations": _as_recorded(folders),
            "replies": list(replies),
            "device": str(compute),
            "lm_dtype": None if model is None else facts["model"]["dtype"],
        }
        variants = variants_of(config, source)
        check_mesh(config, [variant.d_sae for variant in variants], processes.world)
        processes.same("data, model or settings", repr((identity(config, facts), config)))
        run = TrainingRun(
            folder,
            config,
            variants,
            source.rows,
            facts,
            source.widths,
            source.dtype,
            compute,
            progress,
            warn,
            mesh,
        )
        if start is not None:
            facts["recipe"]["init_from"] = {"source": config.init_from, "sha256": start.sha256}
            _tell_of_start(start, run.variants, facts, say, warn)
            run.start = start
        for line in (run.check_memory(), *told):
            say(line)
        if processes.first:
            run.check_disk()
        if force and processes.first:
            # Only now, after all checks: this empties the folder.
            claim_output(folder, force=True)
        processes.wait_for_first()
        if resume and (longer := run.resume()):
            say(longer)
        run.files.tracker = open_tracker(log_to, folder, _shown_settings(config, facts), warn)
        try:
            return [Trained(record) for record in run.fit()]
        finally:
            if run.files.tracker is not None:
                run.files.tracker.close()


def _shown_settings(config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What a tracker shows as the settings of a run."""
    return {**plain(asdict(config)), "model": facts["model"].get("name")}


@contextlib.contextmanager
def _held(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold the folder, for all processes."""
    with folder_lock(folder) if processes.first else contextlib.nullcontext():
        yield


def _mesh(config: TrainConfig, processes: Processes, device: torch.device) -> "Mesh | None":
    """The processes as data-parallel and latent-sharded; None for one."""
    check_mesh(config, config.d_sae, processes.world)
    if processes.world == 1:
        return None
    from saesteer.sae.training.mesh.mesh import Mesh

    return Mesh(processes, config.latent_shards, device)


def _reading(mesh: "Mesh | None") -> Processes:
    return ALONE if mesh is None else mesh.reading


def as_folders(activations: str | Path | Sequence[str | Path] | None) -> list[str | Path]:
    """One folder, several or none as a list."""
    if activations is None:
        return []
    return [activations] if isinstance(activations, str | Path) else list(activations)


def _as_recorded(folders: Sequence[str | Path]) -> str | list[str] | None:
    """Folders with absolute paths; one alone as in older records."""
    paths = [str(Path(folder).absolute()) for folder in folders]
    return (paths[0] if len(paths) == 1 else paths) if paths else None


def variants_of(config: TrainConfig, source: Source) -> list[Variant]:
    """The SAEs of a run: every combination of places, widths, settings and seeds."""
    kind = architecture_named(config.arch)
    d_model = source.widths[source.reads[0]]
    variants = [
        Variant(
            reads,
            writes,
            d_sae,
            architecture.at_width(d_sae).at_places(
                [source.widths[place] for place in reads],
                [source.widths[place] for place in writes],
            ),
            seed,
        )
        for reads, writes in kind.arrangements(source.reads, source.writes)
        for d_sae in config.d_sae or (8 * d_model,)
        for architecture in kind.from_config(config)
        for seed in config.init_seed
    ]
    for variant in variants:
        variant.architecture.check(variant.d_sae)
    return variants


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
