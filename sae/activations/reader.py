"""A corpus through a language model: the activations of its text, attention sinks left out."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UsageError, UserError
from saesteer.checkpoints.places import Place
from saesteer.sae.activations.sinks import NotFinite, SinkFilter
from saesteer.sae.config import Progress, TextConfig, no_progress
from saesteer.sae.model.compiled_blocks import CompiledBlocks
from saesteer.sae.model.forward_pass import ForwardPass, model_inputs
from saesteer.sae.model.hooks import HookPoint, run_to
from saesteer.sae.model.isolation import prove_isolation
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs.memory_use import keep_pages
from saesteer.sae.runs.processes import ALONE, Processes
from saesteer.sae.text.contexts import ContextBatch, Contexts, open_contexts
from saesteer.sae.text.replies import ReplyConfig, sample_replies


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """Kept activations of one forward pass, by `HookPoint.key`, and the tokens they stand on; all
    of it on the CPU."""

    activations: dict[Place, Float[Tensor, "tokens d_model"]]
    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    """0-based places in the context."""
    contexts: Int[Tensor, " tokens"]
    """Numbers of the contexts, counted from 0 over the whole corpus."""
    kept: Int[Tensor, " contexts"]
    """Rows of each context that was read, those of other processes included, in order."""
    source: ContextBatch
    """What was read."""
    keep: Bool[Tensor, "source_contexts seq"]
    """Which of it was kept."""

    def first(self, rows: int) -> "ActivationBatch":
        """The first `rows` rows."""
        return replace(
            self,
            activations={place: values[:rows] for place, values in self.activations.items()},
            token_ids=self.token_ids[:rows],
            positions=self.positions[:rows],
            contexts=self.contexts[:rows],
        )


class ActivationStream:
    """Contexts in, kept activations out, one batch of contexts per forward pass.

    With several processes each reads its share of the contexts, and all of them must ask for the
    same number of batches: medians and counts are exchanged.
    """

    def __init__(
        self,
        lm: LanguageModel,
        points: Sequence[HookPoint],
        contexts: Contexts,
        config: TextConfig,
        processes: Processes = ALONE,
    ) -> None:
        if not config.batch_size:
            raise ValueError("an automatic batch size must be resolved before the stream opens")
        if lm.device.type == "cpu":
            keep_pages()
        self.lm = lm
        self.points = list(points)
        self.contexts = contexts
        self.config = config
        self.processes = processes
        self.sinks = SinkFilter(config.max_norm_ratio)
        self.excluded = {"special": 0, "template": 0, "sinks": 0}
        self.batches = 0
        self.reads_ahead = lm.device.type == "cuda"
        """Whether the next pass is started before the rows of this one are selected: on a device
        that computes while the CPU does something else."""
        self._blocks = CompiledBlocks(lm, points) if config.compile else contextlib.nullcontext()
        self._position = contexts.state_dict()
        self._begun: _Begun | Exception | None = None

    def __iter__(self) -> Iterator[ActivationBatch]:
        while (batch := self.next_batch()) is not None:
            yield batch

    def next_batch(self) -> ActivationBatch | None:
        """Run the next contexts through the model; None when the text has ended.

        Raises NonFiniteError naming the batch, and whatever the text or the model raises. After an
        error the stream is back at its position before the batch.
        """
        before = self.state_dict()
        try:
            return self._next_batch()
        except Exception:
            self.load_state_dict(before)  # the next call gets this batch again
            raise

    def _next_batch(self) -> ActivationBatch | None:
        with torch.inference_mode():
            begun = self.processes.together(self._take)
            if begun is None:
                return None
            contexts, forward, after = begun
            if self.reads_ahead:
                try:
                    self._begun = self._begin()
                except Exception as error:
                    self._begun = error  # it belongs to the next batch
            keep = self._keep(contexts, forward.norms())
            rows = forward.rows(keep.flatten().nonzero()[:, 0])
        own = keep.sum(dim=1)
        special = torch.isin(contexts.token_ids, self.lm.special_ids)
        self.excluded["special"] += int(special.sum())
        self.excluded["template"] += int((~contexts.keep & ~special).sum())
        self.excluded["sinks"] += int((contexts.keep & ~keep).sum())
        self.batches += 1
        self._position = after
        row_of, position = keep.nonzero(as_tuple=True)
        return ActivationBatch(
            rows,
            contexts.token_ids[keep].to(torch.int32),
            position.to(torch.int32),
            contexts.numbers[row_of],
            self.processes.interleave(own, self.config.batch_size, fill=0),
            contexts,
            keep,
        )

    def _take(self) -> "_Begun | None":
        """The pass already started, or a new one; None when the text has ended."""
        begun, self._begun = self._begun, None
        if isinstance(begun, Exception):
            raise begun
        return self._begin() if begun is None else begun

    def _begin(self) -> "_Begun | None":
        """Read the next contexts and start their pass."""
        contexts = self.contexts.next_batch(self.config.batch_size)
        if contexts is None:
            return None
        after = self.contexts.state_dict()
        with self._blocks:
            inputs = model_inputs(self.lm, contexts, self.config.isolate_documents)
            return contexts, ForwardPass.begin(self.lm, self.points, inputs), after

    def _keep(
        self,
        contexts: ContextBatch,
        norms: Float[Tensor, "places contexts seq"],
    ) -> Bool[Tensor, "contexts seq"]:
        """True for text that is not a sink, by limits that all processes share."""
        try:
            return self.sinks.keep_contexts(
                norms,
                contexts.keep,
                [point.key for point in self.points],
                processes=self.processes,
                most=self.config.batch_size,
            )
        except NotFinite as error:
            raise NonFiniteError(
                f"{self.lm.name} gave NaN or infinite activations at layer {error.place[0]} in "
                f"batch {self.batches}: try `dtype` float32, or look at the text there"
            ) from None

    def held_out(self) -> "ActivationStream | None":
        """A stream of the activations of text that this one has not read; None where there is none.

        Sinks are judged by the medians so far.
        """
        contexts = self.contexts.held_out()
        if contexts is None:
            return None
        config = replace(self.config, compile=False)  # not worth compiling for
        stream = ActivationStream(self.lm, self.points, contexts, config, self.processes)
        stream.sinks.load_state_dict(self.sinks.state_dict())
        return stream

    @property
    def prepend_bos(self) -> bool:
        """Whether every context starts with the beginning-of-text token."""
        return self.contexts.prepend_bos

    def identity(self) -> list[dict[str, Any]]:
        """What text was read."""
        return self.contexts.identity()

    def has_read(self, state: dict[str, Any], identities: Any) -> bool:
        """Whether the text that had been read when `state_dict` was taken, of corpora that then had
        these identities, is the same now. What comes after it may have been mended since."""
        contexts = state.get("contexts")
        if not isinstance(contexts, dict) or not isinstance(identities, list):
            return False
        return self.contexts.has_read(contexts, identities)

    def compile(self) -> None:
        """Run one pass over made-up tokens, which compiles the blocks where that is asked.

        Raises UserError when that fails.
        """
        from torch._dynamo.exc import TorchDynamoException

        rows, context = self.config.batch_size, self.config.context
        ids = torch.zeros(rows, context, dtype=torch.long)
        # Two documents a context: with isolated documents most batches have a mask.
        owners = (torch.arange(context) >= context // 2).long().expand(rows, context)
        made_up = ContextBatch(ids, ids > 0, owners, torch.arange(rows))
        inputs = model_inputs(self.lm, made_up, self.config.isolate_documents)
        try:
            with torch.inference_mode(), self._blocks:
                run_to(self.lm, self.points, **inputs)
        except TorchDynamoException as error:
            needs = " (on a CPU it needs a C++ compiler such as g++)"
            # The first paragraph; hints for PyTorch's own developers follow.
            reason = " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
            raise UserError(
                f"`compile` does not work here{needs if self.lm.device.type == 'cpu' else ''}: "
                f"leave it out. PyTorch says: {reason[:200]}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """The position in the text, and running counts; JSON-ready."""
        return {
            "contexts": self._position,
            "sinks": self.sinks.state_dict(),
            "excluded": dict(self.excluded),
            "batches": self.batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; a pass already started is dropped."""
        self.contexts.load_state_dict(state["contexts"])
        self._position, self._begun = dict(state["contexts"]), None
        self.sinks.load_state_dict(state["sinks"])
        self.excluded, self.batches = dict(state["excluded"]), state["batches"]


_Begun = tuple[ContextBatch, ForwardPass, dict[str, Any]]
"""Contexts, their pass, and the position in the text after them."""


def open_activations(
    lm: LanguageModel,
    points: Sequence[HookPoint],
    config: TextConfig,
    *,
    replies: Sequence[str] = (),
    replies_folder: Path,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
    held_back: float = 0.0,
) -> ActivationStream:
    """The stream of activations of a `TextConfig`, with the model's replies sampled first.

    Args:
        points: hook points to read, each block once.
        replies: prompts that the model answers; prompts and replies join the corpus.
        replies_folder: where the replies are stored.
        held_back: share of the documents of repeated text that is left for `held_out`.

    Raises:
        UsageError: a block is named twice.
        UserError: the corpus or the replies cannot be used.
    """
    if len({point.key for point in points}) != len(points):
        named = ",".join(str(point.layer) for point in points)
        raise UsageError(f"`layer` names a block twice: {named}")
    replies_file = None
    if replies:
        settings = ReplyConfig(
            max_new_tokens=config.replies_tokens,
            temperature=config.replies_temperature,
            top_p=config.replies_top_p,
            seed=config.seed,
        )
        if processes.rank:
            processes.wait_for_first()  # the first samples them; the others read its file
        replies_file = sample_replies(lm, replies, replies_folder, settings, progress)
        if not processes.rank:
            processes.wait_for_first()
    if config.isolate_documents:
        prove_isolation(lm)
    contexts = open_contexts(lm, config, replies_file, processes, held_back)
    stream = ActivationStream(lm, points, contexts, config, processes)
    if config.compile:
        progress("compile", 0, 1, "model")
        stream.compile()
        progress("compile", 1, 1, "model")
    return stream
