"""Reading and writing single attention heads: q, k, v, scores, pattern and z of every block.

transformers lets an attention function be registered by name. The one registered here computes
plain attention and offers each quantity on its way to readers and writers, so no weight has to be
found or sliced by name, and models with fused projections are treated like all others. A family
whose attention is not plain (sinks, gates, latent attention) is found out at first use, by
comparing logits with the model's own attention, and refused.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, reason_of
from saesteer.sae.model.language_model import LanguageModel, text_config, uncompiled
from saesteer.sae.model.passing import few_tokens, without_hooks

HEAD_SITES = ("q", "k", "v", "scores", "pattern", "z")
"""In the order in which a block computes them. Shapes: q `[batch, head, query, d_head]`; k and v
`[batch, head, key, d_head]`, repeated to the query heads; scores (masked, before the softmax) and
pattern `[batch, head, query, key]`; z `[batch, query, head, d_head]`. q and k are those after
rotation; keys include those of a cache."""

HeadEdit = Callable[[Tensor], Tensor | None]
"""Is given the tensor of a head site; returns a new one to let pass, or None."""

_NAME = "saesteer_tap"
_TOKENS = 16


@dataclass(frozen=True)
class HeadLayout:
    """The attention heads of each block."""

    n_heads: int
    n_kv_heads: int
    d_head: int

    @property
    def width(self) -> int:
        """Width of the heads' outputs side by side, which need not be d_model."""
        return self.n_heads * self.d_head


@dataclass(eq=False)
class HeadTap:
    """An open tap: what is called at which head site."""

    edits: dict[tuple[int, str], HeadEdit] = field(default_factory=dict)
    """By (layer, site); may be changed between passes."""
    scaling: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    """The factor on q k and the soft-cap, by layer, as the latest pass had them."""


@contextlib.contextmanager
def head_tap(lm: LanguageModel) -> Iterator[HeadTap]:
    """Run the model's attention through the tap for as long as the context is open.

    Taps may be nested: the edits of the outer one come first. The model's own attention is put
    back at the end, also by an exception. Raises UsageError for a family whose heads cannot be
    told apart (see `heads`).
    """
    heads(lm)
    with _tapped(lm) as tap:
        yield tap


def heads(lm: LanguageModel) -> HeadLayout:
    """How many heads each block has, proved by a pass over 16 tokens at first use.

    Raises UsageError for a family whose attention the tap does not reproduce.
    """
    if lm not in _known:
        _known[lm] = _examine(lm)
    found = _known[lm]
    if isinstance(found, str):
        raise UsageError(
            f"the attention heads of {lm.name} cannot be told apart ({found}): use `site` z, "
            "attn_out or another site of the residual stream"
        )
    return found


def heads_width(lm: LanguageModel) -> int:
    """Width of the heads' outputs side by side, by the configuration alone."""
    return _layout(lm).width


def out_projection(lm: LanguageModel, layer: int) -> str:
    """The module, relative to the block, whose input is z: the heads' outputs side by side.

    Proved by the tap where the family has one; elsewhere the last matrix that runs in the
    attention module, if its width is that of the heads. Raises UsageError where there is none.
    """
    found = _projections.setdefault(lm, {})
    if layer not in found:
        found[layer] = _find_projection(lm, layer)
    if found[layer] is None:
        raise UsageError(
            f"`site` z does not exist in block {layer} of {lm.name}: no matrix takes the outputs "
            "of its attention heads; use attn_out, resid_post or a module path"
        )
    return str(found[layer])


_known: "weakref.WeakKeyDictionary[LanguageModel, HeadLayout | str]" = weakref.WeakKeyDictionary()
_projections: "weakref.WeakKeyDictionary[LanguageModel, dict[int, str | None]]" = (
    weakref.WeakKeyDictionary()
)
_open: "weakref.WeakKeyDictionary[nn.Module, tuple[int, list[HeadTap]]]" = (
    weakref.WeakKeyDictionary()
)


def _layout(lm: LanguageModel) -> HeadLayout:
    config = text_config(lm.model)
    n_heads = int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    d_head = int(getattr(config, "head_dim", None) or config.hidden_size // n_heads)
    return HeadLayout(n_heads, n_kv_heads, d_head)


@contextlib.contextmanager
def _tapped(lm: LanguageModel) -> Iterator[HeadTap]:
    _register()
    tower: Any = lm.text_model
    before = tower.config._attn_implementation
    tap = HeadTap()
    inside = [(m, layer) for layer, block in enumerate(lm.blocks) for m in block.modules()]
    for module, layer in inside:
        _open.setdefault(module, (layer, []))[1].append(tap)
    try:
        if before != _NAME:
            tower.set_attn_implementation(_NAME)
        yield tap
    finally:
        if before != _NAME:
            tower.set_attn_implementation(before)
        for module, _ in inside:
            _open[module][1].remove(tap)
            if not _open[module][1]:
                del _open[module]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    # Without a mask function of the same name the library passes no mask at all.
    AttentionMaskInterface.register(_NAME, eager_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(q k scaling) + mask) v, with every step offered to the open taps."""
    layer, taps = _open.get(module, (-1, []))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    for tap in taps:
        tap.scaling[layer] = scaling, softcap

    def offer(site: str, values: Tensor) -> Tensor:
        for tap in taps:
            edit = tap.edits.get((layer, site))
            new = None if edit is None else edit(values)
            values = values if new is None else new
        return values

    groups = query.shape[1] // key.shape[1]
    q = offer("q", query)
    k = offer("k", key.repeat_interleave(groups, dim=1))
    v = offer("v", value.repeat_interleave(groups, dim=1))
    scores = (q @ k.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : k.shape[-2]]
    scores = offer("scores", scores)
    # Sixteen bits are too few for the sum; float64 stays what it is, so that references are exact.
    wide = torch.float32 if scores.dtype.itemsize < 4 else scores.dtype
    pattern = offer("pattern", torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype))
    z = offer("z", (pattern @ v).transpose(1, 2).contiguous())
    return z, pattern


def _sample(lm: LanguageModel) -> Tensor:
    return few_tokens(lm, 1, _TOKENS)


def _examine(lm: LanguageModel) -> HeadLayout | str:
    """The layout, or why there is none."""
    tower = lm.text_model
    if not getattr(tower, "_can_set_attn_implementation", lambda: False)():
        return f"{type(tower).__name__} has its attention built in"
    try:
        layout = _layout(lm)
        return _compare(lm, layout) or layout
    except Exception as error:  # models raise what they like
        return f"a pass over {_TOKENS} tokens failed: {reason_of(error, 120)}"


def _compare(lm: LanguageModel, layout: HeadLayout) -> str | None:
    """What differs between the tap and the model's own attention; None when nothing does."""
    model, ids = uncompiled(lm.model), _sample(lm)
    seen: dict[int, tuple[int, ...]] = {}

    def note(layer: int) -> HeadEdit:
        return lambda q: seen.update({layer: tuple(q.shape)})

    with torch.no_grad(), without_hooks(lm):
        own = model(input_ids=ids, use_cache=False).logits
        with _tapped(lm) as tap:
            tap.edits = {(layer, "q"): note(layer) for layer in range(lm.n_layers)}
            ours = model(input_ids=ids, use_cache=False).logits
    missing = [layer for layer in range(lm.n_layers) if layer not in seen]
    if missing:
        return f"block {missing[0]} does not call the attention function of the library"
    expected = (1, layout.n_heads, _TOKENS, layout.d_head)
    for layer, shape in seen.items():
        if shape != expected:
            return f"block {layer} has queries of shape {list(shape)}, not {list(expected)}"
    own, ours = own.float(), ours.float()
    off = float((own - ours).abs().max())
    allowed = (1e-3 if lm.dtype.itemsize >= 4 else 3e-2) * float(own.max() - own.min())
    if not off <= allowed:
        return f"plain attention moves its logits by up to {off:.2g}, allowed {allowed:.2g}"
    return None


def _find_projection(lm: LanguageModel, layer: int) -> str | None:
    layout = _layout(lm)
    entered: list[tuple[str, Tensor]] = []
    z: list[Tensor] = []

    def reader(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[-1] == layout.width:
                entered.append((path, args[0].detach().clone()))

        return read

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_hooks(lm))
        if lm not in _known:
            _known[lm] = _examine(lm)
        if isinstance(_known[lm], HeadLayout):
            tap = stack.enter_context(_tapped(lm))
            tap.edits[layer, "z"] = lambda values: z.append(values.detach().flatten(-2))
        for path, module in lm.blocks[layer].named_modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2:
                stack.callback(module.register_forward_pre_hook(reader(path)).remove)
        lm.text_model(input_ids=_sample(lm), use_cache=False)
    if z:
        same = [path for path, x in entered if x.shape == z[0].shape and torch.equal(x, z[0])]
        return same[0] if same else None
    inside = [path for path, x in entered if "att" in path.lower() and x.dim() == 3]
    return inside[-1] if inside else None
