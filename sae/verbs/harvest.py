"""`harvest`: runs text through a language model once and writes its activations to shards."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints import files
from saesteer.checkpoints.background import BackgroundWriter
from saesteer.checkpoints.disk import folder_bytes, need_space
from saesteer.checkpoints.errors import Interrupted, UserError
from saesteer.checkpoints.files import claim_output, plain
from saesteer.checkpoints.locks import folder_lock
from saesteer.checkpoints.provenance import git_revision, machine, versions
from saesteer.checkpoints.shard_writer import ShardWriter, merge_parts, part_manifest
from saesteer.checkpoints.shards import MANIFEST
from saesteer.sae.activations.reader import ActivationBatch, ActivationStream, open_activations
from saesteer.sae.config import HarvestConfig, Progress, TextConfig
from saesteer.sae.model.hooks import HookPoint, keep_only_read, resolve_site
from saesteer.sae.model.language_model import DTYPES, LanguageModel, as_language_model
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.runs.disk_use import harvest_row_bytes, stored_dtype
from saesteer.sae.runs.facts import as_given, check_same_run, model_facts
from saesteer.sae.runs.memory_use import peak_bytes, resolved_text
from saesteer.sae.runs.processes import Processes, join_processes
from saesteer.sae.runs.stopping import stop_requests


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
    consume_model: bool = False,
    progress: Progress = show_progress,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run text through a model once and write the activations of some layers to shards.

    Under torchrun every process calls this: context i is read by process i mod world, each writes
    shards of its own into `out`, and one manifest lists them all.

    Args:
        model: a name, folder or `.gguf` file, or a loaded `LanguageModel`.
        out: folder for `manifest.json` and the shards.
        replies: user texts that the model answers first; prompts and replies join the corpus
            with the share `config.text.replies_share`.
        replies_folder: where replies are kept; by default the cache folder.
        resume: continue after the last whole shard of an interrupted harvest.
        consume_model: free the weights of `model` that are not needed (later blocks, the output
            embedding); it can do nothing else afterwards. A model given by name always is freed.
        warn: called with one line when the corpus ends before `config.tokens`.

    Returns:
        The manifest that was written.

    Raises:
        UserError: the text, the model or the folder cannot be used, another process writes to it,
        or its disk has too little room; the message says why.
        Interrupted: after Ctrl-C, with the tokens so far written.
    """
    from saesteer.checkpoints.model_files import cache_folder

    folder = Path(out).expanduser()
    processes = join_processes(config.rank_timeout)
    # One process of torchrun holds the folder for all of them.
    with contextlib.nullcontext() if processes.rank else folder_lock(folder):
        if (resume or not force) and not processes.rank:
            claim_output(folder, resume=resume, force=force, can_resume=True)
        lm = as_language_model(model, device=device, dtype=dtype)
        points = [resolve_site(lm, layer, config.site) for layer in config.layers]
        before = _batch_size_before(folder) if resume else None
        config = replace(config, text=resolved_text(lm, config.text, before, processes))
        stream = open_activations(
            lm,
            points,
            config.text,
            replies=replies,
            replies_folder=replies_folder or cache_folder() / "replies",
            progress=progress,
            processes=processes,
        )
        processes.same("text, model or settings", repr((stream.identity(), lm.fingerprint, config)))
        if not processes.rank:
            _check_disk(folder, config, lm, len(points))
        if force and not processes.rank:
            # Only now, when model and text were found: this empties the folder.
            claim_output(folder, force=True)
        processes.wait_for_first()
        recipe = {
            "model": as_given(lm.name),
            "blocks": lm.blocks_path,
            "replies": list(replies),
            "device": str(lm.device),
            "lm_dtype": str(lm.dtype).removeprefix("torch."),
        }
        job = _Job(folder, config, lm, points, stream, processes, recipe, progress, warn)
        finished = job.open(resume)
        if finished is not None:
            return finished
        if consume_model or not isinstance(model, LanguageModel):
            keep_only_read(lm, points)
        return job.run()


class _Job:
    """One harvest: a stream, a writer, and how far it has come."""

    def __init__(
        self,
        folder: Path,
        config: HarvestConfig,
        lm: LanguageModel,
        points: Sequence[HookPoint],
        stream: ActivationStream,
        processes: Processes,
        recipe: Mapping[str, Any],
        progress: Progress,
        warn: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.config = config
        self.lm = lm
        self.points = points
        self.stream = stream
        self.processes = processes
        self.recipe = recipe
        """What `reproduce` needs in addition to the config."""
        self.progress = progress
        self.warn = warn
        self.stored = 0
        """Rows stored by all processes together."""
        self.waiting = [0] * processes.world
        """Rows of each process since its last shard."""
        self._first: list[ActivationBatch | None] = []

    def open(self, resume: bool) -> dict[str, Any] | None:
        """Start new shards, or continue those in the folder.

        Returns the manifest when nothing is left to do, else None.
        """
        dtype = _stored_dtype(self.config, self.lm)
        layers = [point.layer for point in self.points]
        facts = _facts(self.lm, self.points, self.config, self.stream, self.recipe)
        part = (self.processes.rank, self.processes.world)
        if resume and (self.folder / MANIFEST).exists():
            shared = files.read_json(self.folder / MANIFEST)
            stored = {"layers": layers, "dtype": str(dtype).removeprefix("torch.")}
            check_same_run(
                shared,
                {**facts, **stored},
                self.folder,
                asdict(TextConfig()),
                read_the_same=lambda: (
                    not shared.get("complete")
                    and self.stream.has_read(shared.get("cursor") or {}, shared.get("data"))
                ),
            )
            if shared.get("complete"):
                return dict(shared)
            if shared.get("processes", 1) != self.processes.world:
                raise UserError(
                    f"`resume`: {self.folder} was begun with {shared.get('processes', 1)} "
                    f"processes, now there are {self.processes.world}: start as many, or give "
                    "another `out`"
                )
        if resume and self._on_all((self.folder / part_manifest(part)).exists()):
            self.writer, cursor = ShardWriter.resume(self.folder, part=part)
            self.writer.manifest["data"] = facts["data"]  # text that is read later may be mended
            if self.processes.world > 1:
                cursor = self._common_place(cursor)
            self._continue(cursor)
            return None
        # Unreadable text raises here, before anything is written.
        self._first.append(self.stream.next_batch())
        options: dict[str, Any] = {
            "layers": layers,
            "sites": [self.config.site],
            "d_model": self.lm.d_model,
            "dtype": dtype,
            # Several processes end their shards together: see _store.
            "shard_tokens": self.config.shard_tokens if self.processes.world == 1 else 1 << 60,
            "shuffle_seed": self.config.text.seed if self.config.shuffle else None,
        }
        if self.processes.world > 1 and not self.processes.rank:
            # Until the parts are merged, this manifest says what the folder is.
            ShardWriter(self.folder, facts={**facts, "processes": self.processes.world}, **options)
        self.processes.wait_for_first()
        self.writer = ShardWriter(self.folder, facts=facts, part=part, **options)
        return None

    def _on_all(self, here: bool) -> bool:
        """Whether something is true in every process."""
        return all(bool(answer) for answer in self.processes.gather(torch.tensor([here])))

    def _common_place(self, cursor: dict[str, Any]) -> dict[str, Any]:
        """The last place that every process has saved."""
        own = self.writer.rounds("batches")
        longest = max(int(n) for n in self.processes.gather(torch.tensor([len(own)])))
        padded = torch.tensor(own + [0] * (longest - len(own)))
        saved = [set(rounds.tolist()) for rounds in self.processes.gather(padded)]
        common = max(set.intersection(*saved))
        return self.writer.go_back("batches", common) if own[-1] != common else cursor

    def _continue(self, cursor: dict[str, Any]) -> None:
        """Continue at a cursor; `{}` is the start."""
        if cursor:
            self.stream.load_state_dict(cursor)
        self.stored = int(sum(self.processes.gather(torch.tensor([self.writer.tokens]))))

    def run(self) -> dict[str, Any]:
        """Read the text to its end or the wanted tokens, store the rows; returns the manifest."""
        total = self.config.tokens
        started = time.monotonic()
        self.progress("harvest", self.stored, total, "tokens")
        with (
            stop_requests() as stop,
            BackgroundWriter(self.writer, self.config.shard_tokens) as writer,
        ):
            while self.stored < total:
                batch = self._first.pop() if self._first else self.stream.next_batch()
                if batch is None:
                    self.warn(
                        f"the corpus ended after {self.stored} of {total} `tokens`: give more "
                        "`data` or `epochs`"
                    )
                    break
                self._store(writer, batch)
                self.progress("harvest", self.stored, total, "tokens")
                if self._on_any(stop()) and self.stored < total:
                    writer.checkpoint()
                    raise Interrupted(
                        f"stopped after {self.stored} of {total} tokens, which are in "
                        f"{self.folder}: run the same command with `resume` to go on"
                    )
            extra = {
                "excluded": self._sum(self.stream.excluded),
                "skipped_rows": self.stream.contexts.skipped_rows,
                "seconds": round(time.monotonic() - started, 3),
                "peak_memory_bytes": peak_bytes(),
            }
            if extra["skipped_rows"]:
                self.warn(f"{extra['skipped_rows']} rows of `data` hold no text (null)")
            writer.close(extra)
        return self._merged(extra)

    def _store(self, writer: BackgroundWriter, batch: ActivationBatch) -> None:
        """Give the writer this process's share of the rows that are still wanted.

        Rows are counted in the order of the contexts of all processes, so that the stored rows do
        not depend on the number of processes.
        """
        rank, world = self.processes.rank, self.processes.world
        left = self.config.tokens - self.stored
        before = batch.kept.cumsum(0) - batch.kept
        fresh = (left - before).clamp(min=0).minimum(batch.kept)
        self.stored += int(fresh.sum())
        batch = batch.first(int(fresh[rank::world].sum()))
        columns = {"positions": batch.positions, "contexts": batch.contexts}
        cursor = self.stream.state_dict()
        writer.add(
            batch.activations,
            batch.token_ids,
            cursor,
            columns if self.config.keep_positions else None,
        )
        if world > 1:
            # All processes end their shards after the same batch, so that each can resume there.
            self.waiting = [
                waiting + int(fresh[r::world].sum()) for r, waiting in enumerate(self.waiting)
            ]
            if max(self.waiting) >= self.config.shard_tokens:
                self.waiting = [0] * world
                writer.flush(cursor)

    def _on_any(self, here: bool) -> bool:
        """Whether something is true in at least one process."""
        return any(bool(answer) for answer in self.processes.gather(torch.tensor([here])))

    def _sum(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Counts added up over all processes."""
        gathered = self.processes.gather(torch.tensor(list(counts.values())))
        return dict(zip(counts, torch.stack(gathered).sum(dim=0).tolist(), strict=True))

    def _merged(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest of the whole harvest."""
        if self.processes.world == 1:
            return self.writer.manifest
        self.processes.wait_for_first()
        if not self.processes.rank:
            merge_parts(
                self.folder,
                self.processes.world,
                {**extra, "shard_tokens": self.config.shard_tokens},
            )
        self.processes.wait_for_first()
        return dict(files.read_json(self.folder / MANIFEST))


def _stored_dtype(config: HarvestConfig, lm: LanguageModel) -> torch.dtype:
    return DTYPES[stored_dtype(config.store_dtype, str(lm.dtype).removeprefix("torch."))]


def _check_disk(folder: Path, config: HarvestConfig, lm: LanguageModel, places: int) -> None:
    """Raise UserError when the shards would not fit on the disk. Files in the folder are kept or
    replaced, so they count as free space."""
    row = harvest_row_bytes(lm.d_model, _stored_dtype(config, lm).itemsize, config.keep_positions)
    needed = config.tokens * row * places - folder_bytes(folder)
    need_space(folder, needed, "harvesting writes", "lower `tokens` or give fewer layers")


def _batch_size_before(folder: Path) -> int | None:
    """The batch size of the harvest in `folder`, which an automatic one keeps, or None."""
    with contextlib.suppress(UserError, AttributeError):
        return (files.read_json(folder / MANIFEST).get("config") or {}).get("batch_size")
    return None


def _facts(
    lm: LanguageModel,
    points: Sequence[HookPoint],
    config: HarvestConfig,
    stream: ActivationStream,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """The part of a manifest that says where its activations come from."""
    return {
        "model": model_facts(lm),
        "hook_names": [point.name for point in points],
        "hf_hook_names": [point.module_path for point in points],
        "prepend_bos": stream.prepend_bos,
        "data": stream.identity(),
        "config": plain(
            {
                **asdict(config.text),
                "site": config.site,
                "tokens": config.tokens,
                "shuffle": config.shuffle,
                "keep_positions": config.keep_positions,
            }
        ),
        "recipe": recipe,
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": machine(),
    }
