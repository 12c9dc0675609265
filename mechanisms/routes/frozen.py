"""The frozen network: one forward pass in which every non-linearity keeps the value it had.

Attention patterns, the divisors of norms, activations of gates and routers are taken as constants:

    norm        y = x r w        with r = 1 / rms(x) kept (LayerNorm: x centred first, bias added)
    attention   z = A v          with A kept
    gated MLP   act(gate) up     with act(gate) kept
    plain MLP   u c              with c = act(u) / u kept

The logits stay what they were, and the network is affine in its embeddings, so that gradients are
an exact account of what each part contributed. It is the route of *this* pass: nothing is said of
what would happen if something changed.

Functions are caught by name as the model calls them, not modules by class, and a family is taken
only after its frozen network was found to be affine.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.patching.sites import Edit, at_sites, check_finite
from saesteer.sae.model.attention import head_tap
from saesteer.sae.model.language_model import LanguageModel, uncompiled

_KEPT = ("softmax", "rsqrt", "sqrt")
_ACTIVATIONS = ("silu", "gelu", "relu", "tanh", "sigmoid", "mish", "leaky_relu", "hardswish")
_SAMPLE = 6
_ALLOWED = 1e-3  # of the logits' range, in float32


class FrozenNetwork:
    """One prompt's forward pass, frozen.

    Needs memory for the patterns and gates of every block. Raises UsageError for a family whose
    heads cannot be told apart, UserError for one that does not become affine.
    """

    def __init__(
        self, lm: LanguageModel, ids: Sequence[int], *, last: int = 1, gated: bool | None = None
    ) -> None:
        """`last`: tokens at the end whose logits are kept. `gated`: whether activations multiply
        something else; found out by default."""
        self.last = last
        self.lm = lm
        self.ids = torch.tensor([list(ids)], device=lm.device)
        self._gated = _is_gated(lm) if gated is None else gated
        self._kept: list[Tensor] = []
        embedding: Any = lm.model.get_input_embeddings()
        with torch.no_grad():
            self.embeddings: Tensor = embedding(self.ids).detach()
            """What stands for each token, `[1, T, d_model]`, without positions."""
            self.logits = self._pass(self.embeddings, {}, _Freeze(self._kept, self._gated, False))
            """At the last token, `[vocabulary]`; `[last, vocabulary]` where several are kept."""
        check_finite(lm, self.logits, "the logits")

    def run(
        self, embeddings: Tensor, edits: Mapping[tuple[int, str], Edit] | None = None
    ) -> Tensor:
        """Logits, of the form of `self.logits`, for other embeddings `[1, T, d_model]`.

        Gradients go through. `edits` are called with the whole tensor at (layer, site), as in
        `patching.sites`.
        """
        return self._pass(embeddings, dict(edits or {}), _Freeze(self._kept, self._gated, True))

    def _pass(self, embeddings: Tensor, edits: dict[tuple[int, str], Edit], mode: Any) -> Tensor:
        # Everything that may examine the model comes before the mode, which would change it.
        with head_tap(self.lm) as tap, at_sites(self.lm, tap, edits), contextlib.ExitStack() as own:
            embedding: Any = self.lm.model.get_input_embeddings()
            own.callback(embedding.register_forward_hook(lambda *_: embeddings).remove)
            for block in self.lm.blocks:
                own.enter_context(mode.block(block))
                for module in block.modules():
                    if _is_activation(module):
                        own.enter_context(mode.watched(module))
            own.enter_context(mode)
            model = uncompiled(self.lm.model)
            logits: Tensor = model(
                input_ids=self.ids, use_cache=False, logits_to_keep=self.last
            ).logits[0]
        return logits[-1] if self.last == 1 else logits


class _Freeze(TorchFunctionMode):
    """Keeps the value of each non-linearity in the order of calls, or gives it back in order."""

    def __init__(self, kept: list[Tensor], gated: bool, again: bool) -> None:
        super().__init__()
        self._kept, self._gated, self._again = kept, gated, again
        self._place = 0
        self._inside = 0
        self._in_block = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._inside:
            return func(*args, **kwargs)
        if name in ("to", "float") and _lowers(name, args, kwargs):
            return args[0]  # norms compute in float32: a float64 account is exact without
        if name in _KEPT or (name == "pow" and len(args) > 1 and args[1] == -0.5):
            return self._value(lambda: func(*args, **kwargs))
        if name in _ACTIVATIONS:
            return self._activation(lambda u: func(u, *args[1:], **kwargs), args[0])
        if name == "layer_norm":
            return self._norm(
                True, args[0], *_norm_arguments(("weight", "bias", "eps"), args, kwargs)
            )
        if name == "rms_norm":
            weight, eps = _norm_arguments(("weight", "eps"), args, kwargs)
            return self._norm(False, args[0], weight, None, eps)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def block(self, block: nn.Module) -> Iterator[None]:
        """Know what is inside a block: a soft-cap of the logits is no gate."""

        def leaving(*_: Any) -> None:
            self._in_block = False

        def entering(*_: Any) -> None:
            self._in_block = True

        with _hooks(block, entering, leaving):
            yield

    @contextlib.contextmanager
    def watched(self, module: nn.Module) -> Iterator[None]:
        """Treat a module as one activation, whatever it computes inside."""

        def entering(*_: Any) -> None:
            self._inside += 1

        def leaving(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._inside -= 1
            return self._activation(lambda u: type(module).forward(module, u), args[0])

        with _hooks(module, entering, leaving):
            yield

    def _value(self, make: Callable[[], Tensor]) -> Tensor:
        if self._again:
            self._place += 1
            return self._kept[self._place - 1]
        self._kept.append(make().detach())
        return self._kept[-1]

    def _activation(self, function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        def plain(u: Tensor) -> Tensor:
            self._inside += 1
            try:
                return function(u)
            finally:
                self._inside -= 1

        if self._gated and self._in_block:
            return self._value(lambda: plain(u))

        def factor() -> Tensor:
            # The limit of act(u) / u at 0.
            some = torch.where(u == 0, torch.full_like(u, 1e-6), u)
            return plain(some) / some

        return u * self._value(factor)

    def _norm(
        self, centred: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        eps: float | None,
    ) -> Tensor:  # fmt: skip
        if centred:
            x = x - x.mean(-1, keepdim=True)
        small = torch.finfo(x.dtype).eps if eps is None else eps
        y = x * self._value(lambda: (x.square().mean(-1, keepdim=True) + small).rsqrt())
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


def _norm_arguments(names: Sequence[str], args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments after (input, normalized_shape), by position or by name."""
    given = list(args[2:]) + [None] * len(names)
    return [kwargs.get(name, given[place]) for place, name in enumerate(names)]


@contextlib.contextmanager
def _hooks(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lowers(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a float64 tensor would be made float32."""
    if not isinstance(args[0], Tensor) or args[0].dtype != torch.float64:
        return False
    return name == "float" or torch.float32 in (*args[1:], kwargs.get("dtype"))


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.__module__ in ("transformers.activations", "torch.nn.modules.activation")
        and "softmax" not in kind.__name__.lower()
        and not any(True for _ in module.parameters())
    )


_known: "weakref.WeakKeyDictionary[LanguageModel, bool | str]" = weakref.WeakKeyDictionary()


def _is_gated(lm: LanguageModel) -> bool:
    """Whether activations are gates, which multiply another function of the input: only one of
    both readings leaves the network affine. Raises UserError where neither does."""
    if lm not in _known:
        _known[lm] = _examine(lm)
    found = _known[lm]
    if isinstance(found, str):
        raise UserError(
            f"{lm.name} cannot be frozen: {found}; trace and frozen attribution need a network "
            "whose norms, patterns and gates are all that is not linear"
        )
    return found


def _examine(lm: LanguageModel) -> bool | str:
    vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])
    ids = [(7 * place + 5) % vocabulary for place in range(_SAMPLE)]
    off = []
    for gated in (False, True):
        net = FrozenNetwork(lm, ids, gated=gated)
        with torch.no_grad():
            none, one, two = (net.run(net.embeddings * times).double() for times in (0, 1, 2))
        off.append(float((two - 2 * one + none).abs().max() / (one.max() - one.min())))
        allowed = _ALLOWED if lm.dtype.itemsize >= 4 else 60 * _ALLOWED
        if off[-1] <= allowed:
            return gated
    return f"its frozen network is off by {min(off):.2g} of its range when embeddings double"
