"""One hook mechanism for reading and for writing the residual stream.

A hook point is the input or the output of a module. `hooked` calls a function with the tensor there
and replaces it by the tensor that the function returns, if it returns one. Blocks that return a
tensor and blocks that return a tuple are treated alike.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, UserError, meant
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.attention import heads_width, out_projection
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.passing import check_block, check_module
from saesteer.sae.model.sites import find_site

SITES = ("resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_out")

HEADS_OUT = "z"
"""The outputs of a block's attention heads side by side, before the out-projection."""

Residual = Float[Tensor, "batch seq d_model"]


@dataclass(frozen=True, eq=False)
class HookPoint:
    """Where activations are read or written: the input or output of one module."""

    layer: int
    site: str
    module: nn.Module
    module_path: str
    side: str
    """"input" or "output"."""

    @property
    def name(self) -> str:
        """The TransformerLens name, or the module path for a site outside that scheme."""
        if self.site == HEADS_OUT:
            return f"blocks.{self.layer}.attn.hook_z"
        return f"blocks.{self.layer}.hook_{self.site}" if self.site in SITES else self.module_path

    @property
    def key(self) -> Place:
        """(layer, site), by which activations are stored."""
        return self.layer, self.site


class StopForward(Exception):
    """Raised by `capture` inside the forward pass: nothing beyond the last hook is needed."""


def layer_index(lm: LanguageModel, layer: int) -> int:
    """A 0-based block index; negative counts from the end. Raises UsageError out of range."""
    if not -lm.n_layers <= layer < lm.n_layers:
        raise UsageError(
            f"`layer` {layer} is out of range: {lm.name} has {lm.n_layers} blocks, "
            f"0..{lm.n_layers - 1} (or -{lm.n_layers}..-1 from the end)"
        )
    return layer % lm.n_layers


def resolve_site(lm: LanguageModel, layer: int, site: str = "resid_post") -> HookPoint:
    """Find the module and side that carry a site of one block.

    `site` is one of `SITES`, `z` (the attention heads' outputs side by side), or a module path
    (`model.layers.3.mlp.down_proj`; `{layer}` in it is replaced, and `.input` after it takes what
    goes in), whose output is taken. Sites inside the block are found and proved by a pass over a
    few tokens, see `find_site`. Raises UsageError for an unknown site, and for one that a block
    does not have (`resid_mid` does not exist where attention and MLP run in parallel).
    """
    layer = layer_index(lm, layer)
    block = lm.blocks[layer]
    path = f"{lm.blocks_path}.{layer}"
    if site in SITES:
        check_block(lm, layer, site)
    if site == "resid_post":
        return HookPoint(layer, site, block, path, "output")
    if site == "resid_pre":
        return HookPoint(layer, site, block, path, "input")
    if site in SITES:
        found = find_site(lm, layer, site)
        inner = block.get_submodule(found.path)
        return HookPoint(layer, site, inner, f"{path}.{found.path}", found.side)
    if site == HEADS_OUT:
        inner_path = out_projection(lm, layer)
        inner = block.get_submodule(inner_path)
        check_module(lm, inner, "input", site)
        return HookPoint(layer, site, inner, f"{path}.{inner_path}", "input")
    wanted, module, side = _module_at(lm, site.replace("{layer}", str(layer)))
    if module is None:
        raise UsageError(
            f"`site` must be one of {', '.join(SITES)}, {HEADS_OUT} or a module path of {lm.name}, "
            f"got {site!r}{meant(site, SITES)}"
        )
    inside = re.match(re.escape(lm.blocks_path) + r"\.(\d+)(?:\.|$)", wanted)
    if inside and int(inside[1]) != layer:
        raise UsageError(
            f"`site` {site} lies in block {inside[1]}, but `layer` is {layer}: give that layer, or "
            "write {layer} for the number"
        )
    check_module(lm, module, side, site)
    return HookPoint(layer, site, module, wanted, side)


_LIST_IN_PATH = re.compile(r"(?:[\w.]*\.)?(?:layers|h|blocks|block|layer)\.(\d+)((?:\.\w+)*)")


def _module_at(lm: LanguageModel, path: str) -> tuple[str, nn.Module | None, str]:
    """A module by its path, in this model or as other tools write it, and the side that is meant.

    `layers.3.mlp` (sparsify) and `h.3.mlp` leave out what stands before the list of blocks, and
    `...o_proj.input` (Gemma Scope 2) is what goes into a module.
    """
    inner, _, last = path.rpartition(".")
    named, side = (inner, last) if last in ("input", "output") else (path, "output")
    found = _LIST_IN_PATH.fullmatch(named)
    tries = [named, f"{lm.blocks_path}.{found[1]}{found[2]}"] if found else [named]
    for wanted in filter(None, tries):
        with contextlib.suppress(AttributeError):
            return wanted, lm.model.get_submodule(wanted), side
    return path, None, side


_HOOK_NAME = re.compile(rf"(?:blocks\.(\d+)\.)?hook_({'|'.join(SITES)})")  # of TransformerLens


def check_site(site: str | None) -> None:
    """Refuse a misspelt site, before there is a model to look for a module of that name in.

    Raises UsageError.
    """
    found = _HOOK_NAME.fullmatch(site or "")
    if found:
        block = "" if found[1] is None else f" and `layer` {found[1]}"
        raise UsageError(f"`site` {site} is called {found[2]} here: give that{block}")
    if site is not None and site not in SITES and (near := meant(site, SITES)):
        raise UsageError(
            f"`site` must be one of {', '.join(SITES)} or a module path, got {site!r}{near}"
        )


def check_place(sae: SAE, layer: int | None, site: str | None) -> None:
    """What `sae_hook_point` refuses, as far as the SAE alone tells: a place that cannot be hooked,
    or another layer or site than its own. Raises UserError, or UsageError for what was asked."""
    spec, name = sae.spec, sae.source or "(in memory)"
    check_site(site)
    if layer is None and spec.layer is None:
        raise UsageError(f"`sae` {name} names no layer: give `layer`")
    if layer is not None and layer >= 0 and spec.layer not in (None, layer):
        raise _other_layer(sae, layer)
    if spec.is_transcoder:
        raise UserError(
            f"`sae` {name} is a transcoder ({spec.hook_name or 'no hook name'}); only SAEs that "
            "read and write one place can be hooked: use it from Python (load_sae)"
        )
    if spec.hook_name and _own_site(sae) is None and site is None:
        raise UsageError(
            f"`sae` {name} reads {spec.hook_name}, which is none of our sites: give `site`"
        )


def _own_site(sae: SAE) -> str | None:
    """The site that an SAE's names say."""
    return HEADS_OUT if sae.spec.hook_name.endswith("hook_z") else sae.spec.site


def _other_layer(sae: SAE, layer: int | None) -> UsageError:
    return UsageError(
        f"`layer` {layer} conflicts with `sae` {sae.source or '(in memory)'}, which reads layer "
        f"{sae.spec.layer}: leave `layer` out"
    )


def last_block(lm: LanguageModel, points: Sequence[HookPoint]) -> int | None:
    """The last block that a pass up to all `points` runs; None for a point outside the blocks."""
    inside = re.compile(re.escape(lm.blocks_path) + r"\.(\d+)(?:\.|$)")
    matches = [inside.match(point.module_path) for point in points]
    return None if None in matches else max(int(match[1]) for match in matches if match)


def keep_only_read(lm: LanguageModel, points: Sequence[HookPoint]) -> None:
    """Free the weights that a pass up to the last of `points` does not need. Afterwards the model
    can only be run up to there."""
    last = last_block(lm, points)
    if last is not None:
        lm.keep_only(last)


def sae_hook_point(
    sae: SAE,
    lm: LanguageModel,
    *,
    layer: int | None = None,
    site: str | None = None,
    force: bool = False,
) -> HookPoint:
    """Where an SAE reads and writes in a model, from its own names and from what was asked.

    Raises UserError when the SAE does not fit: another width, a layer that the model does not have,
    or training on another model's weights (unless `force`). Raises UsageError when it names no
    layer and none is asked for, or when it names another layer or site than asked.
    """
    spec, name = sae.spec, sae.source or "(in memory)"
    reads_heads = _own_site(sae) == HEADS_OUT
    width = heads_width(lm) if reads_heads else lm.d_model
    if spec.d_model != width:
        what = "heads of total width " if reads_heads else ""
        raise UserError(
            f"`sae` {name} has d_model {spec.d_model}, `model` {lm.name} has {what}{width}: "
            "use the model it was trained on"
        )
    trained_on = (spec.metadata.get("saesteer") or {}).get("model", {}).get("hash")
    if trained_on and trained_on != lm.fingerprint and not force:
        raise UserError(
            f"`sae` {name} was trained on {spec.model_name} with weights {trained_on}, "
            f"`model` {lm.name} has weights {lm.fingerprint}: use that model, or `force`"
        )
    chosen = spec.layer if layer is None else layer_index(lm, layer)
    if spec.layer is not None and chosen != spec.layer:
        raise _other_layer(sae, layer)
    check_place(sae, layer, site)
    assert chosen is not None  # or check_place had raised
    if chosen >= lm.n_layers:
        raise UserError(
            f"`sae` {name} reads layer {chosen}, `model` {lm.name} has {lm.n_layers} blocks: "
            "use the model it was trained on"
        )
    own_site = _own_site(sae)
    wanted = None if site is None else site.replace("{layer}", str(chosen))
    if wanted is None or own_site is None or wanted == own_site:
        return resolve_site(lm, chosen, wanted or own_site or "resid_post")
    asked, own = resolve_site(lm, chosen, wanted), resolve_site(lm, chosen, own_site)
    if (asked.module, asked.side) != (own.module, own.side):
        raise UsageError(
            f"`site` {site} conflicts with `sae` {name}, which reads {own_site}: leave `site` out"
        )
    return asked


@contextlib.contextmanager
def hooked(point: HookPoint, edit: Callable[[Residual], Residual | None]) -> Iterator[None]:
    """Call `edit` with the tensor at the hook point for as long as the context is open.

    `edit` gets `[batch, seq, d_model]` and returns a new tensor to let pass, or None to leave the
    old one. The hook is removed when the context ends, also by an exception. Raises UsageError in
    the pass where a tensor of another form comes by (several streams side by side).

    Hooks come in the order in which they were made, but those with which transformers records
    `hidden_states` come last: what they record was edited, whenever it was first asked for.
    """
    edit = _of_three_dimensions(point, edit)
    module = point.module
    if point.side == "input":
        handle = module.register_forward_pre_hook(_input_hook(edit), with_kwargs=True)
        order: Any = module._forward_pre_hooks
    else:
        handle = module.register_forward_hook(_output_hook(edit))
        order = module._forward_hooks
    for number, hook in list(order.items()):
        if (getattr(hook, "__module__", None) or "").startswith("transformers."):
            order.move_to_end(number)
    try:
        yield
    finally:
        handle.remove()


def _of_three_dimensions(
    point: HookPoint, edit: Callable[[Residual], Residual | None]
) -> Callable[[Tensor], Tensor | None]:
    def checked(h: Tensor) -> Tensor | None:
        if h.dim() != 3:
            raise UsageError(
                f"`site` {point.site} of block {point.layer} passes a tensor of shape "
                f"{list(h.shape)}, not one row for each token of each text: the model keeps "
                "several streams side by side, or none of this form; give a module path inside "
                "the block"
            )
        return edit(h)

    return checked


def _input_hook(edit: Callable[[Residual], Residual | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = edit(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = edit(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook


def _output_hook(edit: Callable[[Residual], Residual | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return edit(output)
        first = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
        new = edit(first)
        return None if new is None else _with_first(output, new)

    return hook


def _with_first(output: Any, new: Tensor) -> Any:
    """What a module gave, with another first tensor; what its parts are called stays."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: new})
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: new})
    if isinstance(output, Mapping):
        return {**output, next(iter(output)): new}
    return (new, *output[1:])


@contextlib.contextmanager
def capture(points: Sequence[HookPoint], *, stop: bool = False) -> Iterator[dict[Any, Tensor]]:
    """Collect the activations of the latest forward pass at each point, by `HookPoint.key`.

    Copies are taken while the pass goes on, because some blocks (Falcon) add to these tensors in
    place later.

    With `stop`, the forward pass ends after the last point by raising `StopForward`, which the
    caller catches (see `run_to`).
    """
    seen: dict[Any, Tensor] = {}

    def reader(point: HookPoint) -> Callable[[Residual], None]:
        def read(h: Residual) -> None:
            ends = stop and len({*seen, point.key}) == len(points)
            seen[point.key] = h.detach() if ends else h.detach().clone()
            if ends:
                raise StopForward

        return read

    with contextlib.ExitStack() as stack:
        for point in points:
            stack.enter_context(hooked(point, reader(point)))
        yield seen


def run_to(lm: LanguageModel, points: Sequence[HookPoint], **inputs: Any) -> dict[Any, Tensor]:
    """Run the text tower up to the last of `points`; returns the activations at each of them.

    Blocks after the last point do not run and no logits are computed. Raises UsageError for a point
    that the text tower never reaches.
    """
    with capture(points, stop=True) as seen:
        with contextlib.suppress(StopForward):
            lm.text_model(**inputs, use_cache=False)
    for point in points:
        if point.key not in seen:
            raise UsageError(
                f"`site` {point.site} is never reached in a pass over text of {lm.name}: give a "
                f"module inside {lm.blocks_path}"
            )
    return seen
