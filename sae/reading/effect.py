"""What a model writes when the direction of a latent is added, on a prompt that asks for nothing.

The same as steering with a plan of unit `rel` from the last prompt token on: all rows hold the same
prompt, so the last position of each pass is the one to edit.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.generation import generate
from saesteer.sae.model.hooks import HookPoint, hooked
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.card import Raised, Steered
from saesteer.sae.reading.config import LatentsConfig
from saesteer.sae.reading.pieces import Pieces
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt

RAISED = 6
"""Tokens that are listed as likelier with steering."""


def steering_effects(
    lm: LanguageModel,
    point: HookPoint,
    directions: Float[Tensor, "n d_model"],
    config: LatentsConfig,
    progress: Progress = no_progress,
) -> list[Steered]:
    """Steer with each direction alone; greedy, without a chat template.

    At the last prompt token and every later one, `config.dose` times the length of the activation
    there is added, in the direction given.
    """
    prompt = encode_prompt(lm, config.neutral_prompt, chat=False)
    plain = _next_token(lm, prompt, 1)[0]
    base = _complete(lm, [prompt], config)[0]
    pieces = Pieces(lm.tokenizer)
    found: list[Steered] = []
    progress("latents: steer", 0, len(directions), "latents")
    size = config.text.batch_size
    for first in range(0, len(directions), size):
        own = directions[first : first + size].float()
        units = own / own.norm(dim=1, keepdim=True).clamp(min=1e-12)
        with hooked(point, _adding(units.to(lm.device), config.dose)):
            after = _next_token(lm, prompt, len(own))
            texts = _complete(lm, [prompt] * len(own), config)
        for row, text in zip(after, texts, strict=True):
            found.append(
                Steered(
                    prompt=config.neutral_prompt,
                    dose=config.dose,
                    completion=text,
                    baseline=base,
                    kl=float((row.exp() * (row - plain)).sum()),
                    raised=_raised(pieces, plain, row),
                )
            )
        progress("latents: steer", len(found), len(directions), "latents")
    return found


def _adding(units: Float[Tensor, "rows d_model"], dose: float) -> Callable[[Tensor], Tensor]:
    def edit(h: Float[Tensor, "rows seq d_model"]) -> Float[Tensor, "rows seq d_model"]:
        last = h[:, -1].float()
        new = h.clone()
        new[:, -1] = (last + dose * last.norm(dim=1, keepdim=True) * units).to(h.dtype)
        return new

    return edit


def _next_token(
    lm: LanguageModel, prompt: EncodedPrompt, rows: int
) -> Float[Tensor, "rows vocabulary"]:
    """Log-probabilities of what comes after the prompt, in float32 on the CPU."""
    ids = torch.tensor([prompt.token_ids] * rows, device=lm.device)
    with torch.inference_mode():
        logits = lm.model(input_ids=ids, use_cache=False).logits[:, -1, : len(lm.tokenizer)]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def _complete(
    lm: LanguageModel, prompts: Sequence[EncodedPrompt], config: LatentsConfig
) -> list[str]:
    answers = generate(
        lm, prompts, max_new_tokens=config.new_tokens, batch_size=max(1, len(prompts))
    )
    return [lm.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]


def _raised(
    pieces: Pieces, plain: Float[Tensor, " vocabulary"], row: Float[Tensor, " vocabulary"]
) -> tuple[Raised, ...]:
    gained = row.exp() - plain.exp()
    best = gained.topk(min(RAISED, len(gained)))
    return tuple(
        Raised(pieces.one(token), float(plain[token].exp()), float(row[token].exp()))
        for token, more in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if more > 0
    )
