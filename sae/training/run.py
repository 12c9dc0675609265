"""A training run: batches in, steps taken, states saved, SAEs out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.disk import folder_bytes, need_space
from saesteer.checkpoints.errors import Interrupted, NonFiniteError, UserError
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.run_state import has_state, restoring
from saesteer.checkpoints.sparse_autoencoder import SAE
from saesteer.checkpoints.state_saver import StateSaver
from saesteer.sae.activations.batches import ActivationSource, BatchStream
from saesteer.sae.activations.prefetch import BATCHES_AHEAD, Prefetch
from saesteer.sae.config import Progress, TrainConfig
from saesteer.sae.runs.disk_use import train_footprint
from saesteer.sae.runs.memory_use import gigabytes, refuse_what_cannot_fit, training_memory
from saesteer.sae.runs.stopping import stop_requests
from saesteer.sae.training.held_out import (
    few_rows,
    figures,
    missed,
    read_held_out,
    too_few_rows,
    wanted_rows,
)
from saesteer.sae.training.init_from import start_from
from saesteer.sae.training.input_scale import InputScale, PlacedRows, check_sample
from saesteer.sae.training.run_files import RunFiles
from saesteer.sae.training.sae_trainer import SAETrainer, Variant
from saesteer.sae.training.saved_state import restore, state_of
from saesteer.sae.training.stopwatch import Stopwatch

_LOGS_PER_RUN = 100
# Rows that mean and scale are measured on; more would not change the third digit.
_SCALE_ROWS = 32_768


class TrainingRun:
    """Several SAEs trained on one stream of batches. Read `fit`, then `train_step`."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        variants: list[Variant],
        source: ActivationSource,
        facts: dict[str, Any],
        widths: Mapping[Place, int],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`facts`: what the run is recorded with; `widths`: of the source's places; `dtype`: of the
        rows in the shuffle buffer; `warn`: called with a line about activations that are not as
        they should be."""
        self.warn = warn
        self.folder = folder
        self.config = config
        self.variants = variants
        self.facts = facts
        self.widths = widths
        self.device = device
        self.progress = progress
        self.source = source
        self.dtype = dtype
        self.files = RunFiles(folder, variants, config, facts)
        self.columns = PlacedRows.columns_of(source.places, widths)
        self.width = sum(widths[place] for place in source.places)
        self.batches = BatchStream(
            source,
            self.width,
            tokens=config.tokens,
            batch_tokens=config.batch_tokens,
            buffer_tokens=config.buffer_tokens,
            dtype=dtype,
            seed=config.seed,
            filling=lambda filled, total: progress("fill buffer", filled, total, "tokens"),
        )
        self.trainers: list[SAETrainer] = []
        self.saver = StateSaver(folder, keep=config.keep_states)
        self.step = 0
        self.extended: list[dict[str, int]] = []
        """Where the run was given more `tokens` than before, and how many those were."""
        self.seconds = 0.0
        self.last: list[dict[str, Any]] = [{} for _ in variants]
        """The latest log line of each SAE."""
        self._due = False
        self.start: SAE | None = None
        """What a new run of one SAE starts from, in place of random weights."""

    # --- preparation ---

    def parameter_counts(self) -> list[int]:
        """Numbers that the optimiser moves, of each SAE."""
        return [
            variant.architecture.parameter_count(
                sum(self.widths[place] for place in variant.reads),
                sum(self.widths[place] for place in variant.writes),
                variant.d_sae,
            )
            for variant in self.variants
        ]

    def check_memory(self) -> str:
        """The memory that training needs, in one line. Raises UserError when there is less."""
        need = training_memory(
            self.parameter_counts(),
            max(variant.d_sae for variant in self.variants),
            self.width,
            self.config,
            self.device,
            buffer_tokens=self.batches.buffer_tokens,
            row_bytes=self.width * self.dtype.itemsize,
            batches_ahead=BATCHES_AHEAD,
        )
        count = len(self.variants)
        refuse_what_cannot_fit(need, count, self.device)
        return (
            f"memory: {gigabytes(need.buffer)} for a shuffle buffer of "
            f"{self.batches.buffer_tokens:,} tokens, {gigabytes(need.saes + need.step)} for "
            f"{count} SAE{'s' if count > 1 else ''}"
        )

    def check_disk(self) -> None:
        """Raise UserError when the disk has too little space; the folder's files count as free."""
        rows = self.batches.buffer.rows
        footprint = train_footprint(
            self.parameter_counts(),
            [variant.d_sae for variant in self.variants],
            self.width,
            buffer_tokens=len(rows),
            batch_tokens=self.config.batch_tokens,
            width=rows.shape[1],
            element_bytes=rows.element_size(),
            keep=self.config.keep_states,
        )
        needed = footprint.total_bytes - folder_bytes(self.folder)
        todo = "lower `buffer_tokens`, `d_sae` or `keep_states`"
        need_space(self.folder, needed, "training writes", todo)

    def begin(self) -> None:
        """Fill the buffer, measure the scales, start the SAEs and their records.

        Raises UserError for activations that nothing can be learnt from.
        """
        sample = PlacedRows(self.batches.fill()[:_SCALE_ROWS], self.columns)
        sinks, drawn = self.source.excluded.get("sinks", 0), self.batches.drawn
        told = [
            line
            for place in self.columns
            for line in check_sample(sample.at(place), place, sinks, drawn)
        ]
        for line in dict.fromkeys(told):
            self.warn(line)
        self.make_trainers({place: InputScale.of(sample.at(place)) for place in self.columns})
        if self.start is not None:
            (trainer,), (place,) = self.trainers, self.variants[0].reads
            start_from(self.start, trainer, sample.at(place))
        self.files.begin()

    def make_trainers(self, scales: dict[Place, InputScale]) -> None:
        """One trainer per variant."""
        self.trainers = [
            SAETrainer(variant, self.config, scales, self.device) for variant in self.variants
        ]
        self.files.make_folders()

    def resume(self) -> str | None:
        """Go on from the saved state where there is one; what to say of a run made longer."""
        if not has_state(self.folder):
            return None
        with restoring(self.folder):
            restore(self)
        if not self.extended or self.step >= self.config.steps:
            return None
        self.files.reopen()
        return (
            f"goes on from step {self.step} to {self.config.steps}: the learning rate follows the "
            "longer run, and falls to zero at its end"
        )

    # --- the loop ---

    def fit(self) -> list[dict[str, Any]]:
        """Train to the end and write the SAEs; returns their `run.json`."""
        if not self.trainers:
            self.begin()
        if self.step == 0:
            rows = min(self.config.tokens, self.facts.get("rows", self.config.tokens))
            for told in dict.fromkeys(too_few_rows(trainer, rows) for trainer in self.trainers):
                if told is not None:
                    self.warn(told)
        steps = self.config.steps
        log_every = max(1, steps // _LOGS_PER_RUN)
        with (
            stop_requests() as stop,
            self.saver,
            Prefetch(self.batches, self.device) as self.prefetch,
        ):
            watch = Stopwatch(self.prefetch)
            self.show()
            while self.step < steps:
                batch = self.next_batch()
                watch.got_batch()
                self.train_step(batch)
                self.step += 1
                watch.stepped(self.config.batch_tokens)
                if self.step % log_every == 0 or self.step == steps:
                    self.log(watch)
                self.show()
                if stop() and self.step < steps:
                    self.stop()
                self.save_when_due()
            self.hold_out()
            self.save()
            return self.finish()

    def next_batch(self) -> Float[Tensor, "batch width"]:
        """The next batch. Saves the state and raises UserError when the text has ended."""
        try:
            batch = self.prefetch.next_batch()
        except UserError as error:
            # Most often the corpus has ended: save the state, so that no training is lost.
            self.save(now=True)
            raise type(error)(
                f"{error}; the state is in {self.folder}: `resume` goes on from step "
                f"{self.step}, with more `epochs` too"
            ) from error
        assert batch is not None, "the stream holds exactly `steps` batches"
        return batch

    def train_step(self, batch: Float[Tensor, "batch width"]) -> None:
        """One step of every SAE. When NonFiniteError is raised, no parameter has changed."""
        rows = PlacedRows(batch, self.columns)
        try:
            passes = [trainer.forward(rows) for trainer in self.trainers]
        except NonFiniteError:
            # With the batch returned, the saved state is the one before it.
            self.prefetch.put_back(batch)
            self.save(now=True)
            raise
        for trainer, own_passes in zip(self.trainers, passes, strict=True):
            trainer.step(own_passes)

    def hold_out(self) -> None:
        """After the last step: SAEs that infer by what is measured measure it, and all are judged,
        on rows that were not trained on."""
        waiting = [i for i, last in enumerate(self.last) if "held_out_rows" not in last]
        if not waiting:
            return
        wanted = wanted_rows(self.config)

        def show(rows: int) -> None:
            self.progress("held out", rows, wanted, "tokens")

        with self.prefetch.paused():  # nobody else reads from the source meanwhile
            show(0)
            rows, why = read_held_out(self.source, wanted, show)
            show(wanted)
            judged = rows is not None
            if rows is None and any(self.trainers[i].architecture.calibrates for i in waiting):
                # Better than no rows: those that come next, which were trained on before.
                rows = self.batches.rows_after(wanted)
        if not judged:
            self.warn(f"no held-out rows to measure the SAE on: {why}")
        for i in waiting:
            trainer = self.trainers[i]
            self.last[i]["held_out_rows"] = 0 if rows is None else len(rows)
            if rows is None or not len(rows):
                continue
            placed = PlacedRows(rows.to(self.dtype), self.columns)
            if trainer.architecture.calibrates:
                self.last[i] |= trainer.calibrate(placed)
            if judged:
                self._judge(i, placed)

    def _judge(self, i: int, rows: PlacedRows) -> None:
        """Measure an SAE on rows that it was not trained on."""
        trainer = self.trainers[i]
        trainer.check_finite()
        found = figures(trainer, rows, self.facts)
        self.last[i] |= found
        trained_on = min(self.batches.total, self.facts.get("rows", self.batches.total))
        told = few_rows(trainer, trained_on, self.last[i]["fvu"], found)
        target = trainer.architecture.settings.get("l0_target")
        for line in (told, missed(trainer.variant.folder, target, found)):
            if line is not None:
                self.warn(line)
                self.last[i].setdefault("warnings", []).append(line)

    # --- logging and saving ---

    def log(self, watch: Stopwatch) -> None:
        """One line per SAE in its metrics.jsonl."""
        tokens = self.step * self.config.batch_tokens
        speed = watch.take()
        self.seconds += speed.pop("seconds")
        for i, trainer in enumerate(self.trainers):
            self.last[i] = {"step": self.step, "tokens": tokens, **trainer.take_log(), **speed}
            self.files.log(trainer.variant, self.last[i])

    def show(self) -> None:
        """Report how far training is, with the FVU of the latest log line."""
        last = self.last[0]
        note = f"tokens, FVU {last['fvu']:.3f}" if last else "tokens"
        tokens = self.step * self.config.batch_tokens
        self.progress("train", tokens, self.batches.total, note)

    def stop(self) -> None:
        """Save, and raise Interrupted."""
        self.save(now=True)
        raise Interrupted(
            f"stopped at step {self.step} of {self.config.steps}; the state is in {self.folder}: "
            "run the same command with `resume` to go on"
        )

    def save_when_due(self) -> None:
        """Save every `checkpoint_every` tokens, as soon as the state before is written."""
        every = max(1, self.config.checkpoint_every // self.config.batch_tokens)
        self._due = self._due or self.step % every == 0
        if self._due and self.step < self.config.steps and self.saver.ready():
            self.save()
            self._due = False

    def save(self, *, now: bool = False) -> None:
        """Save all that `resume` needs: in the background, or with `now` before returning.

        When a step on a GPU was left out for its loss, raises NonFiniteError and keeps the state
        before.
        """
        for trainer in self.trainers:
            trainer.check_finite()
        with self.prefetch.paused() as (tensors, stream):
            state, meta, logs = state_of(self, tensors, stream)
            known = [last["fvu"] for last in self.last if last]
            score = sum(known) / len(known) if known else None
            write = self.saver.save_now if now else self.saver.save
            write(state, meta, score=score, first=logs)

    def finish(self) -> list[dict[str, Any]]:
        """Write each SAE with its run.json."""
        # The last state is still being written: wait for it before any run.json says `complete`.
        hashes = [t.save(self.files.place_of(t.variant), self.facts) for t in self.trainers]
        self.saver.wait()
        return self.files.finish(
            self.trainers,
            hashes,
            self.last,
            {
                "excluded": self.source.excluded,
                **({"extended": self.extended} if self.extended else {}),
                "seconds": round(self.seconds, 3),
                "seconds_blocked_in_saving": round(self.saver.blocked_seconds, 3),
            },
        )
