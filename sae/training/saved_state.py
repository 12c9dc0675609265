"""Turns a training run into tensors and JSON values, and restores it bit for bit."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saesteer.checkpoints.files import plain
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.run_state import load_state
from saesteer.sae.activations.batches import LiveSource
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.runs.facts import check_same_run
from saesteer.sae.training.input_scale import InputScale
from saesteer.sae.training.sae_trainer import SAETrainer

if TYPE_CHECKING:
    from saesteer.sae.training.run import TrainingRun

Groups = dict[str, dict[str, Tensor]]


def identity(config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """The settings and inputs that a resumed run must share with the run before."""
    settings = plain(asdict(config))
    # These may change, to avoid whatever stopped the run.
    del settings["checkpoint_every"], settings["keep_states"], settings["lr"]
    del settings["cuda_graph"], settings["latent_shards"], settings["rank_timeout"]
    # As they were recorded before an empty list stood for the default.
    settings |= {"k": list(config.resolved_k), "l0": list(config.resolved_l0)}
    text = settings.pop("text")
    del text["epochs"]
    text["text seed"] = text.pop("seed")
    data = facts["data"]
    return {
        "config": {**settings, **text},
        "model": facts["model"],
        # The folder of shards may have moved.
        "data": data["shards"] if isinstance(data, dict) else data,
    }


def state_of(
    run: "TrainingRun", tensors: dict[str, Tensor], stream: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], list[Path]]:
    """Tensors, JSON values, and the files that have to be on disk first.

    `tensors` and `stream` are the state of the batches.
    """
    tensors = {f"batches/{name}": tensor for name, tensor in tensors.items()}
    for i, trainer in enumerate(run.trainers):
        tensors |= {f"{i}/{name}": tensor for name, tensor in trainer.state_dict().items()}
        tensors |= {f"{i}/{name}": mean for name, mean in _means(trainer).items()}
    logs = run.files.logs()
    meta = {
        **identity(run.config, run.facts),
        "stream": stream,
        "step": run.step,
        "extended": run.extended,
        "seconds": run.seconds,
        "scales": [_factors(trainer) for trainer in run.trainers],
        # With these a state can be opened as an SAE without the run's settings.
        "saes": {t.variant.folder: asdict(t.spec(run.facts)) for t in run.trainers},
        "canonical": {t.variant.folder: _canonical_names(t) for t in run.trainers},
        "peak_lrs": [trainer.peak_lr for trainer in run.trainers],
        "last": run.last,
        "metrics_bytes": [path.stat().st_size for path in logs],
    }
    return tensors, meta, logs


def _canonical_names(trainer: SAETrainer) -> dict[str, str]:
    """What each tensor of an SAE is called in the state: a parameter, or `buffer.` and a buffer."""
    architecture = trainer.architecture
    buffers = {f"buffer.{name}": ours for name, ours in architecture.canonical_buffers.items()}
    return {**architecture.canonical_names, **buffers}


def restore(run: "TrainingRun") -> None:
    """Continue from the saved state. Raises UserError when it belongs to other settings."""
    tensors, meta = load_state(run.folder)
    run.extended = list(meta.get("extended", []))
    before = meta["config"]["tokens"]
    if before < run.config.tokens:
        # More of the same: the one setting that may grow.
        meta["config"]["tokens"] = run.config.tokens
        run.extended.append({"step": int(meta["step"]), "tokens": before})
    plain_run = TrainConfig()
    usual = asdict(plain_run) | asdict(TextConfig())
    usual |= {"k": plain_run.resolved_k, "l0": plain_run.resolved_l0}
    check_same_run(
        meta,
        identity(run.config, run.facts),
        run.folder,
        usual,
        lambda: (
            isinstance(run.source, LiveSource)
            and run.source.has_read(meta["stream"]["source"], meta["data"])
        ),
    )
    parts = _groups(tensors)
    scales: dict[Place, InputScale] = {}
    for i, variant in enumerate(run.variants):
        scales |= _scales(variant.places, parts[str(i)], meta["scales"][i])
    run.make_trainers(scales)
    for i, trainer in enumerate(run.trainers):
        trainer.load_state_dict(parts[str(i)])
        if run.config.lr is None:  # not given, so not changed
            trainer.peak_lr = meta["peak_lrs"][i]
    run.files.cut_logs(meta["metrics_bytes"])
    run.batches.load_state_dict(parts["batches"], meta["stream"])
    run.step, run.seconds = int(meta["step"]), float(meta["seconds"])
    run.last = [dict(meta["last"][i]) for i in range(len(run.variants))]


def _groups(tensors: dict[str, Tensor]) -> Groups:
    parts: Groups = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        parts.setdefault(group, {})[rest] = tensor
    return parts


def _scales_of(trainer: SAETrainer) -> list[InputScale]:
    """The scale of each of a trainer's places, in the order of `Variant.places`."""
    scales = dict(zip(trainer.variant.reads, trainer.read, strict=True))
    scales |= zip(trainer.variant.writes, trainer.write, strict=True)
    return [scales[place] for place in trainer.variant.places]


def _means(trainer: SAETrainer) -> dict[str, Tensor]:
    scales = _scales_of(trainer)
    return {_mean_name(i): scale.mean for i, scale in enumerate(scales)}


def _mean_name(number: int) -> str:
    return f"scale.mean.{number}" if number else "scale.mean"


def _factors(trainer: SAETrainer) -> float | list[float]:
    """The scales' factors; a single number for an SAE of one place, as in older states."""
    factors = [scale.factor for scale in _scales_of(trainer)]
    return factors[0] if len(factors) == 1 else factors


def _scales(
    places: Sequence[Place], tensors: dict[str, Tensor], factors: float | list[float]
) -> dict[Place, InputScale]:
    numbers = factors if isinstance(factors, list) else [factors]
    return {
        place: InputScale(tensors[_mean_name(i)], factor)
        for i, (place, factor) in enumerate(zip(places, numbers, strict=True))
    }
