"""Contexts through a language model, kept activations out."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UsageError
from saesteer.sae.config import Progress, TextConfig, no_progress
from saesteer.sae.hooks import HookPoint, run_to
from saesteer.sae.memory import keep_pages
from saesteer.sae.models import LanguageModel
from saesteer.sae.ranks import ALONE, Ranks
from saesteer.sae.replies import ReplyConfig, sample_replies
from saesteer.sae.sinks import NotFinite, SinkFilter, block_medians, norms_of
from saesteer.sae.text import ContextBatch, Contexts, open_contexts


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """Kept activations of one forward pass, by `HookPoint.key`, and the tokens they stand on."""

    activations: dict[tuple[int, str], Float[Tensor, "tokens d_model"]]
    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    """0-based places in the context."""
    contexts: Int[Tensor, " tokens"]
    """Numbers of the contexts, counted from 0 over the whole corpus."""
    kept: Int[Tensor, " contexts"]
    """Rows of each context that was read, those of other processes included, in order."""

    def first(self, rows: int) -> "ActivationBatch":
        """The first `rows` rows."""
        return ActivationBatch(
            {place: values[:rows] for place, values in self.activations.items()},
            self.token_ids[:rows],
            self.positions[:rows],
            self.contexts[:rows],
            self.kept,
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
        ranks: Ranks = ALONE,
    ) -> None:
        if not config.batch_size:
            raise ValueError("an automatic batch size must be resolved before the stream opens")
        if lm.device.type == "cpu":
            keep_pages()
        self.lm = lm
        self.points = list(points)
        self.contexts = contexts
        self.config = config
        self.ranks = ranks
        self.sinks = SinkFilter(config.max_norm_ratio)
        self.excluded = {"special": 0, "template": 0, "sinks": 0}
        self.batches = 0
        self._position = contexts.state_dict()
        self._ahead: tuple[ContextBatch | None, dict[str, Any]] | Exception | None = None

    def __iter__(self) -> Iterator[ActivationBatch]:
        while (batch := self.next_batch()) is not None:
            yield batch

    def next_batch(self) -> ActivationBatch | None:
        """Run the next contexts through the model; None when the text has ended.

        Raises NonFiniteError naming the batch; the stream then still stands before it.
        """
        contexts, after = self._read()
        if contexts is None:
            return None
        with torch.inference_mode():
            with self._reading_ahead():
                seen = self._run(contexts)
            keep = self._keep(contexts, norms_of(seen))
            where = keep.flatten().nonzero()[:, 0]
            rows = {
                key: values.flatten(0, 1).index_select(0, where.to(values.device))
                for key, values in seen.items()
            }
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
            self.ranks.interleave(own, self.config.batch_size, fill=0),
        )

    def _read(self) -> tuple[ContextBatch | None, dict[str, Any]]:
        """The next contexts and the place after them."""
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, Exception):
            raise ahead
        if ahead is not None:
            return ahead
        batch = self.contexts.next_batch(self.config.batch_size)
        return batch, self.contexts.state_dict()

    @contextlib.contextmanager
    def _reading_ahead(self) -> Iterator[None]:
        """Prepare the text of the next batch in a thread while this one is computed."""
        thread = threading.Thread(target=self._read_ahead, name="text of the next batch")
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _read_ahead(self) -> None:
        try:
            self._ahead = self._read()
        except Exception as error:
            self._ahead = error  # of the next batch, not of this one

    def _run(self, contexts: ContextBatch) -> dict[tuple[int, str], Tensor]:
        """What passes the hook points, `[contexts, seq, d_model]` each."""
        if not len(contexts.token_ids):  # this process has no share of the last contexts
            width = (*contexts.token_ids.shape, self.lm.d_model)
            return {point.key: torch.empty(width, dtype=self.lm.dtype) for point in self.points}
        inputs = model_inputs(self.lm, contexts, self.config.isolate_documents)
        seen = run_to(self.lm, self.points, **inputs)
        for (_, site), values in seen.items():
            if values.shape[-1] != self.lm.d_model:
                raise UsageError(
                    f"--site {site} has width {values.shape[-1]}, the residual stream of "
                    f"{self.lm.name} has {self.lm.d_model}: give a site of that width"
                )
        return {point.key: seen[point.key] for point in self.points}

    def _keep(
        self,
        contexts: ContextBatch,
        norms: Float[Tensor, "places contexts seq"],
    ) -> Bool[Tensor, "contexts seq"]:
        """Text that is no sink, by limits that all processes agree on."""
        places = [point.key for point in self.points]
        try:
            medians = block_medians(norms, contexts.keep, places)
        except NotFinite as error:
            self.contexts.load_state_dict(self._position)  # the batch is not lost
            self._ahead = None
            layer, _ = error.place
            raise NonFiniteError(
                f"{self.lm.name} gave NaN or infinite activations at layer {layer} in batch "
                f"{self.batches}: try --dtype float32, or look at the text there"
            ) from None
        size = self.config.batch_size
        everywhere = torch.stack([self.ranks.interleave(row, size, torch.nan) for row in medians])
        limits = self.sinks.limits(everywhere, places)[:, self.ranks.rank :: self.ranks.world]
        return contexts.keep & (norms <= limits[:, : len(contexts.keep), None]).all(dim=0)

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
            "contexts": self._position,
            "sinks": self.sinks.state_dict(),
            "excluded": dict(self.excluded),
            "batches": self.batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.contexts.load_state_dict(state["contexts"])
        self._position, self._ahead = dict(state["contexts"]), None
        self.sinks.load_state_dict(state["sinks"])
        self.excluded, self.batches = dict(state["excluded"]), state["batches"]


def model_inputs(lm: LanguageModel, contexts: ContextBatch, isolated: bool) -> dict[str, Tensor]:
    """What the model is called with, on its device; `isolated` keeps attention in each document."""
    inputs = {"input_ids": contexts.token_ids.to(lm.device)}
    if isolated:
        positions = document_positions(contexts.document_ids)
        # Without a boundary in the batch there is nothing to mask, and no mask to pay for.
        if bool((positions[:, -1] < positions.shape[1] - 1).any()):
            inputs["position_ids"] = positions.to(lm.device)
    return inputs


def document_positions(
    document_ids: Int[Tensor, "rows context"],
) -> Int[Tensor, "rows context"]:
    """Positions that start anew at every document; the models' masks follow them.

    The beginning-of-text token in front of a context belongs to its first document.
    """
    owners = document_ids.clone()
    if owners.shape[1] > 1:
        owners[:, 0] = torch.where(owners[:, 0] == -1, owners[:, 1], owners[:, 0])
    places = torch.arange(owners.shape[1]).expand_as(owners)
    starts = torch.zeros_like(places)
    starts[:, 1:] = places[:, 1:] * (owners[:, 1:] != owners[:, :-1])
    return places - starts.cummax(dim=1).values


def open_activations(
    lm: LanguageModel,
    points: Sequence[HookPoint],
    config: TextConfig,
    *,
    replies: Sequence[str] = (),
    replies_folder: Path,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> ActivationStream:
    """The stream of activations of a `TextConfig`, with the model's replies sampled first."""
    if len({point.key for point in points}) != len(points):
        named = ",".join(str(point.layer) for point in points)
        raise UsageError(f"--layer names a block twice: {named}")
    replies_file = None
    if replies:
        settings = ReplyConfig(seed=config.seed)
        if ranks.rank:
            ranks.wait_for_first()  # which samples them; the others find the file
        replies_file = sample_replies(lm, replies, replies_folder, settings, progress)
        if not ranks.rank:
            ranks.wait_for_first()
    contexts = open_contexts(lm, config, replies_file, ranks)
    return ActivationStream(lm, points, contexts, config, ranks)
