"""A forward pass that is started now and whose activations are read later."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.places import Place
from saesteer.sae.activations.sinks import norms_of
from saesteer.sae.model.hooks import HookPoint, run_to
from saesteer.sae.model.isolation import prove_isolation
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.contexts import ContextBatch


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward pass that was started. On a GPU it may still be running while the caller does other
    things; on a CPU it has finished.
    """

    seen: dict[Place, Float[Tensor, "contexts seq d_model"]]
    """The activations at each hook point, on the model's device."""
    _norms: Float[Tensor, "places contexts seq"]
    _computed: torch.cuda.Event | None

    @classmethod
    def begin(
        cls, lm: LanguageModel, points: Sequence[HookPoint], inputs: dict[str, Tensor]
    ) -> "ForwardPass":
        """Start a pass up to the last of `points`; `inputs` may hold no rows at all.

        Raises UsageError for a hook point whose width is not that of the residual stream.
        """
        ids = inputs["input_ids"]
        if not len(ids):  # this process has no share of the last contexts
            empty = torch.empty(*ids.shape, lm.d_model, dtype=lm.dtype)
            seen = {point.key: empty for point in points}
        else:
            read = run_to(lm, points, **inputs)
            seen = {point.key: read[point.key] for point in points}
        for (_, site), values in seen.items():
            if values.shape[-1] != lm.d_model:
                raise UsageError(
                    f"`site` {site} has width {values.shape[-1]}, the residual stream of "
                    f"{lm.name} has {lm.d_model}: give a site of that width"
                )
        norms = norms_of(seen)
        on_host, computed = _to_host(norms), None
        if norms.is_cuda:
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(norms.device))
        return cls(seen, on_host, computed)

    def norms(self) -> Float[Tensor, "places contexts seq"]:
        """The length of every row, on the CPU; waits for this pass and no later one."""
        if self._computed is not None:
            self._computed.synchronize()
        return self._norms

    def rows(self, where: Int[Tensor, " kept"]) -> dict[Place, Float[Tensor, "kept d_model"]]:
        """The rows at these positions of all contexts joined end to end, on the CPU.

        Call `norms` first. Rows are selected and copied on a CUDA stream of their own, so that a
        pass that was started since is not interrupted.
        """
        picked = {}
        for place, values in self.seen.items():
            stream = _copy_stream(values.device) if values.is_cuda else None
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                kept = values.flatten(0, 1).index_select(0, where.to(values.device))
                picked[place] = _to_host(kept)
            if stream is not None:
                stream.synchronize()
        return picked


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream that copies rows to the CPU."""
    return torch.cuda.Stream(device)


def _to_host(values: Tensor) -> Tensor:
    """A CPU tensor as it is; for a GPU tensor a copy that may not be complete yet.

    PyTorch reuses freed page-locked memory, so that two batches alternate between two blocks.
    """
    if not values.is_cuda:
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def model_inputs(lm: LanguageModel, contexts: ContextBatch, isolated: bool) -> dict[str, Tensor]:
    """Arguments of the model, on its device; `isolated` keeps attention inside each document.

    Raises UserError for a model that does not keep them apart.
    """
    inputs = {"input_ids": _to_device(contexts.token_ids, lm.device)}
    if isolated:
        positions = document_positions(contexts.document_ids)
        # Without a document boundary in the batch no mask is needed.
        if bool((positions[:, -1] < positions.shape[1] - 1).any()):
            prove_isolation(lm)
            inputs["position_ids"] = _to_device(positions, lm.device)
    return inputs


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for a pass that may be running there."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def document_positions(
    document_ids: Int[Tensor, "rows context"],
) -> Int[Tensor, "rows context"]:
    """Positions that restart at 0 in every document, from which models derive their masks.

    The beginning-of-text token in front of a context belongs to its first document.
    """
    owners = document_ids.clone()
    if owners.shape[1] > 1:
        owners[:, 0] = torch.where(owners[:, 0] == -1, owners[:, 1], owners[:, 0])
    places = torch.arange(owners.shape[1]).expand_as(owners)
    starts = torch.zeros_like(places)
    starts[:, 1:] = places[:, 1:] * (owners[:, 1:] != owners[:, :-1])
    return places - starts.cummax(dim=1).values
