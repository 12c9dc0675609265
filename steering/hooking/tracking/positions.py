"""The positions of a forward pass's tokens in their rows, however the model is run.

A block sees a chunk of each row: the whole prompt, a piece of it, one new token, or everything
again when there is no cache. `PositionTracker` watches the model's inputs and says which absolute
position each token of the present pass has, counted in real tokens from the start of its row, and
how long the row's prompt is. Passes are never counted: chunked prefill, drafts that are rolled back
and cacheless decoding would all fool a count. What says where a pass lies (the cache, every layer
of it, the mask and the position ids) has to agree, or the pass is refused.
"""

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel, text_config, uncompiled
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.hooking.tracking.finite import FiniteOutput
from saesteer.steering.hooking.tracking.passes import (
    Call,
    PassTokens,
    cache_in,
    check_mask,
    check_position_ids,
    past_length,
    visible_keys,
)
from saesteer.steering.hooking.tracking.plain_pass import PlainWanted, in_plain_pass, read_plain
from saesteer.steering.hooking.tracking.taps import guided, steered_by_this_thread, tapped, unpacked


class _OfThread(threading.local):
    """What the passes of one thread have come to."""

    call: Call | None = None
    current: PassTokens | None = None
    generating = False
    left_alone = False
    """Drafts, and the negative prompt of guidance: passes that no row of the answer is made of."""
    inside_outer = False
    holds_lock = False


class PositionTracker:
    """Follows the forward passes of a model while `listening` is open.

    Threads may share it: calls of `generate`, and passes outside of them, wait for each other.

    Args:
        prompts: the prompts that will be run, in any order; rows are recognised by their tokens.
        prompt_lengths: P of each row, where it is not what the model is given first.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[EncodedPrompt] | None = None,
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        if getattr(lm.model.config, "is_encoder_decoder", False):
            raise UserError(
                f"`model` {lm.name} is an encoder-decoder; only decoder-only models can be steered"
            )
        self.passes = 0
        """Forward passes seen."""
        self.calls: list[Call] = []
        self._lm = lm
        self._now = _OfThread()
        self._running = threading.RLock()
        self._of_cache: weakref.WeakKeyDictionary[Any, tuple[Call, int]] = (
            weakref.WeakKeyDictionary()
        )
        """The call that a cache belongs to, and the columns that it holds."""
        self._finite = FiniteOutput(lm)
        self._lengths = None if prompt_lengths is None else list(prompt_lengths)
        self._known = {tuple(prompt.token_ids): prompt for prompt in prompts or ()}
        self._known_lengths = sorted({len(tokens) for tokens in self._known}, reverse=True)
        self.on_reorder: list[Callable[[Tensor], None]] = []
        """Called with the former row of each row when beams are reordered."""
        self.plain_wanted: list[PlainWanted] = []
        """What is read in a plain pass over the prompts before each call's first pass."""
        self._tapped_cache: Any = None

    @property
    def current(self) -> PassTokens | None:
        """The tokens of the pass that this thread is in; None in a plain pass."""
        return None if in_plain_pass() else self._now.current

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Watch the model's inputs; nothing is left on it afterwards."""
        with contextlib.ExitStack() as stack:
            outer, text = uncompiled(self._lm.model), self._lm.text_model
            stack.enter_context(steered_by_this_thread(outer, self._lm.name))
            if hasattr(outer, "generate"):
                stack.enter_context(tapped(outer, self._generate_call))
                stack.enter_context(unpacked(outer))
            # Code that was compiled before the hooks were there would never run them.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            handles = [
                outer.register_forward_pre_hook(self._on_outer, with_kwargs=True),
                outer.register_forward_hook(self._after_outer, always_call=True),
            ]
            if text is not outer:
                # The text model may be run alone (no logits), or through another wrapper.
                handles.append(text.register_forward_pre_hook(self._on_text, with_kwargs=True))
                handles.append(text.register_forward_hook(self._after_text, always_call=True))
            for handle in handles:
                stack.callback(handle.remove)
            stack.callback(self._watch_cache, None)
            yield
            self._finite.settle()

    def _on_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_plain_pass():
            return
        self._take_turn()
        self._now.inside_outer = True
        self._begin(module, args, kwargs)

    def _after_outer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if in_plain_pass():
            return
        self._now.inside_outer = False
        self._end(output)

    def _on_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self._now.inside_outer or in_plain_pass()):
            self._take_turn()
            self._begin(module, args, kwargs)

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (self._now.inside_outer or in_plain_pass()):
            self._end(output)

    def _take_turn(self) -> None:
        """Wait for the passes of other threads; one that an exception cut short holds it yet."""
        if not self._now.holds_lock:
            self._running.acquire()
            self._now.holds_lock = True

    def _end(self, output: Any) -> None:
        """A pass is over: look at what came of it, and let the next one begin."""
        if not self._now.holds_lock:
            return
        try:
            tokens = self._now.current
            if tokens is None or output is None:
                return
            cache = cache_in(output) if isinstance(output, dict) else None
            self._remember(cache, tokens.call, tokens.columns)
            self._finite.look_at(output, tokens)
        finally:
            self._now.holds_lock = False
            self._running.release()

    def _remember(self, cache: Any, call: Call, columns: int) -> None:
        with contextlib.suppress(TypeError):  # no cache, or a tuple of older releases
            self._of_cache[cache] = call, columns

    def _known_cache(self, cache: Any) -> tuple[Call, int] | None:
        try:
            return self._of_cache.get(cache)
        except TypeError:
            return None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out the positions of a pass from the model's arguments."""
        now = self._now
        given = {**_by_name(module, args), **kwargs} if args else kwargs
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        if not isinstance(tokens, Tensor) or now.left_alone:
            now.current = None  # without tokens the model itself says what is missing
            return
        self.passes += 1
        batch, length = tokens.shape[:2]
        cache = cache_in(given)
        known = self._known_cache(cache)
        past = past_length(
            cache, self._lm.name, None if known is None else known[1], self._without_length
        )
        columns = past + length
        if now.generating and self.on_reorder:
            self._watch_cache(cache)
        mask, place = given.get("attention_mask"), given.get("position_ids")
        check_mask(mask, cache, columns, self._lm.name)
        call, real = now.call, None
        if not now.generating and past > 0:
            call = self._call_of_cache(known)
        if not (now.generating and call and cache is not None and past >= call.width):
            real = self._real_columns(mask, batch, columns, tokens.device)
            if not now.generating and past == 0 and not self._continues(ids, real):
                call = None
        # else: no token after the prompts of `generate` is padding.
        if call is None:
            assert real is not None
            call = self._open(ids, real, now.generating, embeds)
        now.call = call
        call.factor(batch)
        if now.generating and self.passes > call.first_pass and cache is None:
            self._check_whole(length)
        now.current = PassTokens(
            call, batch, length, columns, tokens.device, ids, real_columns=real
        )
        # After padding on the right, generate goes on counting from the padding's own position.
        # On a device, looking at position ids behind the prompts would wait for it at every token.
        told = not now.generating or call.ends_without_padding
        if told and (real is not None or tokens.device.type == "cpu"):
            check_position_ids(place, now.current, self._lm.name)
        self._remember(cache, call, columns)
        if self.plain_wanted and not call.plain:
            call.plain = read_plain(self._lm, call, self.plain_wanted, given)

    @functools.cached_property
    def _without_length(self) -> frozenset[int]:
        """Layers whose cache holds something else than the row: an image's keys."""
        return frozenset(getattr(text_config(self._lm.model), "cross_attention_layers", None) or ())

    def _call_of_cache(self, known: tuple[Call, int] | None) -> Call | None:
        """The call that goes on with a cache, whichever thread began it."""
        if known is not None:
            return known[0]
        if self._now.call is None and self.calls:
            raise UserError(
                f"{self._lm.name} was run by another thread inside steer(...), and now on a cache "
                "that steering has not seen before: begin and end each row in one thread"
            )
        return self._now.call

    def _check_whole(self, length: int) -> None:
        """Raise UserError for a pass without a cache that does not hold the whole row."""
        call = self._now.call
        assert call is not None
        if length < call.real.shape[1]:
            raise UserError(
                f"{self._lm.name} was run on {length} tokens after a prompt of "
                f"{call.real.shape[1]} columns and no cache was found among its arguments, "
                "so positions cannot be counted: run it with use_cache=False"
            )

    def _watch_cache(self, cache: Any) -> None:
        """Call the listeners at every `reorder_cache` of the present cache only."""
        if cache is self._tapped_cache:
            return
        if self._tapped_cache is not None:
            vars(self._tapped_cache).pop("reorder_cache", None)
        self._tapped_cache = None
        if not hasattr(cache, "reorder_cache"):
            return
        original = cache.reorder_cache

        def reorder(rows: Tensor) -> Any:
            for listener in self.on_reorder:
                listener(rows)
            return original(rows)

        cache.reorder_cache, self._tapped_cache = reorder, cache

    def _real_columns(
        self, mask: Any, batch: int, columns: int, device: torch.device
    ) -> Bool[Tensor, "batch columns"]:
        """Which columns of each row, from its start to the end of this pass, hold tokens."""
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask.to(device) != 0
        elif self._now.generating and (call := self._now.call) is not None:
            # The library drops a mask without padding, and makes a 4-D one for some caches. What
            # follows the prompt is never padding.
            real = call.real.to(device)
            real = real.repeat_interleave(call.factor(batch), dim=0)
        else:
            real = visible_keys(mask, batch, columns, device)
        missing = columns - real.shape[1]
        if missing > 0:
            real = torch.cat([real, real.new_ones((batch, missing))], dim=1)
        return real[:, :columns]

    def _continues(self, ids: Tensor | None, real: Tensor) -> bool:
        """Whether a row given without a cache repeats the present call and appends to it."""
        call = self._now.call
        if call is None or call.generating or call.ids is None or ids is None:
            return False
        rows, width = call.real.shape
        if rows != real.shape[0] or width > real.shape[1]:
            return False
        same = torch.equal(call.real.to(real.device), real[:, :width])
        ours, theirs = call.ids.to(ids.device), ids[:, :width]
        return same and bool(((ours == theirs) | ~real[:, :width]).all())

    @contextlib.contextmanager
    def _generate_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """One call of `generate`: its inputs are the prompts."""
        now = self._now
        if now.generating:
            # The model drafts for itself (early exit). Drafts are left alone: what is kept of them
            # passes again, and is steered then.
            with self._leaving_alone():
                yield
            return
        ids = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get("input_ids") if ids is None else ids
        embeds = kwargs.get("inputs_embeds")
        model = uncompiled(self._lm.model)
        with self._running, guided(model, self._leaving_alone):
            now.generating, now.call = True, None
            try:
                if isinstance(ids, Tensor) and ids.shape[-1] > 0:
                    now.call = self._open(ids, _prompt_mask(model, ids, args, kwargs), True)
                elif isinstance(embeds, Tensor):
                    now.call = self._open(
                        None, _prompt_mask(None, embeds, args, kwargs), True, embeds
                    )
                # else: generate starts from a token of its own, and the first pass shows it
                yield
                self._finite.settle()
            finally:
                now.generating, now.call = False, None
                self._watch_cache(None)

    @contextlib.contextmanager
    def _leaving_alone(self) -> Iterator[None]:
        """Passes of this thread are not steered meanwhile."""
        before, self._now.left_alone = self._now.left_alone, True
        try:
            yield
        finally:
            self._now.left_alone = before

    def _open(
        self, ids: Tensor | None, real: Tensor, generating: bool, embeds: Tensor | None = None
    ) -> Call:
        """Begin a call whose prompts are the real columns given."""
        lengths: list[int] = real.sum(dim=1).tolist()
        prompts: list[EncodedPrompt | None] = [None] * len(lengths)
        if self._known:
            if ids is None or ids.shape != real.shape:
                raise UserError(
                    "steer(prompts=...) recognises prompts by their token ids: give the model "
                    "input_ids from the start of each row"
                )
            for i in range(len(lengths)):
                prompt = self._recognise(ids[i][real[i]].tolist(), i)
                prompts[i] = prompt
                # A row that holds more than its prompt is a prompt with its answer; `generate`
                # itself is never given an answer, but may be given the start of one.
                lengths[i] = lengths[i] if generating else len(prompt)
        if self._lengths is not None:
            if len(self._lengths) != len(lengths):
                raise UsageError(
                    f"steer(prompt_lengths=...) names {len(self._lengths)} rows and the model was "
                    f"given {len(lengths)}"
                )
            lengths = list(self._lengths)
        number, first = len(self.calls), self.passes + 1
        call = Call(number, lengths, prompts, real, ids, generating, first, embeds)
        self.calls.append(call)
        return call

    def _recognise(self, tokens: list[int], row: int) -> EncodedPrompt:
        """The longest of the known prompts that the row begins with."""
        for length in self._known_lengths:
            prompt = self._known.get(tuple(tokens[:length]))
            if prompt is not None:
                return prompt
        raise UserError(
            f"row {row} given to the model begins with none of the {len(self._known)} prompts in "
            "steer(prompts=...): give steer the prompts that are run"
        )


def _by_name(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of a forward pass by name; their order differs between families."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False))


def _prompt_mask(
    model: Any, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Bool[Tensor, "rows width"]:
    """Which columns given to `generate` are real; without a mask, what `generate` itself infers.

    It takes pad tokens for padding only when the pad token is not also an end of text.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask != 0
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if model is None:
        return everything
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    places = (kwargs, vars(config) if config is not None else {}, vars(model.generation_config))
    pad, end = (
        next((place[key] for place in places if place.get(key) is not None), None)
        for key in ("pad_token_id", "eos_token_id")
    )
    ends = {end} if isinstance(end, int) else set(end or ())
    return everything if pad is None or pad in ends else tokens != pad
