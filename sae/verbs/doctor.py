"""Checks that hooks read and write where they should on a model; predicts what a job would cost."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError, reason_of
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.activations.prefetch import BATCHES_AHEAD
from saesteer.sae.config import (
    HarvestConfig,
    MetricsConfig,
    Progress,
    TextConfig,
    TrainConfig,
)
from saesteer.sae.model.attention import head_tap, heads
from saesteer.sae.model.hooks import (
    HEADS_OUT,
    HookPoint,
    capture,
    hooked,
    resolve_site,
    run_to,
    sae_hook_point,
)
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.model.sites import find_site
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.runs.harvest_prediction import predict_harvest
from saesteer.sae.runs.memory_use import model_bytes, training_memory
from saesteer.sae.training.architectures import architecture_named
from saesteer.sae.verbs.metrics import metrics

# Enough tokens for two digits of an SAE's FVU, measured within seconds.
_SAE_TOKENS = 4096


def doctor(
    model: str | LanguageModel,
    *,
    layer: int | None = None,
    site: str | None = None,
    sae: str | SAE | None = None,
    tokens: int = 200_000,
    context: int = 256,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = show_progress,
) -> dict[str, Any]:
    """Examine one hook point of a model and predict what harvesting and training would take.

    Checks: the hook reads what the model itself reports there; attn_out, mlp_out and resid_mid add
    up to what the block returns; a stored row is what a whole pass computes; handing back the same
    values changes no logit; adding a unit vector changes the site by that vector, nothing below it,
    and the logits; cached and uncached passes agree; attention heads are read and written one by
    one; the hook is gone afterwards; an SAE, when given, fits and explains some text (`force`: also
    one that was trained on other weights).

    Returns:
        `model`, `layer`, `site`, `checks` (`name`, `ok`, `detail`) and `predictions` (tokens per
        second, seconds, disk and memory for `tokens` activations).
    """
    lm = as_language_model(model, device=device, dtype=dtype)
    if sae is not None:
        sae = sae if isinstance(sae, SAE) else load_sae(sae, device=lm.device)
        point = sae_hook_point(sae, lm, layer=layer, site=site, force=force)
    else:
        # The middle is where most SAEs are trained.
        chosen = lm.n_layers // 2 if layer is None else layer
        point = resolve_site(lm, chosen, site or "resid_post")
    ids = _sample_ids(lm)
    checks = [_run_check(check, lm, point, ids) for check in _CHECKS]
    if sae is not None:
        checks.append(_check_sae(lm, sae, point, force, progress))
    return {
        "model": {**model_facts(lm), "blocks": lm.blocks_path, "device": str(lm.device)},
        "layer": point.layer,
        "site": point.site,
        "module": f"{point.side} of {point.module_path}",
        "checks": checks,
        "predictions": _predict(lm, point, tokens, context, batch_size, progress),
    }


Ids = Int[Tensor, "rows seq"]
Check = Callable[[LanguageModel, HookPoint, Ids], str]


def _sample_ids(lm: LanguageModel) -> Ids:
    """Two short rows of ordinary tokens, without special ones."""
    words = "The bridge over the river was closed for repairs until the end of the week."
    text = torch.tensor(lm.tokenizer(words)["input_ids"])
    text = text[~torch.isin(text, lm.special_ids)]
    return torch.stack([text, text.flip(0)]).to(lm.device)


def _run_check(check: Check, lm: LanguageModel, point: HookPoint, ids: Ids) -> dict[str, Any]:
    name = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
    try:
        with torch.inference_mode():
            detail = check(lm, point, ids)
    except (_Failed, UserError) as failure:
        return {"name": name, "ok": False, "detail": str(failure)}
    except Exception as failure:  # a model that raises under a hook has failed the check
        detail = f"{type(failure).__name__}: {reason_of(failure)}"
        return {"name": name, "ok": False, "detail": detail}
    return {"name": name, "ok": True, "detail": detail}


class _Failed(Exception):
    """A check has failed; the message says how."""


def _logits(lm: LanguageModel, ids: Ids) -> Float[Tensor, "rows seq vocabulary"]:
    logits: Tensor = lm.model(input_ids=ids, use_cache=False).logits
    return logits


def _reads_what_the_model_reports(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """The hook reads what the model itself reports."""
    if point.site not in ("resid_post", "resid_pre"):
        return "the model reports nothing at this site to compare with"
    index = point.layer + (point.site == "resid_post")
    if index == lm.n_layers:
        # The last entry of hidden_states is after the final norm: apply that norm to ours as well.
        seen = run_to(lm, [point], input_ids=ids)[point.key]
        if lm.final_norm is None:
            return "the last block's output is not reported before the final norm"
        seen = lm.final_norm(seen)
    else:
        seen = run_to(lm, [point], input_ids=ids)[point.key]
    reported = lm.text_model(
        input_ids=ids, output_hidden_states=True, use_cache=False
    ).hidden_states[index]
    worst = float((seen.float() - reported.float()).abs().max())
    allowed = 1e-3 * float(reported.float().abs().max())
    told = f"hidden_states[{index}]: largest difference {worst:.1g}, allowed {allowed:.1g}"
    if worst > allowed:
        raise _Failed(f"differs from {told}")
    return f"equals {told}"


def _adds_up(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """What the block adds up to proves the site."""
    if point.site not in ("attn_out", "mlp_out", "resid_mid"):
        return "not a site inside a block: nothing is added up"
    found = find_site(lm, point.layer, point.site)
    return f"{found.identity}: off by {found.off:.1g}, allowed {found.allowed:.1g}"


def _stored_is_recomputed(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """A row that is stored is the row that a whole pass computes."""
    stored = run_to(lm, [point], input_ids=ids)[point.key]
    with capture([point]) as seen:
        _logits(lm, ids)
    if not torch.equal(stored, seen[point.key]):
        off = float((stored.float() - seen[point.key].float()).abs().max())
        raise _Failed(f"differs by up to {off:.3g}, allowed 0")
    return f"bit-equal, {list(stored.shape)} for {list(ids.shape)} tokens"


def _null_edit(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """A null edit changes no logit."""
    before = _logits(lm, ids)
    with hooked(point, lambda h: h.clone()):
        during = _logits(lm, ids)
    if not torch.equal(before, during):
        raise _Failed(f"logits moved by up to {float((before - during).abs().max()):.3g}")
    return "logits are bit-equal"


def _unit_edit(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """A unit edit moves the site by the unit vector, and the logits, and nothing below."""
    below = [resolve_site(lm, layer) for layer in range(point.layer)]
    # The next block's input belongs to another module, so it shows that the edit is passed on.
    after = [resolve_site(lm, point.layer + 1, "resid_pre")] if _feeds_a_block(lm, point) else []
    with capture([*below, point]) as seen:
        before = _logits(lm, ids)
        lower = dict(seen)
    plain = lower.pop(point.key)
    direction = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0))
    direction = (direction / direction.norm()).to(lm.device)
    # Longer than the residual's rounding error, also in bfloat16.
    step = direction * plain.float().norm(dim=-1, keepdim=True).mean()
    edited = (plain.float() + step).to(plain.dtype)

    # Hooks run in the order in which they were opened: the second one sees what the first passed.
    with (
        hooked(point, lambda h: (h.float() + step).to(h.dtype)),
        capture([*below, *after, point]) as seen,
    ):
        logits = _logits(lm, ids)
    moved = [key for key in lower if not torch.equal(lower[key], seen[key])]
    if moved:
        raise _Failed(f"blocks below the edit changed: {moved}")
    for where in (point, *after):
        if not torch.equal(seen[where.key], edited):
            off = float((seen[where.key].float() - edited.float()).abs().max())
            raise _Failed(f"{where.side} of {where.module_path} is off by up to {off:.3g}")
    if torch.equal(before, logits):
        raise _Failed("the logits did not change: the edit never reached the model")
    delta = (seen[point.key].float() - plain.float()) @ direction
    asked, got = float(step.norm()), float(delta.mean())
    return (
        f"asked for {asked:.3g} along the vector, moved by {got:.3g}, bit-equal to the sum; "
        f"{len(below)} blocks below unchanged"
    )


def _feeds_a_block(lm: LanguageModel, point: HookPoint) -> bool:
    return point.site == "resid_post" and point.layer + 1 < lm.n_layers


def _cache_agrees(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """Cached and uncached passes agree at the site."""
    whole = run_to(lm, [point], input_ids=ids)[point.key][:, -1]
    past = lm.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    with capture([point]) as seen:
        lm.model(input_ids=ids[:, -1:], past_key_values=past, use_cache=True)
    worst = float((whole.float() - seen[point.key][:, -1].float()).abs().max())
    # A cached pass multiplies in another order, so it differs by rounding in every block.
    slack = (0.1 if lm.dtype != torch.float32 else 1e-3) * float(whole.float().abs().max())
    if worst > slack:
        raise _Failed(f"the last position differs by up to {worst:.3g}")
    return f"largest difference {worst:.1g}, allowed {slack:.1g}"


def _heads_are_apart(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """The attention heads of the block are read and written one by one."""
    try:
        layout = heads(lm)
    except UsageError as refusal:
        return str(refusal)
    place = point.layer, "z"
    seen: list[Tensor] = []
    head = layout.n_heads - 1

    def raise_one_head(z: Tensor) -> Tensor:
        seen.append(z)
        moved = z.clone()
        moved[:, :, head] += z.float().norm(dim=-1).mean().to(z.dtype)
        seen.append(moved)
        return moved

    projected = resolve_site(lm, point.layer, HEADS_OUT)
    with head_tap(lm) as tap:
        before = _logits(lm, ids)
        tap.edits[place] = lambda z: z.clone()
        if not torch.equal(before, _logits(lm, ids)):
            raise _Failed("a null edit of z changed the logits")
        tap.edits[place] = raise_one_head
        with capture([projected]) as entered:
            after = _logits(lm, ids)
    moved = entered[projected.key].unflatten(-1, (layout.n_heads, layout.d_head))
    others = [h for h in range(layout.n_heads) if h != head]
    apart = torch.equal(moved[:, :, others], seen[0][:, :, others])
    if not (apart and torch.equal(moved, seen[1])):
        raise _Failed(f"an edit of head {head} reached other heads, or not the out-projection")
    if torch.equal(before, after):
        raise _Failed(f"an edit of head {head} never reached the logits")
    return (
        f"{layout.n_heads} heads of width {layout.d_head}, {layout.n_kv_heads} of keys and values; "
        f"a null edit is bit-equal, an edit of head {head} moves it alone"
    )


def _hooks_are_gone(lm: LanguageModel, point: HookPoint, ids: Ids) -> str:
    """No hook is left behind."""

    def hooks() -> int:
        return len(point.module._forward_hooks) + len(point.module._forward_pre_hooks)

    # The library leaves its own hooks after it was asked for hidden_states: count only ours.
    before = hooks()
    with hooked(point, lambda h: None):
        inside = hooks() - before
    run_to(lm, [point], input_ids=ids)
    left = hooks() - before
    if inside != 1 or left:
        raise _Failed(f"{left} hooks are still on {point.module_path}")
    return f"none of ours on {point.module_path}"


_CHECKS: tuple[Check, ...] = (
    _reads_what_the_model_reports,
    _adds_up,
    _stored_is_recomputed,
    _null_edit,
    _unit_edit,
    _cache_agrees,
    _heads_are_apart,
    _hooks_are_gone,
)


def _check_sae(
    lm: LanguageModel, sae: SAE, point: HookPoint, force: bool, progress: Progress
) -> dict[str, Any]:
    name = "The SAE reconstructs this site"
    config = MetricsConfig(tokens=_SAE_TOKENS, bootstrap=100)
    try:
        measured = metrics(
            sae, lm, config, layer=point.layer, site=point.site, force=force, progress=progress
        )
    except UserError as failure:
        return {"name": name, "ok": False, "detail": str(failure)}
    fvu, l0 = measured["fvu"]["value"], measured["l0"]["value"]
    detail = f"FVU {fvu:.3f}, L0 {l0:.1f} on {measured['tokens']} tokens of python-docs"
    # An SAE at another hook point reconstructs worse than the mean activation does.
    return {"name": name, "ok": fvu < 1, "detail": detail}


def _predict(
    lm: LanguageModel,
    point: HookPoint,
    tokens: int,
    context: int,
    batch_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Time a few batches and extrapolate; compute bytes."""
    text = TextConfig(context=context, batch_size=batch_size)
    config = HarvestConfig(layers=(point.layer,), site=point.site, tokens=tokens, text=text)
    prediction = predict_harvest(lm, config, progress)
    d_sae, defaults = 8 * lm.d_model, TrainConfig()
    architecture = architecture_named(defaults.arch).from_config(defaults)[0]
    training = training_memory(
        [architecture.parameter_count(lm.d_model, lm.d_model, d_sae)],
        d_sae,
        lm.d_model,
        defaults,
        lm.device,
        buffer_tokens=min(defaults.buffer_tokens, max(1, tokens // 2)),
        row_bytes=lm.d_model * lm.dtype.itemsize,
        batches_ahead=BATCHES_AHEAD,
    )
    return {
        "tokens": tokens,
        "harvest_tokens_per_second": round(prediction["tokens_per_second"], 1),
        "harvest_seconds": round(prediction["seconds"], 1),
        "harvest_memory_bytes": prediction["memory_bytes"],
        "shard_bytes": prediction["bytes"],
        "model_bytes": model_bytes(lm),
        "d_sae": d_sae,
        "training_bytes": training.saes + training.step,
        "training_buffer_bytes": training.buffer,
    }
