"""What passes between the blocks of a model: looked at once, over a few made-up tokens.

A site is a place where each token of each text has one row, once in a pass. Most blocks pass
`[batch, seq, d_model]`. Some pass several streams side by side (DeepSeek V4, Reformer), or the
sequence before the batch (XLNet); some run several times in a pass (HRM), or not without an image
(Mllama). What was read or edited there would be something else than the name says.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, reason_of
from saesteer.sae.model.language_model import LanguageModel

_ROWS, _TOKENS = 2, 12


@dataclass(eq=False)
class _Passed:
    """What passed one module."""

    runs: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By side, of the latest run; a side without a tensor is left out."""
    streams: int = 0
    """Tensors of the first one's shape among what it gives."""
    given: Tensor | None = None
    """What it gave; taken away by the next block."""
    passed_on: bool | None = None
    """Whether that is what the next block took; None where none came next."""


def check_block(lm: LanguageModel, layer: int, site: str) -> None:
    """Refuse a site of a block that does not pass one row for each token, once in a pass.

    Raises UsageError.
    """
    if lm not in _known:
        found = _look(lm, {str(i): block for i, block in enumerate(lm.blocks)}, chained=True)
        if isinstance(found, dict) and "0" not in found:
            return  # its weights were freed or never loaded: nothing can be run
        _known[lm] = found
    seen = _known[lm]
    if isinstance(seen, str):
        raise UsageError(
            f"{lm.name} cannot be read: a pass over a few tokens failed ({seen}); give a causal "
            "language model that runs on text alone"
        )
    if str(layer) not in seen:
        return  # freed
    passed, kind = seen[str(layer)], type(lm.blocks[layer]).__name__
    once = [int(i) for i, other in seen.items() if other.runs == 1]
    choose = f"choose `layer` {_ranges(once)}" if once else "give another model"
    if passed.runs == 0:
        raise UsageError(
            f"block {layer} of {lm.name} does not run in a pass over text alone: {choose}"
        )
    if passed.runs > 1:
        raise UsageError(
            f"block {layer} of {lm.name} runs {passed.runs} times in one pass, so that no token "
            f"has one row there: {choose}"
        )
    for side in ("input", "output"):
        shape = passed.shapes.get(side)
        if shape != (_ROWS, _TOKENS, lm.d_model):
            came = "no tensor first" if shape is None else f"a tensor of shape {list(shape)}"
            raise UsageError(
                f"`site` {site} does not exist in the {kind} blocks of {lm.name}: their {side} is "
                f"{came} for {_ROWS} texts of {_TOKENS} tokens, not one row of {lm.d_model} "
                f"numbers for each token; {_inside(lm, layer)}"
            )
    if passed.streams > 1:
        raise UsageError(
            f"`site` {site} does not exist in the {kind} blocks of {lm.name}: they pass "
            f"{passed.streams} streams of {lm.d_model} numbers for each token, not one; "
            f"{_inside(lm, layer)}"
        )
    if {other.passed_on for other in seen.values()} - {None} == {False}:
        raise UsageError(
            f"`blocks` {lm.blocks_path} are no blocks of {lm.name}: what one {kind} gives is not "
            "what the next one takes; give the list of whole blocks, or another model"
        )


def _inside(lm: LanguageModel, layer: int) -> str:
    """What can be read of a block that has no site: a module in it, if one passes such rows."""
    inner = {path: module for path, module in lm.blocks[layer].named_modules() if path}
    found = _look(lm, inner)
    wanted = (_ROWS, _TOKENS, lm.d_model)
    rows = [
        path
        for path, passed in (found.items() if isinstance(found, dict) else ())
        if passed.runs == 1 and passed.shapes.get("output") == wanted
    ]
    if not rows:
        return "give another model"
    first = min(rows, key=lambda path: (path.count("."), "norm" in path.lower()))
    return f"give a module path inside the block, such as {lm.blocks_path}.{{layer}}.{first}"


def check_module(lm: LanguageModel, module: nn.Module, side: str, site: str) -> None:
    """Refuse a module that does not pass one row, of any width, for each token, once in a pass.

    A module that such a pass never reaches is left to the pass that will be made. Raises
    UsageError.
    """
    known = _known_modules.setdefault(lm, {})
    if module not in known:
        found = _look(lm, {site: module})
        looked = found.get(site) if isinstance(found, dict) else None
        if looked is None or looked.runs == 0:
            return
        known[module] = looked
    passed = known[module]
    if passed.runs > 1:
        raise UsageError(
            f"`site` {site} of {lm.name} runs {passed.runs} times in one pass, so that no token "
            "has one row there: give another module"
        )
    shape = passed.shapes.get(side)
    if shape is None or len(shape) != 3 or shape[:2] != (_ROWS, _TOKENS):
        came = "no tensor first" if shape is None else f"a tensor of shape {list(shape)}"
        raise UsageError(
            f"`site` {site} of {lm.name} passes {came} for {_ROWS} texts of {_TOKENS} tokens, not "
            "one row for each token of each text: give another module"
        )


_known: "weakref.WeakKeyDictionary[LanguageModel, dict[str, _Passed] | str]" = (
    weakref.WeakKeyDictionary()
)
_known_modules: "weakref.WeakKeyDictionary[LanguageModel, dict[nn.Module, _Passed]]" = (
    weakref.WeakKeyDictionary()
)
"""Modules by themselves: a pass through the whole model for each."""


def few_tokens(lm: LanguageModel, rows: int = _ROWS, tokens: int = _TOKENS) -> Tensor:
    """Token ids that any model has, on its device."""
    vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(rows * tokens) * 7 + 5) % vocabulary
    return ids.reshape(rows, tokens).to(lm.device)


def _look(
    lm: LanguageModel, modules: dict[str, nn.Module], *, chained: bool = False
) -> dict[str, _Passed] | str:
    """What passes these modules in one pass, as far as the weights are there; or why it failed.

    With `chained`, what each gives is compared with what the next one takes.
    """
    found: dict[str, _Passed] = {}
    before: list[_Passed] = []

    def entering(passed: _Passed, args: Any, kwargs: dict[str, Any]) -> None:
        passed.runs += 1
        first = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(first, Tensor):
            return
        passed.shapes["input"] = tuple(first.shape)
        if before and before[-1].given is not None:
            last = before.pop()
            last.passed_on = _equal(last.given, first)
            last.given = None

    def leaving(passed: _Passed, output: Any) -> None:
        every = [output] if isinstance(output, Tensor) else list(tensors_of(output))
        if not every:
            return
        passed.shapes["output"] = tuple(every[0].shape)
        passed.streams = sum(other.shape == every[0].shape for other in every)
        if chained:
            # A copy: some blocks (Falcon) go on adding to this tensor.
            passed.given = every[0].detach().clone()
            before.append(passed)

    with without_hooks(lm), torch.no_grad(), contextlib.ExitStack() as stack:
        for block in lm.blocks:
            if _freed(lm, block):
                stack.callback(block.register_forward_pre_hook(_stop).remove)
        for name, module in modules.items():
            if _freed(lm, module):
                continue
            passed = found.setdefault(name, _Passed())
            first = module.register_forward_pre_hook(
                lambda _, args, kwargs, passed=passed: entering(passed, args, kwargs),
                with_kwargs=True,
            )
            last = module.register_forward_hook(
                lambda _, args, output, passed=passed: leaving(passed, output)
            )
            stack.callback(first.remove)
            stack.callback(last.remove)
        if not found:
            return found
        try:
            lm.text_model(input_ids=few_tokens(lm), use_cache=False)
        except _Stop:
            pass
        except Exception as error:  # models raise what they like
            return f"{type(error).__name__}: {reason_of(error, 120)}"
    return found


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors that a module gives, if the first thing that it gives is one."""
    if isinstance(output, Mapping):
        output = tuple(output.values())  # the library's outputs with names
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        yield from (value for value in output if isinstance(value, Tensor))


def _equal(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors hold the same; where both are not a number, they do."""
    if one is None or one.shape != other.shape:
        return False
    return torch.allclose(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


class _Stop(Exception):
    """No weights for what comes next."""


def _stop(module: nn.Module, args: Any) -> None:
    raise _Stop


def _freed(lm: LanguageModel, module: nn.Module) -> bool:
    if getattr(lm.model, "hf_device_map", None):
        return False  # accelerate brings the weights when they are needed
    return any(weight.is_meta for weight in module.parameters())


def _ranges(layers: list[int]) -> str:
    """`0, 3-7`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


@contextlib.contextmanager
def without_hooks(lm: LanguageModel) -> Iterator[None]:
    """No hook of anybody's fires meanwhile: an edit that is under way is not part of the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    kept = [
        (table, dict(table))
        for module in lm.text_model.modules()
        for table in (getattr(module, kind) for kind in kinds)
        if table
    ]
    for table, _ in kept:
        table.clear()
    try:
        yield
    finally:
        for table, entries in kept:
            table.update(entries)
