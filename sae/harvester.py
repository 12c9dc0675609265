"""Streams activations out of a language model, and writes them to shards."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import Interrupted, NonFiniteError, UsageError, UserError
from saesteer.checkpoints.files import claim_output, plain
from saesteer.checkpoints.provenance import versions
from saesteer.sae.config import HarvestConfig, Progress, TextConfig, no_progress
from saesteer.sae.hooks import HookPoint, resolve_site, run_to
from saesteer.sae.models import DTYPES, LanguageModel, as_language_model
from saesteer.sae.replies import ReplyConfig, sample_replies
from saesteer.sae.stopping import stop_requests
from saesteer.sae.text import Contexts, open_contexts


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """Kept activations of one forward pass, by `HookPoint.key`, and the tokens they stand on."""

    activations: dict[tuple[int, str], Float[Tensor, "tokens d_model"]]
    token_ids: Int[Tensor, " tokens"]


class SinkFilter:
    """Leaves out attention sinks: rows far longer than the median row.

    In SmolLM2 two rows of 512 hold 98 % of the variance; scale, b_dec and FVU would describe them
    alone. The median is taken over each batch and averaged over the batches seen so far, for each
    hook point.
    """

    def __init__(self, max_norm_ratio: float) -> None:
        self.max_norm_ratio = max_norm_ratio
        self.sums: dict[str, float] = {}
        self.batches = 0

    def keep(
        self, activations: dict[tuple[int, str], Float[Tensor, "tokens d_model"]]
    ) -> Bool[Tensor, " tokens"]:
        """True for rows that are no sink at any hook point. Updates the running median."""
        if not any(len(rows) for rows in activations.values()):
            # The median of nothing is NaN, and would make a sink of every later row.
            return torch.ones(0, dtype=torch.bool, device=next(iter(activations.values())).device)
        self.batches += 1
        keep: Tensor | None = None
        for (layer, site), rows in activations.items():
            norms = rows.float().norm(dim=-1)
            name = f"{layer}/{site}"
            self.sums[name] = self.sums.get(name, 0.0) + norms.median().item()
            near = norms <= self.max_norm_ratio * self.sums[name] / self.batches
            keep = near if keep is None else keep & near
        assert keep is not None, "a harvest has at least one hook point"
        return keep

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.batches = dict(state["sums"]), state["batches"]


class ActivationStream:
    """Contexts in, kept activations out, one batch of contexts per forward pass."""

    def __init__(
        self, lm: LanguageModel, points: Sequence[HookPoint], contexts: Contexts, config: TextConfig
    ) -> None:
        self.lm = lm
        self.points = list(points)
        self.contexts = contexts
        self.batch_size = config.batch_size
        self.sinks = SinkFilter(config.max_norm_ratio)
        self.excluded = {"special": 0, "sinks": 0}
        self.batches = 0

    def __iter__(self) -> Iterator[ActivationBatch]:
        while (batch := self.next_batch()) is not None:
            yield batch

    def next_batch(self) -> ActivationBatch | None:
        """Run the next contexts through the model; None when the text has ended."""
        contexts = self.contexts.next_batch(self.batch_size)
        if contexts is None:
            return None
        with torch.inference_mode():
            seen = run_to(self.lm, self.points, input_ids=contexts.token_ids.to(self.lm.device))
            text = contexts.keep.to(self.lm.device)
            rows = {point.key: seen[point.key][text] for point in self.points}
            for key, values in rows.items():
                if values.shape[-1] != self.lm.d_model:
                    raise UsageError(
                        f"--site {key[1]} has width {values.shape[-1]}, the residual stream of "
                        f"{self.lm.name} has {self.lm.d_model}: give a site of that width"
                    )
                if not torch.isfinite(values).all():
                    raise NonFiniteError(
                        f"{self.lm.name} gave NaN or infinite activations at layer {key[0]} in "
                        f"batch {self.batches}: try --dtype float32, or look at the text there"
                    )
            keep = self.sinks.keep(rows)
            self.excluded["special"] += int((~text).sum())
            self.excluded["sinks"] += int((~keep).sum())
            self.batches += 1
            return ActivationBatch(
                {key: values[keep] for key, values in rows.items()},
                contexts.token_ids[contexts.keep][keep.cpu()].to(torch.int32),
            )

    @property
    def prepend_bos(self) -> bool:
        """Whether every context starts with the beginning-of-text token."""
        return self.contexts.prepend_bos

    def identity(self) -> list[dict[str, Any]]:
        """What text was read."""
        return self.contexts.identity()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; JSON-ready."""
        return {
            "contexts": self.contexts.state_dict(),
            "sinks": self.sinks.state_dict(),
            "excluded": dict(self.excluded),
            "batches": self.batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.contexts.load_state_dict(state["contexts"])
        self.sinks.load_state_dict(state["sinks"])
        self.excluded, self.batches = dict(state["excluded"]), state["batches"]


def open_activations(
    lm: LanguageModel,
    points: Sequence[HookPoint],
    config: TextConfig,
    *,
    replies: Sequence[str] = (),
    replies_folder: Path,
    progress: Progress = no_progress,
) -> ActivationStream:
    """The stream of activations of a `TextConfig`, with the model's replies sampled first."""
    if len({point.key for point in points}) != len(points):
        named = ",".join(str(point.layer) for point in points)
        raise UsageError(f"--layer names a block twice: {named}")
    replies_file = None
    if replies:
        settings = ReplyConfig(seed=config.seed)
        replies_file = sample_replies(lm, replies, replies_folder, settings, progress)
    contexts = open_contexts(lm, config, replies_file)
    return ActivationStream(lm, points, contexts, config)


def harvest(
    model: str | LanguageModel,
    out: str | Path,
    config: HarvestConfig,
    *,
    replies: Sequence[str] = (),
    replies_folder: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run text through a model once and write the activations of some layers to shards.

    Args:
        model: a name, folder or `.gguf` file, or a loaded `LanguageModel`.
        out: folder for `manifest.json` and the shards.
        replies: user texts that the model answers first; prompts and replies join the corpus
            with the share `config.text.replies_share`.
        replies_folder: where replies are kept; by default the cache folder.
        resume: continue after the last whole shard of an interrupted harvest.
        warn: called with one line when the corpus ends before `config.tokens`.

    Returns:
        The manifest that was written.

    Raises:
        UserError: the text, the model or the folder cannot be used; the message says why.
        Interrupted: after Ctrl-C, with the tokens so far written.
    """
    from saesteer.checkpoints.model_files import cache_folder
    from saesteer.checkpoints.shards import MANIFEST, ShardWriter

    folder = Path(out).expanduser()
    if resume or not force:
        claim_output(folder, resume=resume, force=force, can_resume=True)
    lm = as_language_model(model, device=device, dtype=dtype)
    points = [resolve_site(lm, layer, config.site) for layer in config.layers]
    stream = open_activations(
        lm,
        points,
        config.text,
        replies=replies,
        replies_folder=replies_folder or cache_folder() / "replies",
        progress=progress,
    )
    if force:  # only now, when model and text were found, may the folder be emptied
        claim_output(folder, force=True)
    facts = _facts(lm, points, config, stream)
    default = torch.float32 if lm.dtype == torch.float32 else torch.bfloat16
    store_dtype = DTYPES[config.store_dtype] if config.store_dtype else default
    layers = [point.layer for point in points]
    read: list[ActivationBatch | None] = []
    if resume and (folder / MANIFEST).exists():
        stored = {"layers": layers, "dtype": str(store_dtype).removeprefix("torch.")}
        writer, cursor = ShardWriter.resume(folder)
        check_same_run(writer.manifest, {**facts, **stored}, folder)
        if writer.complete:
            return writer.manifest
        if cursor:
            stream.load_state_dict(cursor)
    else:
        # Text that cannot be read shows here, and leaves nothing behind.
        read.append(stream.next_batch())
        writer = ShardWriter(
            folder,
            layers=layers,
            sites=[config.site],
            d_model=lm.d_model,
            dtype=store_dtype,
            shard_tokens=config.shard_tokens,
            facts=facts,
        )
    done = writer.tokens
    started = time.monotonic()
    progress("harvest", done, config.tokens, "tokens")
    with stop_requests() as stop:
        while done < config.tokens:
            batch = read.pop() if read else stream.next_batch()
            if batch is None:
                warn(
                    f"the corpus ended after {done} of {config.tokens} --tokens: give more --data "
                    "or --epochs"
                )
                break
            fresh = min(len(batch.token_ids), config.tokens - done)
            writer.add(
                {key: rows[:fresh] for key, rows in batch.activations.items()},
                batch.token_ids[:fresh],
                cursor=stream.state_dict(),
            )
            done += fresh
            progress("harvest", done, config.tokens, "tokens")
            if stop() and done < config.tokens:
                writer.checkpoint()
                raise Interrupted(
                    f"stopped after {done} of {config.tokens} tokens, which are in {folder}: run "
                    "the same command with --resume to go on"
                )
    seconds = time.monotonic() - started
    writer.close({"excluded": stream.excluded, "seconds": round(seconds, 3)})
    return writer.manifest


def _facts(
    lm: LanguageModel, points: Sequence[HookPoint], config: HarvestConfig, stream: ActivationStream
) -> dict[str, Any]:
    """What a manifest says about where its activations came from."""
    return {
        "model": model_facts(lm),
        "hook_names": [point.name for point in points],
        "hf_hook_names": [point.module_path for point in points],
        "prepend_bos": stream.prepend_bos,
        "data": stream.identity(),
        "config": plain({**asdict(config.text), "site": config.site, "tokens": config.tokens}),
        "versions": versions(),
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run whose settings, text or model differ from the ones before.

    Compares `config` key by key, then `layers`, `dtype`, `data` and the model's weights and dtype,
    as far as `now` has them. Raises UserError naming the first flag that differs.
    """
    old, new = dict(before.get("config") or {}), plain(now.get("config") or {})
    for key in ("layers", "dtype"):
        if key in now:
            old[key], new[key] = before.get(key), plain(now[key])
    flags = {"layers": "--layer", "dtype": "--store-dtype"}
    for key, value in new.items():
        if old.get(key) != value:
            flag = flags.get(key, "--" + key.replace("_", "-"))
            raise UserError(
                f"--resume: {folder} was made with {flag} {old.get(key)}, now it is {value}: give "
                "the flags of the first run, or another --out"
            )
    first, second = before.get("model") or {}, now["model"]
    for key in ("hash", "dtype"):
        if first.get(key) != second.get(key):
            raise UserError(
                f"--resume: {folder} was made with a --model of {key} {first.get(key)}, now it is "
                f"{second.get(key)}: give the model of the first run, or another --out"
            )
    if before.get("data") != plain(now["data"]):
        raise UserError(
            f"--resume: {folder} was made from other text or replies than those there now: restore "
            "them, or give another --out"
        )


def model_facts(lm: LanguageModel) -> dict[str, Any]:
    """A model's identity as it is written into manifests, SAEs, plans and runs."""
    return {
        "name": lm.name,
        "hash": lm.fingerprint,
        "n_layers": lm.n_layers,
        "d_model": lm.d_model,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }
