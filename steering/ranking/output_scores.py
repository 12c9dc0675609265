"""Output scores: what adding a latent's direction does to the model's output.

A latent that detects an instruction is often not one that makes the model follow it (AxBench, arXiv
2501.17148; Arad et al., arXiv 2505.20063), so these scores measure the effect on the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.hooks import HookPoint, hooked, run_to
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt, pad_right
from saesteer.steering.ranking.detection_scores import Texts
from saesteer.steering.ranking.lens import lens_ids

NEUTRAL_PROMPT = "From my experience,"
LENS_TOKENS = 20
STRENGTH = 10.0
"""As in Arad et al.: a_i += 10 times the largest activation at the last token of the prompt."""

_ROWS_AT_ONCE = 16384
_SEQUENCES_AT_ONCE = 8


@dataclass(frozen=True)
class Contrast:
    """Two answers to one content, as token ids: given with the instruction, and without it."""

    content: int
    prompt: list[int]
    """Token ids of the content alone."""
    followed: list[int]
    plain: list[int]


def contrast_gradients(
    lm: LanguageModel, point: HookPoint, contrasts: Sequence[Contrast]
) -> Float[Tensor, "n d_model"]:
    """Sum over steered positions t of dm / dh_t for each contrast, in float32 on the CPU.

    m is the mean log-probability per token of `followed` minus that of `plain`, each after the
    content alone. Steered positions are those from the last prompt token to the end. `d_j . g` is
    the first-order change in m, in nats per token, for each unit of residual length that latent j's
    direction adds at every steered position; the latent need not be active.
    """
    found = torch.zeros(len(contrasts), lm.d_model)
    rows = [
        (i, sign, contrast.prompt, answer)
        for i, contrast in enumerate(contrasts)
        for sign, answer in ((1.0, contrast.followed), (-1.0, contrast.plain))
    ]
    rows.sort(key=lambda row: len(row[2]) + len(row[3]))
    for first in range(0, len(rows), _SEQUENCES_AT_ONCE):
        batch = rows[first : first + _SEQUENCES_AT_ONCE]
        ids, mask = pad_right(lm, [prompt + answer for _, _, prompt, answer in batch])
        steered = torch.zeros(ids.shape, dtype=torch.bool)
        for place, (_, _, prompt, answer) in enumerate(batch):
            steered[place, len(prompt) - 1 : len(prompt) + len(answer)] = True
        steered = steered.to(ids.device)
        delta: list[Tensor] = []

        def edit(h: Tensor, delta: list[Tensor] = delta) -> Tensor:
            delta.append(torch.zeros_like(h, requires_grad=True))
            return h + delta[0]

        with torch.enable_grad(), hooked(point, edit):
            out = lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
            values = []
            for place, (_, sign, prompt, answer) in enumerate(batch):
                start = len(prompt) - 1
                logits = out.logits[place, start : start + len(answer)].float()
                chosen = ids[place, len(prompt) : len(prompt) + len(answer)]
                logp = logits.log_softmax(dim=-1).gather(1, chosen[:, None])
                values.append(sign * logp.mean())
            (slopes,) = torch.autograd.grad(torch.stack(values).sum(), delta[0])
        slopes = (slopes.float() * steered[..., None]).sum(dim=1).cpu()
        for (i, *_), slope in zip(batch, slopes, strict=True):
            found[i] += slope
    return found


def unit_steps(sae: SAE, ids: Sequence[int] | None = None) -> Float[Tensor, "n d_model"]:
    """What one unit of activation of each latent adds to the reconstruction: its decoder row."""
    rows = sae.W_dec if ids is None else sae.W_dec[list(ids)]
    if sae.spec.rescale_acts_by_decoder_norm:
        return torch.nn.functional.normalize(rows, dim=-1)
    return rows


def effect_scores(sae: SAE, gradients: Float[Tensor, "n d_model"]) -> Float[Tensor, " d_sae"]:
    """Direct effect d_j . mean over contents of dm/dh: one product for all latents."""
    mean = gradients.mean(dim=0).to(sae.W_dec.device)
    found = torch.empty(sae.spec.d_sae, dtype=torch.float64)
    for first in range(0, sae.spec.d_sae, _ROWS_AT_ONCE):
        ids = range(first, min(first + _ROWS_AT_ONCE, sae.spec.d_sae))
        found[first : ids.stop] = (unit_steps(sae, ids).float() @ mean).double().cpu()
    return found


def attribution_scores(
    sae: SAE,
    contrasts: Sequence[Contrast],
    gradients: Float[Tensor, "n d_model"],
    texts: Texts,
) -> Float[Tensor, " d_sae"]:
    """Contrastive attribution patching: mean over contents of (d_j . g) (a_j(x1) - a_j(x0)).

    g is taken at the content alone (x0); the difference is that of the pooled activations, averaged
    over the wordings of the content. Contents without a contrast do not count.
    """
    place = {contrast.content: i for i, contrast in enumerate(contrasts)}
    latent, content, value, _ = texts.pairs.by_content
    kept = np.isin(content, list(place))
    latent, content, value = latent[kept], content[kept], value[kept]
    row = np.array([place[int(c)] for c in content], dtype=np.int64)
    total = np.zeros(sae.spec.d_sae)
    for first in range(0, len(latent), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        steps = unit_steps(sae, latent[part].tolist()).float().cpu()
        slopes = (steps * gradients[torch.from_numpy(row[part])]).sum(dim=-1).double().numpy()
        total += np.bincount(latent[part], slopes * value[part], minlength=sae.spec.d_sae)
    seen = len({int(c) for c in texts.pairs.content} & set(place))
    return torch.from_numpy(total / max(seen, 1))


def output_scores(
    lm: LanguageModel,
    sae: SAE,
    point: HookPoint,
    ids: Sequence[int],
    *,
    prompt: str = NEUTRAL_PROMPT,
    strength: float = STRENGTH,
    batch_size: int = 32,
) -> Float[Tensor, " n"]:
    """The causal output score of some latents (Arad et al., arXiv 2505.20063), in the order given.

    S = P(steered) - P(plain) with P = (1 - rank(b) / V) p(b), b the best-ranked of the latent's 20
    lens tokens, rank from 0. The edit adds `strength` times the largest latent activation at the
    last token of a neutral prompt to the latent there; each latent is one row of a batch.
    """
    encoded = encode_prompt(lm, prompt, chat=False)
    row = torch.tensor([encoded.token_ids], device=lm.device)
    with torch.inference_mode():
        h = run_to(lm, [point], input_ids=row)[point.key][0, -1].float()
        highest = float(sae.encode(h[None]).amax())
    words = min(LENS_TOKENS, len(lm.tokenizer))
    vocabulary = len(lm.tokenizer)
    scores = torch.zeros(len(ids), dtype=torch.float64)
    for first in range(0, len(ids), batch_size):
        chunk = list(ids[first : first + batch_size])
        steps = unit_steps(sae, chunk).float()
        lens = torch.tensor(lens_ids(lm, steps, words), device=lm.device)

        def edit(h: Tensor, steps: Tensor = steps) -> Tensor:
            new = h.clone()
            # The batch has one row more than latents: the last row is not edited.
            new[:-1, -1] += (strength * highest * steps).to(h.device, h.dtype)
            return new

        with torch.inference_mode(), hooked(point, edit):
            logits = lm.model(input_ids=row.expand(len(chunk) + 1, -1), use_cache=False).logits
        logits = logits[:, -1, :vocabulary].float()
        p = logits.softmax(dim=-1)
        ranks = torch.argsort(torch.argsort(logits, dim=-1, descending=True, stable=True), dim=-1)
        steered = _prominence(p[:-1], ranks[:-1], lens)
        plain = _prominence(p[-1:].expand_as(p[:-1]), ranks[-1:].expand_as(p[:-1]), lens)
        scores[first : first + len(chunk)] = (steered - plain).double().cpu()
    return scores


def _prominence(p: Tensor, ranks: Tensor, lens: Tensor) -> Tensor:
    """(1 - rank(b) / V) p(b) with b the best-ranked of each row's lens tokens."""
    best = ranks.gather(1, lens).argmin(dim=1, keepdim=True)
    token = lens.gather(1, best)
    share = 1 - ranks.gather(1, token).double() / p.shape[1]
    return (share * p.gather(1, token).double())[:, 0]
