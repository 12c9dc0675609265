"""A whole training run: `train` prepares, `_Run.fit` loops over batches and SAEs."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.disk import folder_bytes, need_space
from saesteer.checkpoints.errors import Interrupted, NonFiniteError, UsageError, UserError
from saesteer.checkpoints.files import (
    append_jsonl,
    claim_output,
    plain,
    read_json,
    write_json,
    writing,
)
from saesteer.checkpoints.locks import folder_lock
from saesteer.checkpoints.provenance import git_revision, machine, versions
from saesteer.checkpoints.run_state import has_state, load_state, restoring
from saesteer.checkpoints.shards import ShardReader
from saesteer.checkpoints.state_saver import StateSaver
from saesteer.sae.activations.batches import ActivationSource, BatchStream, LiveSource, ShardSource
from saesteer.sae.activations.prefetch import BATCHES_AHEAD, Producer
from saesteer.sae.activations.reader import open_activations
from saesteer.sae.config import Progress, TrainConfig, no_progress
from saesteer.sae.model.hooks import keep_only_read, resolve_site
from saesteer.sae.model.language_model import LanguageModel, as_language_model, pick_device
from saesteer.sae.runs.disk_use import train_footprint
from saesteer.sae.runs.facts import as_given, check_same_run, model_facts
from saesteer.sae.runs.memory_use import (
    gigabytes,
    refuse_what_cannot_fit,
    resolved_text,
    training_memory,
)
from saesteer.sae.runs.processes import is_one_of_many
from saesteer.sae.runs.stopping import stop_requests
from saesteer.sae.training.sae_trainer import SAETrainer, Variant
from saesteer.sae.training.topk import InputScale

_LOGS_PER_RUN = 100
# Rows that mean and scale are measured on; more would not change the third digit.
_SCALE_ROWS = 32_768


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
) -> list[dict[str, Any]]:
    """Train SAEs live from a model, or from shards.

    One SAE is trained for every combination of the layers, widths, k and seeds in `config`, all
    from one stream of activations. A single SAE is written to `out`, several to folders in it.

    Args:
        out: receives `cfg.json`, `sae_weights.safetensors`, `run.json`, `metrics.jsonl`, `state/`.
        model: what to train on live; or
        activations: a folder of shards; no model or tokenizer is then loaded.
        replies: user texts that the model answers first (live only); see `harvest`.
        resume: continue from the last saved state in `out`, or start when there is none.
        consume_model: free the weights of `model` that are not needed; see `harvest`.
        say: called with one line about the memory, before anything large is taken.

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
    if is_one_of_many():
        raise UsageError(
            "train runs in one process: start it without torchrun (harvest can share a corpus out)"
        )
    folder = Path(out).expanduser()
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
        # What a repetition needs besides the config.
        facts["recipe"] = {
            "model": None if model is None else as_given(lm.name),
            "blocks": None if model is None else lm.blocks_path,
            "activations": None if activations is None else str(Path(activations).absolute()),
            "replies": list(replies),
            "device": str(compute),
            "lm_dtype": None if model is None else facts["model"]["dtype"],
        }
        run = _Run(folder, config, source, facts, d_model, dtype, compute, progress)
        say(run.check_memory())
        run.check_disk()
        if force:  # only now, when nothing can go wrong at once, may the folder be emptied
            claim_output(folder, force=True)
        if resume and has_state(folder):
            with restoring(folder):
                run.load()
        return run.fit()


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
        lm, points, config.text, replies=replies, replies_folder=folder, progress=progress
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
    # resid_post is also what stands there when no site was asked for.
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
    return ShardSource(reader, places, config.text.max_norm_ratio, config.seed), {
        "model": model or {"name": str(manifest["model"])},
        "data": {"activations": str(reader.folder), "shards": manifest["shards"]},
        "text": manifest.get("data") or [],
        "context": text.get("context", config.text.context),
        "prepend_bos": bool(manifest.get("prepend_bos", False)),
        "hf_hook_names": named,
    }


class _Run:
    """A training run: its batches, its SAEs, its folder."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        source: ActivationSource,
        facts: dict[str, Any],
        d_model: int,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.folder = folder
        self.config = config
        self.facts = facts
        self.d_model = d_model
        self.device = device
        self.progress = progress
        self.source = source
        widths = config.d_sae or (8 * d_model,)
        self.variants = [
            Variant(place, d_sae, k, seed)
            for place in source.places
            for d_sae in widths
            for k in config.k
            for seed in config.init_seed
        ]
        for variant in self.variants:
            if variant.d_sae < variant.k:
                raise UsageError(f"`d_sae` must be at least `k` ({variant.k}), got {variant.d_sae}")
        self.dtype = dtype
        self.batches = BatchStream(
            source,
            d_model,
            tokens=config.tokens,
            batch_tokens=config.batch_tokens,
            buffer_tokens=config.buffer_tokens,
            dtype=dtype,
            seed=config.seed,
            filling=lambda done, total: progress("fill buffer", done, total, "tokens"),
        )
        self.trainers: list[SAETrainer] = []
        self.step = 0
        self.seconds = 0.0
        self.saver = StateSaver(folder, keep=config.keep_states)
        self._last: list[dict[str, Any]] = [{} for _ in self.variants]

    def check_memory(self) -> str:
        """What training will take, in one line. Raises UserError when that is not there."""
        need = training_memory(
            self.d_model,
            [variant.d_sae for variant in self.variants],
            self.config,
            self.device,
            buffer_tokens=self.batches.buffer_tokens,
            row_bytes=self.d_model * len(self.source.places) * self.dtype.itemsize,
            batches_ahead=BATCHES_AHEAD,
        )
        count = len(self.variants)
        refuse_what_cannot_fit(need, count, self.device)
        return (
            f"memory: {gigabytes(need.buffer)} for a shuffle buffer of "
            f"{self.batches.buffer_tokens:,} tokens, {gigabytes(need.saes + need.step)} for "
            f"{count} SAE{'s' if count > 1 else ''}"
        )

    def place_of(self, variant: Variant) -> Path:
        return self.folder if len(self.variants) == 1 else self.folder / variant.folder

    def check_disk(self) -> None:
        """Refuse a run whose files would not fit; those there now give their place."""
        rows = self.batches.buffer.rows
        footprint = train_footprint(
            [variant.d_sae for variant in self.variants],
            self.d_model,
            buffer_tokens=len(rows),
            batch_tokens=self.config.batch_tokens,
            width=rows.shape[1],
            element_bytes=rows.element_size(),
            keep=self.config.keep_states,
        )
        needed = footprint.total_bytes - folder_bytes(self.folder)
        todo = "lower `buffer_tokens`, `d_sae` or `keep_states`"
        need_space(self.folder, needed, "training writes", todo)

    def _make_trainers(self, scales: list[InputScale]) -> None:
        """One trainer per variant; `scales` are in the order of the source's places."""
        for variant in self.variants:
            at = self.source.places.index(variant.place)
            columns = slice(at * self.d_model, (at + 1) * self.d_model)
            trainer = SAETrainer(variant, self.config, columns, scales[at], self.device)
            self.trainers.append(trainer)
            with writing(self.place_of(variant)):
                self.place_of(variant).mkdir(exist_ok=True)

    def fit(self) -> list[dict[str, Any]]:
        """Train to the end and write the SAEs."""
        if not self.trainers:
            sample = self.batches.fill()[:_SCALE_ROWS]
            self._make_trainers([InputScale.of(x) for x in sample.split(self.d_model, dim=1)])
            for variant in self.variants:
                # Lines of a run that was stopped before its first state.
                self._metrics_file(variant).write_text("")
                # By this file a run that was stopped is known as ours, and --force may replace it.
                facts = {"model": self.facts["model"], "data": self.facts["data"]}
                started = {
                    "schema_version": 1,
                    "verb": "train",
                    "complete": False,
                    "config": asdict(self.config),
                    **facts,
                }
                write_json(self.place_of(variant) / "run.json", started)
        config = self.config
        log_every = max(1, config.steps // _LOGS_PER_RUN)
        save_every = max(1, config.checkpoint_every // config.batch_tokens)
        due = False
        with (
            stop_requests() as stop,
            self.saver,
            Producer(self.batches, self.device) as self.producer,
        ):
            clock = _Clock(self.producer)
            self.show()
            while self.step < config.steps:
                try:
                    batch = self.producer.next_batch()
                except UserError as error:
                    # Most often the corpus has ended: hours of training need not be lost with it.
                    self.save(now=True)
                    raise type(error)(
                        f"{error}; the state is in {self.folder}: `resume` goes on from step "
                        f"{self.step}, with more `epochs` too"
                    ) from error
                clock.got_batch()
                assert batch is not None, "the stream holds exactly `steps` batches"
                try:
                    losses = [trainer.backward(batch) for trainer in self.trainers]
                except NonFiniteError:
                    # No trainer has moved: with the batch back, the state is the one before it.
                    self.producer.put_back(batch)
                    self.save(now=True)
                    raise
                for trainer, loss in zip(self.trainers, losses, strict=True):
                    trainer.update(loss)
                self.step += 1
                clock.stepped(config.batch_tokens)
                if self.step % log_every == 0 or self.step == config.steps:
                    self.log(clock)
                self.show()
                if stop() and self.step < config.steps:
                    self.save(now=True)
                    raise Interrupted(
                        f"stopped at step {self.step} of {config.steps}; the state is in "
                        f"{self.folder}: run the same command with `resume` to go on"
                    )
                due = due or self.step % save_every == 0
                if due and self.step < config.steps and self.saver.ready():
                    self.save()
                    due = False
            self.save()
            return self.finish()

    def log(self, clock: "_Clock") -> None:
        """One line per SAE in its metrics.jsonl."""
        tokens = self.step * self.config.batch_tokens
        speed = clock.take()
        self.seconds += speed.pop("seconds")
        for i, trainer in enumerate(self.trainers):
            self._last[i] = {"step": self.step, "tokens": tokens, **trainer.take_log(), **speed}
            append_jsonl(self.place_of(trainer.variant) / "metrics.jsonl", self._last[i])

    def show(self) -> None:
        """Tell the progress how far training is, with the FVU of the latest log line."""
        last = self._last[0]
        note = f"tokens, FVU {last['fvu']:.3f}" if last else "tokens"
        tokens = self.step * self.config.batch_tokens
        self.progress("train", tokens, self.batches.total, note)

    def finish(self) -> list[dict[str, Any]]:
        """Write each SAE with its run.json."""
        # Meanwhile the last state is written; only a run that can be resumed calls itself complete.
        hashes = [t.save(self.place_of(t.variant), self.facts) for t in self.trainers]
        self.saver.wait()
        config = plain(asdict(self.config))
        results = []
        for trainer, last, sha256 in zip(self.trainers, self._last, hashes, strict=True):
            folder = self.place_of(trainer.variant)
            layer, site = trainer.variant.place
            run = {
                "schema_version": 1,
                "verb": "train",
                "complete": True,
                "sae": {
                    "layer": layer,
                    "site": site,
                    "d_model": self.d_model,
                    "d_sae": trainer.variant.d_sae,
                    "k": trainer.variant.k,
                    "init_seed": trainer.variant.init_seed,
                    "peak_lr": trainer.peak_lr,
                    "sha256": sha256,
                },
                "config": config,
                "recipe": self.facts["recipe"],
                "model": self.facts["model"],
                "data": self.facts["data"],
                "excluded": self.source.excluded,
                "final": last,
                "seconds": round(self.seconds, 3),
                "seconds_blocked_in_saving": round(self.saver.blocked_seconds, 3),
                "versions": versions(),
                "git_revision": git_revision(),
                "machine": machine(),
            }
            write_json(folder / "run.json", run)
            results.append({"folder": str(folder), **run})
        return results

    def save(self, *, now: bool = False) -> None:
        """Save all that `load` needs to continue to the bit, beside the training unless `now`.

        Raises NonFiniteError, and leaves the state before, when a GPU has left out a step.
        """
        for trainer in self.trainers:
            trainer.check_finite()
        with self.producer.paused() as (tensors, stream):
            self._save({f"batches/{name}": t for name, t in tensors.items()}, stream, now)

    def _save(self, tensors: dict[str, Tensor], stream: dict[str, Any], now: bool) -> None:
        for i, trainer in enumerate(self.trainers):
            tensors |= {f"{i}/{name}": tensor for name, tensor in trainer.state_dict().items()}
            tensors[f"{i}/scale.mean"] = trainer.scale.mean
        logs = [self._metrics_file(trainer.variant) for trainer in self.trainers]
        meta = {
            **self._identity(),
            "stream": stream,
            "step": self.step,
            "seconds": self.seconds,
            "scales": [trainer.scale.factor for trainer in self.trainers],
            # By these a state opens as an SAE without the run's settings.
            "saes": {t.variant.folder: asdict(t.spec(self.facts)) for t in self.trainers},
            "peak_lrs": [trainer.peak_lr for trainer in self.trainers],
            "last": self._last,
            "metrics_bytes": [path.stat().st_size for path in logs],
        }
        known = [last["fvu"] for last in self._last if last]
        score = sum(known) / len(known) if known else None
        save = self.saver.save_now if now else self.saver.save
        save(tensors, meta, score=score, first=logs)

    def load(self) -> None:
        """Continue from the saved state. Raises UserError when it belongs to other settings."""
        tensors, meta = load_state(self.folder)
        check_same_run(meta, self._identity(), self.folder)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            parts.setdefault(group, {})[rest] = tensor
        by_place = {
            variant.place: InputScale(parts[str(i)]["scale.mean"], meta["scales"][i])
            for i, variant in enumerate(self.variants)
        }
        self._make_trainers([by_place[place] for place in self.source.places])
        for i, trainer in enumerate(self.trainers):
            trainer.load_state_dict(parts[str(i)])
            if self.config.lr is None:  # left out, not changed
                trainer.peak_lr = meta["peak_lrs"][i]
            # Lines written after the state was saved will be written again.
            with self._metrics_file(trainer.variant).open("r+b") as file:
                file.truncate(min(meta["metrics_bytes"][i], file.seek(0, os.SEEK_END)))
        self.batches.load_state_dict(parts["batches"], meta["stream"])
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self._last = [dict(meta["last"][i]) for i in range(len(self.variants))]

    def _metrics_file(self, variant: Variant) -> Path:
        path = self.place_of(variant) / "metrics.jsonl"
        path.touch()
        return path

    def _identity(self) -> dict[str, Any]:
        """What a resumed run may not change."""
        config = plain(asdict(self.config))
        # What a person changes to get past the reason for the stop.
        del config["checkpoint_every"], config["keep_states"], config["lr"]
        del config["cuda_graph"]
        text = config.pop("text")
        del text["epochs"]
        text["text seed"] = text.pop("seed")
        data = self.facts["data"]
        return {
            "config": {**config, **text},
            "model": self.facts["model"],
            # The folder of shards may have moved.
            "data": data["shards"] if isinstance(data, dict) else data,
        }


class _Clock:
    """Time since the last log line, and how much of it each side waited for the other."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._start = self._mark = time.monotonic()
        self._waited = 0.0
        self._tokens = 0

    def got_batch(self) -> None:
        self._waited += time.monotonic() - self._mark

    def stepped(self, tokens: int) -> None:
        self._tokens += tokens
        self._mark = time.monotonic()

    def take(self) -> dict[str, float]:
        """`stall_trainer`: share of the time in which the trainer waited for a batch.
        `stall_model`: share in which the model (or the reading of shards) waited for the trainer,
        with as many batches made ahead as may wait.
        """
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        taken = {
            "tokens_per_second": self._tokens / seconds,
            "stall_model": min(1.0, self._producer.take_stall() / seconds),
            "stall_trainer": self._waited / seconds,
            "seconds": seconds,
        }
        self._start, self._waited, self._tokens = now, 0.0, 0
        return taken


def _batch_size_before(folder: Path) -> int | None:
    """The batch size of the run in `folder`, which an automatic one keeps to."""
    for path in (folder / "run.json", *sorted(folder.glob("*/run.json"))):
        with contextlib.suppress(UserError, KeyError, TypeError):
            return int(read_json(path)["config"]["text"]["batch_size"])
    return None
