"""The residuals of the unsteered model at tokens of the prompts, from a pass before the others.

Edits that are relative to what the model would have without any edit need them: once the first
layers are steered, later ones no longer see the plain residual. The pass is made once for each
call, over its prompts alone, up to the last layer that is read. Every steering context leaves it
alone, also those that this one is nested in.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.places import Place
from saesteer.sae.model.hooks import HookPoint, StopForward, hooked
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.tracking.passes import Call, PassTokens, PlainRows


class _OfThread(threading.local):
    unsteered = False


_NOW = _OfThread()


def in_plain_pass() -> bool:
    """Whether this thread is in a pass that nothing may edit."""
    return _NOW.unsteered


@contextlib.contextmanager
def _unsteered() -> Iterator[None]:
    _NOW.unsteered = True
    try:
        yield
    finally:
        _NOW.unsteered = False


@dataclass(frozen=True, eq=False)
class PlainWanted:
    """Positions of each prompt whose plain residuals an edit asks for."""

    point: HookPoint
    spans: Callable[[Call], Sequence[tuple[int, int]]]
    """For a call, the positions [start, stop) of each of its rows; all of them in the prompt."""


def plain_at(tokens: PassTokens, place: Place) -> Float[Tensor, "batch seq d_model"]:
    """The plain residual of each token of a pass; what is not kept holds one of another token."""
    kept = tokens.call.plain[place]
    factor = tokens.call.factor(tokens.batch)
    first = kept.first.repeat_interleave(factor)[:, None]
    states = kept.states.repeat_interleave(factor, dim=0)
    index = (tokens.p - first).clamp(0, states.shape[1] - 1)
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))


def read_plain(
    lm: LanguageModel, call: Call, wanted: Sequence[PlainWanted], given: Mapping[str, Any]
) -> dict[Place, PlainRows]:
    """Run the prompts of a call unsteered and keep what is wanted.

    `given` are the arguments of the pass that is about to run. Raises UserError where the prompts
    are not all there: they came in pieces, or hold an image.
    """
    points: dict[Place, HookPoint] = {}
    spans: dict[Place, list[tuple[int, int]]] = {}
    for one in wanted:
        key = one.point.key
        rows = list(one.spans(call))
        if key in points:
            rows = [_hull(a, b) for a, b in zip(spans[key], rows, strict=True)]
        points[key], spans[key] = one.point, rows
    found: dict[Place, PlainRows] = {}
    columns: dict[Place, Int[Tensor, "rows positions"]] = {}
    # Row by row, the columns that hold tokens, before those that hold padding.
    order = torch.argsort((~call.real).int(), dim=1, stable=True)
    for key, rows in spans.items():
        _check_whole(lm, call, rows, given)
        first = torch.tensor([start for start, _ in rows], device=order.device)
        most = max(1, max(stop - start for start, stop in rows))
        steps = torch.arange(most, device=order.device)
        place = (first[:, None] + steps).clamp(max=order.shape[1] - 1)
        columns[key] = order.gather(1, place)
        found[key] = PlainRows(first, torch.empty(0))
    distinct, of_row = _distinct(call)
    needed = max(int(place.max()) for place in columns.values()) + 1

    def keep(key: Place) -> Callable[[Tensor], None]:
        def read(h: Float[Tensor, "rows columns d_model"]) -> None:
            states = h.detach()[of_row.to(h.device)[:, None], columns[key].to(h.device)].float()
            found[key] = PlainRows(found[key].first, states)
            if all(kept.states.numel() for kept in found.values()):
                raise StopForward

        return read

    with contextlib.ExitStack() as stack:
        stack.enter_context(_unsteered())
        # The states serve passes with gradients too.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for key, point in points.items():
            stack.enter_context(hooked(point, keep(key)))
        with contextlib.suppress(StopForward):
            inputs = _inputs(lm, call, needed, given)
            own = {name: value[distinct.to(value.device)] for name, value in inputs.items()}
            lm.text_model(**own, use_cache=False)
    for key, kept in found.items():
        if not kept.states.numel():
            raise UserError(
                f"`site` {points[key].site} of layer {key[0]} is not reached in a pass over the "
                "prompt: choose resid_post"
            )
    return found


def _distinct(call: Call) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " rows"]]:
    """Rows that differ, and for each row of the call which of them it equals.

    Several settings tried on one prompt are rows with the same plain states. Rows that are given
    as embeddings, or to the model directly, are not compared.
    """
    every = torch.arange(call.rows, device=call.real.device)
    if call.ids is None or not call.generating or call.ids.shape != call.real.shape:
        return every, every
    rows = torch.cat([call.ids.to(every.device), call.real.long()], dim=1)
    found, of_row = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(found),), call.rows, device=every.device)
    return first.scatter_reduce(0, of_row, every, "amin"), of_row


def _hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Both spans in one; an empty one adds nothing."""
    if a[0] >= a[1] or b[0] >= b[1]:
        return b if a[0] >= a[1] else a
    return min(a[0], b[0]), max(a[1], b[1])


def _check_whole(
    lm: LanguageModel,
    call: Call,
    rows: Sequence[tuple[int, int]],
    given: Mapping[str, Any],
) -> None:
    """Raise UserError unless the call began with every token that is wanted, as text."""
    tokens = call.embeds if call.ids is None else call.ids
    whole = tokens is not None and tokens.shape[1] == call.width
    if not whole or any(
        stop > length for (_, stop), length in zip(rows, call.lengths, strict=True)
    ):
        raise UserError(
            f"`method` set-to and `when` need the whole prompt in the first pass of {lm.name}, and "
            "it came in pieces or was run before steer(...): use generate, or give the prompt in "
            "one pass"
        )
    seen = [name for name in given if name.startswith(("pixel_", "image_", "input_features"))]
    if any(given[name] is not None for name in seen):
        raise UserError(
            f"`method` set-to and `when` read the prompt as text and {lm.name} was given "
            f"{seen[0]}: use `method` add for prompts with images or sound"
        )


def _inputs(
    lm: LanguageModel, call: Call, needed: int, given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The arguments of the plain pass: the first `needed` columns of the call."""
    tokens = call.embeds if call.ids is None else call.ids
    assert tokens is not None
    name = "inputs_embeds" if call.ids is None else "input_ids"
    inputs = {name: tokens[:, :needed], "attention_mask": call.real[:, :needed].long()}
    if "position_ids" not in inspect.signature(lm.text_model.forward).parameters:
        return inputs
    places = given.get("position_ids")
    if call.generating:
        # As `generate` counts: padding does not.
        counted = (call.real.cumsum(dim=1) - 1).clamp(min=0)
        inputs["position_ids"] = counted[:, :needed]
    elif isinstance(places, Tensor) and places.shape == call.real.shape:
        inputs["position_ids"] = places[:, :needed]
    return inputs
