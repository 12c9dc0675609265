"""Where attn_out, mlp_out and resid_mid of a block are, found by what they add up to.

Names do not tell: some modules add the residual themselves (BLOOM, MPT), norms after a sub-layer
have many names (GLM-4, AFMoE), and some blocks multiply what they add (Granite). So every block is
run once over a few made-up tokens, and a site is where the sums say:

    resid_pre + attn_out = resid_mid        resid_mid + mlp_out = resid_post

or, where attention and MLP run in parallel, resid_pre + attn_out + mlp_out = resid_post.
"""

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saesteer.checkpoints.errors import NonFiniteError, UsageError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.passing import few_tokens, without_hooks

Stream = Float[Tensor, "batch seq d_model"]

# Names come first where several modules carry the same values.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_MIDDLE = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
_ROWS, _TOKENS = 2, 12
_FIRST_SUM = "resid_pre + attn_out = resid_mid"
_SECOND_SUM = "resid_mid + mlp_out = resid_post"


@dataclass(frozen=True)
class FoundSite:
    """A module inside a block, the side of it, and how exactly the sum holds there."""

    path: str
    """Relative to the block."""
    side: str
    identity: str
    """The sum that was checked."""
    off: float
    """How far the sum is off, as a share of the residual stream's length."""
    allowed: float


@dataclass(frozen=True, eq=False)
class _Seen:
    """What passed one side of a module, and when."""

    path: str
    order: int
    values: Stream
    flat: bool
    """Whether it passed as `[batch * seq, d_model]`: proof of a sum, and no site."""


@dataclass(frozen=True, eq=False)
class _Proved:
    """A module whose values make a sum hold."""

    site: str
    seen: _Seen
    side: str
    identity: str
    off: float
    allowed: float


def find_site(lm: LanguageModel, layer: int, site: str) -> FoundSite:
    """The place of attn_out, mlp_out or resid_mid in a block. Raises UsageError without one."""
    known = _known.setdefault(lm, {})
    if layer not in known:
        known[layer] = _find_sites(lm, layer)
    found, reason = known[layer]
    if site in found:
        return found[site]
    block = type(lm.blocks[layer]).__name__
    why = f" ({reason[site]})" if site in reason else ""
    raise UsageError(
        f"`site` {site} does not exist in the {block} blocks of {lm.name}{why}: use resid_post, "
        "resid_pre or a module path"
    )


_Sites = tuple[dict[str, FoundSite], dict[str, str]]
_known: "weakref.WeakKeyDictionary[LanguageModel, dict[int, _Sites]]" = weakref.WeakKeyDictionary()


def _find_sites(lm: LanguageModel, layer: int) -> _Sites:
    """The sites of a block, and for others what stands in their way."""
    try:
        before, after, inputs, outputs = _trace(lm, layer)
    except Exception as error:  # models raise what they like
        said = " ".join(str(error).split())[:120] or type(error).__name__
        reason = f"a pass over a few tokens failed: {said}"
        return {}, dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), reason)
    if before is None or after is None:
        reason = "its blocks do not pass one row of the model's width for each token"
        return {}, dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), reason)
    if not all(bool(torch.isfinite(stream).all()) for stream in (before, after)):
        raise NonFiniteError(
            f"{lm.name} gave NaN or infinite activations at layer {layer} for a few made-up "
            "tokens, so that no site can be told: try `dtype` float32, or look at its weights"
        )
    attention = [seen.order for seen in outputs if "att" in seen.path.lower()]
    if not attention:
        outputs_of_attention: list[_Seen] = []
    else:
        outputs_of_attention = [seen for seen in outputs if seen.order >= min(attention)]
    firsts = _preferred(outputs_of_attention, _ATTENTION)
    seconds = _preferred(outputs, _MLP)
    middles = [
        seen for seen in _preferred(inputs, (*_MIDDLE, *_MLP)) if not _same(seen.values, before)
    ]
    best: list[_Proved] = []
    reached: _Seen | None = None
    for middle in middles:
        attn = _first_sum("attn_out", firsts, before, middle.values, _FIRST_SUM)
        later = [second for second in seconds if second.order > middle.order]
        mlp = _first_sum("mlp_out", later, middle.values, after, _SECOND_SUM)
        pair = [found for found in (attn, mlp) if found is not None]
        if len(pair) > len(best):
            best, reached = pair, middle
        if len(best) == 2:
            break
    if len(best) < 2 and (parallel := _parallel(firsts, seconds, before, after)):
        return parallel, {"resid_mid": "attention and MLP run in parallel"}
    sites: dict[str, FoundSite] = {}
    reasons = _reasons(firsts, seconds, middles, before, after)
    if reached is not None and (aside := _aside(best, reached, outputs, before, after)):
        reasons = dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), aside)
    elif reached is not None:
        middle_of = replace(best[0], seen=reached, side="input")
        for found in (*best, middle_of):
            name = "resid_mid" if found.side == "input" else found.site
            if found.seen.flat:
                reasons[name] = f"{found.seen.path} has no batch dimension there"
            else:
                sites[name] = FoundSite(
                    found.seen.path, found.side, found.identity, found.off, found.allowed
                )
    elif scaled := _scaled_middle(firsts, middles, before):
        sites["resid_mid"] = scaled
    return sites, reasons


def _aside(
    best: Sequence[_Proved],
    reached: _Seen,
    outputs: Sequence[_Seen],
    before: Stream,
    after: Stream,
) -> str | None:
    """Why a sum with attention's output is not the middle of the block, where that is known.

    In Zamba's blocks it only goes into the Mamba layer; LongCat Flash has two attentions.
    """
    if len(best) > 1 or best[0].site != "attn_out":
        return None
    attention = best[0].seen.path
    later = [seen for seen in outputs if seen.order > reached.order]
    later.sort(key=lambda seen: seen.path.count("."))
    for seen in later:
        if _off(before + seen.values, after) <= _allowed(after):
            return (
                f"the sum with {attention} goes into other modules, and only {seen.path} is added"
            )
    for seen in later:
        words = seen.path.lower()
        if "att" in words and "norm" not in words and not f"{attention}.".startswith(words + "."):
            return f"there is another attention after {attention}: {seen.path}"
    return None


def _preferred(seen: Sequence[_Seen], names: Sequence[str]) -> list[_Seen]:
    """Modules with a usual name first, then the outer before the inner, the later before the
    earlier: a module's values are those of its last part."""

    def rank(one: _Seen) -> tuple[int, int, int]:
        named = names.index(one.path) if one.path in names else len(names)
        return named, one.path.count("."), -one.order

    return sorted(seen, key=rank)


def _first_sum(
    site: str, added: Sequence[_Seen], start: Stream, end: Stream, identity: str
) -> _Proved | None:
    """The first of these that leads from `start` to `end`, one with a batch dimension before."""
    for seen in sorted(added, key=lambda one: one.flat):
        off = _off(start + seen.values, end)
        if off <= _allowed(end):
            return _Proved(site, seen, "output", identity, off, _allowed(end))
    return None


def _parallel(
    firsts: Sequence[_Seen], seconds: Sequence[_Seen], before: Stream, after: Stream
) -> dict[str, FoundSite]:
    identity = "resid_pre + attn_out + mlp_out = resid_post"
    for attn in firsts:
        if "att" not in attn.path.lower() or attn.flat:
            continue
        for mlp in seconds:
            if mlp.flat or mlp.path == attn.path or mlp.path.startswith(f"{attn.path}."):
                continue
            x, y = attn.values, mlp.values
            # Three numbers may have been added in any order.
            off = min(
                _off((before + x) + y, after),
                _off((before + y) + x, after),
                _off(before + (x + y), after),
            )
            if off <= _allowed(after):
                return {
                    "attn_out": FoundSite(attn.path, "output", identity, off, _allowed(after)),
                    "mlp_out": FoundSite(mlp.path, "output", identity, off, _allowed(after)),
                }
    return {}


def _reasons(
    firsts: Sequence[_Seen],
    seconds: Sequence[_Seen],
    middles: Sequence[_Seen],
    before: Stream,
    after: Stream,
) -> dict[str, str]:
    """What is known of why no module's output is what the block adds."""
    reasons = {}
    for site, candidates, spans in (
        ("attn_out", firsts, [(before, middle.values) for middle in middles]),
        ("mlp_out", seconds, [(middle.values, after) for middle in middles]),
    ):
        reasons[site] = "no module's output is what the block adds to the residual stream"
        for seen in candidates[:4]:
            for start, end in spans:
                factor, off = _factor(seen, start, end)
                if off <= _allowed(end):
                    alone = abs(factor - 1) < 1e-3
                    reasons[site] = (
                        f"the block adds {seen.path} after it"
                        if alone
                        else f"{seen.path} is multiplied by {factor:.3g} before it is added"
                    )
    return reasons


def _factor(seen: _Seen, start: Stream, end: Stream) -> tuple[float, float]:
    """The number that best leads from `start` to `end` by a multiple of what passed there, and how
    far off it leads."""
    step, values = (end - start).double(), seen.values.double()
    factor = float((step * values).sum() / values.square().sum().clamp_min(1e-30))
    return factor, _off((start.double() + factor * values).to(end.dtype), end)


def _scaled_middle(
    firsts: Sequence[_Seen], middles: Sequence[_Seen], before: Stream
) -> FoundSite | None:
    """The middle of a block that multiplies attention's output before adding it."""
    for middle in middles:
        for seen in firsts[:4]:
            factor, off = _factor(seen, before, middle.values)
            allowed = _allowed(middle.values)
            if off <= allowed and not middle.flat:
                identity = f"resid_pre + {factor:.3g} {seen.path} = resid_mid"
                return FoundSite(middle.path, "input", identity, off, allowed)
    return None


def _off(found: Stream, expected: Stream) -> float:
    """The difference at a typical token, as a share of the longer of the two rows."""
    error = (found.double() - expected.double()).norm(dim=-1)
    length = torch.maximum(found.double().norm(dim=-1), expected.double().norm(dim=-1))
    return float((error / length.clamp_min(1e-30)).median())


def _allowed(values: Tensor) -> float:
    """Rounding of the sum. In 16 bits the block's own sum is repeated in its type, to the bit but
    for a few elements: more would let a wrong module pass where little is added."""
    return (8 if values.dtype in (torch.float32, torch.float64) else 0.25) * float(
        torch.finfo(values.dtype).eps
    )


def _same(one: Stream, other: Stream) -> bool:
    return _off(one, other) <= _allowed(other)


class _Stop(Exception):
    """Nothing beyond the block is needed."""


def _trace(
    lm: LanguageModel, layer: int
) -> tuple[Stream | None, Stream | None, list[_Seen], list[_Seen]]:
    """The block's input and output, and what went in and out of each module in it, copied at once:
    some blocks add to these tensors in place."""
    block = lm.blocks[layer]
    ids = few_tokens(lm, _ROWS, _TOKENS)
    shape = (_ROWS, _TOKENS, lm.d_model)
    inputs: list[_Seen] = []
    outputs: list[_Seen] = []

    def note(seen: list[_Seen], path: str, values: Any) -> None:
        if isinstance(values, tuple | list) and values:
            values = values[0]
        if not isinstance(values, Tensor):
            return
        flat = tuple(values.shape) == (_ROWS * _TOKENS, lm.d_model)
        if flat or tuple(values.shape) == shape:
            copy = values.detach().to(lm.device).clone().reshape(shape)
            seen.append(_Seen(path, len(inputs) + len(outputs), copy, flat))

    def reader(path: str) -> tuple[Any, Any]:
        def entering(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            note(inputs, path, args if args else kwargs.get("hidden_states"))

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            note(outputs, path, output)
            if path == "":
                raise _Stop

        return entering, leaving

    with without_hooks(lm), torch.no_grad(), contextlib.ExitStack() as stack:
        for path, module in block.named_modules():
            entering, leaving = reader(path)
            first = module.register_forward_pre_hook(entering, with_kwargs=True)
            second = module.register_forward_hook(leaving)
            stack.callback(first.remove)
            stack.callback(second.remove)
        with contextlib.suppress(_Stop):
            lm.text_model(input_ids=ids, use_cache=False)
    before = next((seen.values for seen in inputs if not seen.path and not seen.flat), None)
    after = next((seen.values for seen in outputs if not seen.path and not seen.flat), None)
    return before, after, _once(inputs), _once(outputs)


def _once(seen: Sequence[_Seen]) -> list[_Seen]:
    """What passed modules inside the block that ran once; others have no single value."""
    paths = [one.path for one in seen]
    return [one for one in seen if one.path and paths.count(one.path) == 1]
