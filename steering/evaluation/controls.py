"""Controls for a plan: edits of the same length with other directions, or at another place.

- random latents of the same SAE, or random directions, at the same ||delta||;
- the mean-difference vector of the same samples, at the same ||delta||;
- the constant logit bias that the edit would be if it reached the unembedding unchanged.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.checkpoints.sparse_autoencoder import token_scale
from saesteer.sae.activations.prompt_reader import PromptReader
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.generation import generate
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.plans.directions import Passage, difference_of_means
from saesteer.steering.plans.part import weighted_sum
from saesteer.steering.plans.plan import Plan, PlannedLatent, SAEIdentity
from saesteer.steering.ranking.config import RankConfig
from saesteer.steering.tasks.task import Placement, Task, compose

_AS_RANKED = RankConfig()
"""Replies are sampled with the settings that rankings have by default, so that a ranking and the
controls of its plan share them where they are kept."""


def delta_vector(plan: Plan) -> Float[Tensor, " d_model"]:
    """What an adding plan adds to each residual, in float64.

    With unit `rel` it is per unit of ||h||, and with an SAE that normalises tokens per unit of the
    token's scale.

    Raises UsageError for a plan that does not add the same vector everywhere.
    """
    part = plan.part
    if not part.does.adds_fixed_vector:
        raise UsageError(
            f"the controls random, meandiff and logit-bias are edits of the same ||delta||, which "
            f"`method` {part.method} does not fix: leave them out of `controls`"
        )
    return part.added_vector()


def with_directions(
    plan: Plan,
    directions: Float[Tensor, "n d_model"],
    ids: Sequence[int],
    source: str,
    weights: Sequence[float],
) -> Plan:
    """The plan with other directions in these proportions, at the same ||delta|| and scope.

    Args:
        source: where the directions come from; stored in place of the plan's SAE.
        weights: dose of each direction, before the sum is scaled to the plan's ||delta||.
    """
    length = float(delta_vector(plan).norm())
    total = weighted_sum(weights, directions)
    if not float(total.norm()) > 0:
        raise UserError(f"the directions of {source} cancel out, so there is nothing to add")
    relative = plan.unit == "rel"
    factor = 1.0 if relative else length / float(total.norm())
    return plan.with_changes(
        sae=plan.sae
        if source == plan.sae.source
        # Lengths keep their unit, also where it is the scale of each token.
        else SAEIdentity(source, "", normalize_activations=plan.sae.normalize_activations),
        latents=tuple(
            PlannedLatent(id=i, value=weight * factor)
            for i, weight in zip(ids, weights, strict=True)
        ),
        directions=directions.float().clone(),
        unit="rel" if relative else "raw",
        scale=plan.scale if relative else 1.0,
        beta=0.0,
        W_enc=None,
        b_enc=None,
        threshold=None,
        metrics={},
    )


def random_plan(plan: Plan, sae: SAE | None, seed: int = 0) -> Plan:
    """The plan with as many random latents of its SAE, or random directions without an SAE.

    Latents of the plan, and latents whose decoder row is 0, are never drawn. Raises UserError when
    the SAE has too few others.
    """
    doses = plan.doses()
    generator = random.Random(seed)
    if sae is None:
        drawn = torch.randn(plan.directions.shape, generator=torch.Generator().manual_seed(seed))
        unit = drawn / drawn.norm(dim=1, keepdim=True)
        return with_directions(plan, unit, range(len(doses)), "random directions", doses)
    taken = set(plan.ids)
    rows = sae.W_dec.detach().cpu().float()
    pool = [i for i in torch.nonzero(rows.norm(dim=1) > 0).flatten().tolist() if i not in taken]
    if len(pool) < len(doses):
        raise UserError(
            f"the SAE has {len(pool)} latents besides the plan's, too few to draw {len(doses)} at "
            "random: leave random out of `controls`"
        )
    ids = generator.sample(pool, len(doses))
    return with_directions(plan, rows[ids], ids, plan.sae.source, doses)


def mean_difference_plan(
    lm: LanguageModel,
    plan: Plan,
    task: Task,
    *,
    contents: int | None = None,
    seed: int | None = None,
    sampled: RankConfig = _AS_RANKED,
    progress: Progress = no_progress,
) -> Plan:
    """The mean residual of instructed samples minus that of plain ones, at the plan's ||delta||.

    The samples are train contents, read at the same place as for the plan's ranking: for replies at
    the last prompt token and every token of the model's own sampled replies (only instructed ones
    that pass the check, if any does), else at the last token of the user's text or of the prompt.
    `sampled` says how many contents are used and how replies to them are sampled; `contents` and
    `seed` stand in place of its own. Raises UserError for a task without train contents.
    """
    changed: dict[str, Any] = {"contents": contents, "seed": seed}
    sampled = replace(sampled, **{k: v for k, v in changed.items() if v is not None})
    point = resolve_site(lm, plan.layer, plan.site)
    read = str(plan.metrics.get("read", "last"))
    placement: Placement = "pre" if plan.metrics.get("position") == "pre" else "post"
    plain = list(task.contents.get("train", ()))[: sampled.contents]
    if not plain:
        raise UserError(
            f"task {task.name!r} has no train contents to take a mean difference over: leave "
            "meandiff out of `controls`"
        )
    wordings = (
        task.select_variants[: sampled.reply_variants] if read == "reply" else task.select_variants
    )
    pairs = [
        (content, compose(content, wording.text, placement))
        for wording in wordings
        for content in plain
    ]
    kinds = []
    for kind, texts in (("instructed", [text for _, text in pairs]), ("plain", plain)):
        if read == "reply":
            sources = [content for content, _ in pairs] if kind == "instructed" else None
            kinds.append(_replies(lm, task, texts, sources, sampled, progress, kind))
        else:
            prompts = [encode_prompt(lm, text, chat=lm.has_chat_template) for text in texts]
            kinds.append([Passage.last_of(prompt, read) for prompt in prompts])
    direction = difference_of_means(lm, point, *kinds).vector
    unit = (direction / direction.norm())[None].float()
    return with_directions(plan, unit, [0], "mean difference", [1.0])


def _replies(
    lm: LanguageModel,
    task: Task,
    texts: Sequence[str],
    sources: Sequence[str] | None,
    sampled: RankConfig,
    progress: Progress,
    kind: str,
) -> list[Passage]:
    """Prompts with sampled replies, to be read from the last prompt token on.

    With `sources`, only those whose reply passes the check, or all of them when none does.
    """
    prompts = [encode_prompt(lm, text, chat=lm.has_chat_template) for text in texts]
    stage = f"mean difference: {kind} replies"
    progress(stage, 0, len(texts), "replies")
    replies = generate(
        lm,
        prompts,
        max_new_tokens=sampled.max_new_tokens,
        temperature=sampled.temperature,
        top_p=sampled.top_p,
        seed=sampled.seed,
        batch_size=sampled.batch_size,
    )
    progress(stage, len(texts), len(texts), "replies")
    rows = [
        Passage(
            [*prompt.token_ids, *reply.token_ids],
            len(prompt) - 1,
            len(prompt) + len(reply.token_ids),
        )
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    if sources is None:
        return rows
    passing = [
        row
        for row, reply, source in zip(rows, replies, sources, strict=True)
        if task.verdict(reply.text, source) is Verdict.PASS
    ]
    return passing or rows


def logit_bias(lm: LanguageModel, plan: Plan, texts: Sequence[str]) -> Float[Tensor, " vocabulary"]:
    """The plan's vector through the final norm and the unembedding, as one constant bias.

    At the last block, logits(h + v) = logits(h) rms(h) / rms(h + v) + W_U (g v) / rms(h + v) for
    an RMS norm with gain g. This bias is the last term with the median of rms(h + v) over the last
    prompt tokens of `texts` (for a layer norm, of the standard deviation). At earlier blocks it is
    the direct path alone, without what later blocks make of the edit.
    """
    norm = lm.final_norm
    last = resolve_site(lm, lm.n_layers - 1, "resid_post")
    prompts = [encode_prompt(lm, text, chat=lm.has_chat_template) for text in texts]
    read = PromptReader(lm, [last]).read([prompt.token_ids for prompt in prompts])
    h = torch.stack([prompt.rows[last.key][-1] for prompt in read])
    vector = delta_vector(plan).float().to(h.device)
    if plan.unit == "rel":
        vector = vector * h.norm(dim=-1).median()
    elif plan.sae.scales_tokens:
        vector = vector * token_scale(h, plan.sae.normalize_activations).median()
    with torch.inference_mode():
        if norm is None:
            pushed = vector
        else:
            spread = _spread(norm, h + vector).median()
            pushed = _linear_part(norm, vector) / spread
        weight = next(lm.unembed.parameters())
        bias: Tensor = torch.mv(weight.float(), pushed.float())
    return bias


def _spread(norm: nn.Module, h: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
    """What a norm divides by, without its epsilon."""
    if isinstance(norm, nn.LayerNorm):
        h = h - h.mean(dim=-1, keepdim=True)
    return h.square().mean(dim=-1).sqrt()


def _linear_part(norm: nn.Module, v: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The norm's gain (and centering) applied to a vector, without division and bias.

    Computed from the norm's own output, so that it does not matter how the gain is stored.
    """
    kind = next(norm.parameters()).dtype
    # The length only matters relative to the norm's epsilon, negligible at a length of 1000.
    long = v * (1e3 / v.norm().clamp_min(1e-12))
    zero: Tensor = norm(torch.zeros_like(v, dtype=kind)[None])[0].float()
    out: Tensor = norm(long.to(kind)[None])[0].float() - zero
    gained: Tensor = out * _spread(norm, long) * (v.norm() / 1e3)
    return gained
