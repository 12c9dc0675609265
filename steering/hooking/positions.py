"""The positions of a forward pass's tokens in their rows, however the model is run.

A block sees a chunk of each row: the whole prompt, a piece of it, one new token, or everything
again when there is no cache. `PositionTracker` watches the model's inputs and says which absolute
position each token of the present pass has, counted in real tokens from the start of its row, and
how long the row's prompt is. It never counts passes, because chunked prefill, drafts that are
rolled back and decoding without a cache would make such a count wrong.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.hooking.passes import Call, PassTokens


class PositionTracker:
    """Follows the forward passes of a model while `listening` is open.

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
        self.current: PassTokens | None = None
        self._lm = lm
        self._lengths = None if prompt_lengths is None else list(prompt_lengths)
        self._known = {tuple(prompt.token_ids): prompt for prompt in prompts or ()}
        self._known_lengths = sorted({len(tokens) for tokens in self._known}, reverse=True)
        self._call: Call | None = None
        self._generating = False
        self._drafting = False
        self._inside_outer = False
        self.on_reorder: list[Callable[[Tensor], None]] = []
        """Called with the former row of each row when beams are reordered."""
        self._tapped_cache: Any = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Watch the model's inputs; nothing is left on it afterwards."""
        with contextlib.ExitStack() as stack:
            outer, text = self._lm.model, self._lm.text_model
            if hasattr(outer, "generate"):
                stack.enter_context(_tapped(outer, self._generate_call))
            # Code that was compiled before the hooks were registered would not run them.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            handles = [
                outer.register_forward_pre_hook(self._on_outer, with_kwargs=True),
                outer.register_forward_hook(self._after_outer, always_call=True),
            ]
            if text is not outer:
                # The text model may be run alone (no logits), or through another wrapper.
                handles.append(text.register_forward_pre_hook(self._on_text, with_kwargs=True))
            for handle in handles:
                stack.callback(handle.remove)
            stack.callback(self._watch_cache, None)
            yield

    def _on_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside_outer = True
        self._begin(module, args, kwargs)

    def _after_outer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside_outer = False

    def _on_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside_outer:
            self._begin(module, args, kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out the positions of a pass from the model's arguments."""
        given = {**_by_name(module, args), **kwargs} if args else kwargs
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        if not isinstance(tokens, Tensor):
            return  # the model itself raises for missing inputs
        if self._drafting:
            self.current = None
            return
        self.passes += 1
        batch, length = tokens.shape[:2]
        cache = _cache_in(given)
        past = _past_length(cache, self._lm.name)
        if self._generating and self.on_reorder:
            self._watch_cache(cache)
        call, real = self._call, None
        if not (self._generating and call and cache is not None and past >= call.width):
            mask = given.get("attention_mask")
            real = self._real_columns(mask, batch, past + length, tokens.device)
            if not self._generating and past == 0 and not self._continues(ids, real):
                call = None
        # else: no token after the prompts of `generate` is padding.
        if call is None:
            assert real is not None
            call = self._call = self._open(ids, real, self._generating)
        call.factor(batch)
        if self._generating and self.passes > call.first_pass and cache is None:
            self._check_whole(length)
        self.current = PassTokens(
            call, batch, length, past + length, tokens.device, ids, real_columns=real
        )

    def _check_whole(self, length: int) -> None:
        """Raise UserError for a pass without a cache that does not hold the whole row."""
        assert self._call is not None
        if length < self._call.real.shape[1]:
            raise UserError(
                f"{self._lm.name} was run on {length} tokens after a prompt of "
                f"{self._call.real.shape[1]} columns and no cache was found among its arguments, "
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
        elif self._generating and self._call is not None:
            # The library drops a mask without padding, and makes a 4-D one for some caches. What
            # follows the prompt is never padding.
            real = self._call.real.to(device)
            real = real.repeat_interleave(self._call.factor(batch), dim=0)
        else:
            real = _visible_keys(mask, batch, columns, device)
        missing = columns - real.shape[1]
        if missing > 0:
            real = torch.cat([real, real.new_ones((batch, missing))], dim=1)
        return real[:, :columns]

    def _continues(self, ids: Tensor | None, real: Tensor) -> bool:
        """Whether a row given without a cache repeats the present call and appends to it."""
        call = self._call
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
        if self._generating:
            # The model drafts for itself (early exit). Drafts are not steered: the tokens that are
            # kept are run again, and steered then.
            self._drafting = True
            try:
                yield
            finally:
                self._drafting = False
            return
        self._generating, self._call = True, None
        ids = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get("input_ids") if ids is None else ids
        embeds = kwargs.get("inputs_embeds")
        try:
            if isinstance(ids, Tensor) and ids.shape[-1] > 0:
                self._call = self._open(ids, _prompt_mask(self._lm.model, ids, args, kwargs), True)
            elif isinstance(embeds, Tensor):
                self._call = self._open(None, _prompt_mask(None, embeds, args, kwargs), True)
            # else: `generate` adds a start token, and the prompt is seen at the first pass
            yield
        finally:
            self._generating, self._call = False, None
            self._watch_cache(None)

    def _open(self, ids: Tensor | None, real: Tensor, generating: bool) -> Call:
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
        call = Call(len(self.calls), lengths, prompts, real, ids, generating, self.passes + 1)
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


_CACHES = ("past_key_values", "cache", "cache_params")
"""Names of the cache argument in releases of transformers; `cache` since 5.24."""


def _cache_in(given: dict[str, Any]) -> Any:
    """The cache among a pass's arguments, found by `get_seq_length` or by its name."""
    named = [given[name] for name in _CACHES if given.get(name) is not None]
    able = [value for value in given.values() if hasattr(value, "get_seq_length")]
    return next(iter(able or named), None)


def _past_length(cache: Any, name: str) -> int:
    """Earlier columns that are in the cache and not in this pass; 0 without a cache."""
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except (AttributeError, ValueError) as error:
        raise UserError(
            f"the cache of {name} does not say how many tokens it holds, so positions cannot be "
            "counted: run it with use_cache=False"
        ) from error


def _visible_keys(
    mask: Any, batch: int, columns: int, device: torch.device
) -> Bool[Tensor, "batch columns"]:
    """The real columns according to a 4-D attention mask: those that the last query may see."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return torch.ones((batch, columns), dtype=torch.bool, device=device)
    last = mask[:, 0, -1, :columns].to(device)
    # Boolean masks say True, additive ones 0, where attention is allowed.
    return (last if last.dtype == torch.bool else last >= 0).expand(batch, -1)


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


_Listener = Callable[[tuple[Any, ...], dict[str, Any]], contextlib.AbstractContextManager[None]]


class _Tap:
    """`model.generate` with listeners that see its arguments and are told when it ends."""

    def __init__(self, model: Any) -> None:
        self.original: Callable[..., Any] = model.generate
        self.before = vars(model).get("generate")
        self.listeners: list[_Listener] = []
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for listener in self.listeners:
                stack.enter_context(listener(args, kwargs))
            return self.original(*args, **kwargs)


@contextlib.contextmanager
def _tapped(model: Any, listener: _Listener) -> Iterator[None]:
    """Let a listener see every call of `model.generate`.

    The replacement is an attribute of the instance. Nested contexts share it, and the last one to
    end removes it.
    """
    tap = vars(model).get("generate")
    if not isinstance(tap, _Tap):
        tap = _Tap(model)
        model.generate = tap
    tap.listeners.append(listener)
    try:
        yield
    finally:
        tap.listeners.remove(listener)
        if not tap.listeners and vars(model).get("generate") is tap:
            if tap.before is None:
                del model.generate
            else:
                model.generate = tap.before
