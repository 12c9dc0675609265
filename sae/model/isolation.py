"""Proof that `isolate_documents` keeps the documents of a context apart in a model.

Positions that start anew tell most models where a document begins, and their masks follow. Some
take no notice (OPT, BLOOM), and recurrent layers and convolutions know no masks (Mamba, Qwen3-Next,
LFM2): there the second document would be read after the first, whatever was asked for.
"""

import weakref

import torch
from torch import Tensor, nn

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.passing import without_hooks

_FIRST, _SECOND = 10, 14
_proved: "weakref.WeakKeyDictionary[LanguageModel, str]" = weakref.WeakKeyDictionary()


def prove_isolation(lm: LanguageModel) -> None:
    """Raise UserError unless the second document of a context is read as if it were alone.

    Three short passes over made-up tokens, once for each model: with two different first documents
    nothing may change in the second, and its rows must be those of the document by itself.
    """
    if lm not in _proved:
        _proved[lm] = _what_leaks(lm)
    if _proved[lm]:
        raise UserError(
            f"`isolate_documents` does not work with {lm.name}: {_proved[lm]}; leave it out, or "
            "give texts of one context each"
        )


def _what_leaks(lm: LanguageModel) -> str:
    """What is wrong; empty when documents are kept apart."""
    vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])
    spread = torch.arange(2 * (_FIRST + _SECOND)).reshape(2, -1) * 7 + 5
    other = spread.clone()
    other[:, :_FIRST] = spread[:, :_FIRST] * 3 + 11
    positions = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)]).expand(2, -1)
    try:
        with without_hooks(lm), torch.no_grad():
            one = _last_rows(lm, spread % vocabulary, positions)
            two = _last_rows(lm, other % vocabulary, positions)
            alone = _last_rows(lm, spread[:, _FIRST:] % vocabulary, positions[:, _FIRST:])
    except Exception as error:  # models raise what they like
        said = " ".join(str(error).split())[:120] or type(error).__name__
        return f"a pass with positions that start anew failed ({said})"
    exact = one.dtype in (torch.float32, torch.float64)
    # What is masked has weight 0; experts multiply in other groups, which rounds otherwise.
    moved, allowed = _off(one, two), 1e-5 if exact else 0.5 * torch.finfo(one.dtype).eps
    if moved > allowed:
        return (
            f"when the first document of a context changes, the second moves by {moved:.2g} of "
            f"its length ({allowed:.2g} are allowed)"
        )
    # Products of other shapes round otherwise, through all the blocks.
    moved, allowed = _off(one, alone), 1e-3 if exact else 16 * torch.finfo(one.dtype).eps
    if moved > allowed:
        return (
            f"a second document in a context is off by {moved:.2g} of its length from the "
            f"document alone ({allowed:.2g} are allowed)"
        )
    return ""


def _last_rows(lm: LanguageModel, ids: Tensor, positions: Tensor) -> Tensor:
    """What the last block that runs gives at the last `_SECOND` tokens."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        values = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
        found[:] = [values[..., -_SECOND:, :].detach().clone()]

    def stop(module: nn.Module, args: object) -> None:
        raise _Stop

    handles = [block.register_forward_hook(keep) for block in _with_weights(lm)]
    handles += [block.register_forward_pre_hook(stop) for block in lm.blocks[len(handles) :]]
    try:
        lm.text_model(
            input_ids=ids.to(lm.device), position_ids=positions.to(lm.device), use_cache=False
        )
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[-1]


class _Stop(Exception):
    """The weights of the next block were freed."""


def _with_weights(lm: LanguageModel) -> list[nn.Module]:
    """The blocks that a pass can run, of which some may not run without an image (Mllama)."""
    if getattr(lm.model, "hf_device_map", None):
        return list(lm.blocks)
    return [
        block for block in lm.blocks if not any(weight.is_meta for weight in block.parameters())
    ]


def _off(one: Tensor, other: Tensor) -> float:
    difference = (one.double() - other.double()).norm()
    return float(difference / one.double().norm().clamp_min(1e-30))
