"""`attribute`: which prompt tokens drove which tokens of the reply, and how densely.

    S[n, m] = < d log p(y_m | x, y_<m) / dE_n , E_n >

for prompt token n and reply token m, E the input embeddings (gradient times input). See `density`
for what is made of it. `ig` averages the gradient over a line from the mean embedding, `frozen`
takes the logit of y_m, minus the mean logit, in the frozen network, where sums are exact.
After Wu et al., "From Language Modeling to Instruction Following" (2310.00492).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.instructed import (
    InstructedPrompt,
    read_instructed,
    task_prompts,
)
from saesteer.mechanisms.reading_config import AttributeConfig
from saesteer.mechanisms.readings.attribution_result import (
    AttributedPrompt,
    Attribution,
)
from saesteer.mechanisms.readings.density import densities, instruction_score
from saesteer.mechanisms.routes.frozen import FrozenNetwork
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model, uncompiled
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt

FEWEST_TOKENS = 5
_CHUNK = 8


def attribute(
    model: str | LanguageModel,
    prompts: str | Path | Sequence[InstructedPrompt],
    config: AttributeConfig | None = None,
    *,
    n: int = 16,
    replies: Sequence[Sequence[int]] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> Attribution:
    """Attribute replies to prompts.

    Args:
        prompts: prompts with a marked instruction, the name of a built-in task (`n` of its
            contents), or a JSONL file.
        replies: token ids to attribute instead of the model's own greedy replies, one a prompt:
            those of another model, for the same text in both.

    Raises:
        UsageError: a grid over the budget.
        UserError: an instruction that covers no token; no reply of at least five tokens.
    """
    config = config or AttributeConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    if isinstance(prompts, str | Path):
        is_file = Path(prompts).is_file() or str(prompts).endswith(".jsonl")
        prompts = read_instructed(prompts)[:n] if is_file else task_prompts(
            str(prompts), n, config.seed
        )  # fmt: skip
    began = time.perf_counter()
    done: list[AttributedPrompt] = []
    short = 0
    for number, prompt in enumerate(prompts):
        progress("attributing", number, len(prompts), "prompts")
        encoded = encode_prompt(lm, prompt.text, chat=config.chat)
        start, end = encoded.token_span(*prompt.span)
        if replies is not None:
            reply = list(replies[number])
        elif prompt.reply is not None:
            reply = list(lm.tokenizer(prompt.reply, add_special_tokens=False)["input_ids"])
        else:
            reply = _greedy(lm, encoded.token_ids, config.max_new_tokens)
        reply = reply[: config.max_new_tokens]
        if len(reply) < FEWEST_TOKENS:
            short += 1
            continue
        done.append(_one(lm, prompt, encoded, (start, end), reply, config, number))
        minutes = (time.perf_counter() - began) / 60 * len(prompts) / (number + 1)
        if len(done) == 1 and minutes > config.budget_minutes:
            raise UsageError(
                f"this takes about {minutes:.0f} minutes, over `budget_minutes` "
                f"{config.budget_minutes:g}: give fewer prompts, shorter replies, `outputs`, or a "
                "larger budget"
            )
    progress("attributing", len(prompts), len(prompts), "prompts")
    if not done:
        raise UserError(
            f"none of {len(prompts)} replies has {FEWEST_TOKENS} tokens: give other prompts"
        )
    return Attribution(
        model=model_facts(lm), config=config, prompts=tuple(done), short=short,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _one(
    lm: LanguageModel,
    prompt: InstructedPrompt,
    encoded: EncodedPrompt,
    span: tuple[int, int],
    reply: list[int],
    config: AttributeConfig,
    number: int,
) -> AttributedPrompt:
    drawn = np.random.default_rng([config.seed, number])
    chosen = list(range(len(reply)))
    if config.outputs is not None and config.outputs < len(reply):
        chosen = sorted(map(int, drawn.choice(len(reply), config.outputs, replace=False)))
    scores = input_output(lm, encoded.token_ids, reply, config, chosen)
    density, held = densities(scores, config)
    start, end = span
    other = _random_span(encoded, span, drawn)
    user = np.arange(*encoded.user_span)
    most = user[np.argsort(-density[user])[: config.ablate]]
    some = drawn.choice(user, len(most), replace=False)
    tokens = lm.tokenizer.convert_ids_to_tokens
    text = lm.tokenizer.decode(reply, skip_special_tokens=True)
    whole, without, random = reply_logprobs(
        lm, encoded.token_ids, reply, [[], most.tolist(), some.tolist()]
    )
    return AttributedPrompt(
        text=prompt.text,
        reply=text,
        tokens=tuple(tokens(encoded.token_ids)),
        outputs=tuple(tokens([reply[i] for i in chosen])),
        reply_ids=tuple(reply),
        span=span,
        scores=scores,
        density=density,
        held=held,
        score=instruction_score(density, start, end),
        random_score=instruction_score(density, *other),
        drop=whole - without,
        random_drop=whole - random,
        followed=prompt.judged(text),
    )


def _random_span(
    encoded: EncodedPrompt, span: tuple[int, int], drawn: np.random.Generator
) -> tuple[int, int]:
    """A span of equal length in the user's text, apart from the instruction where there is room."""
    length, (low, high) = span[1] - span[0], encoded.user_span
    starts = [s for s in range(low, high - length + 1) if s + length <= span[0] or s >= span[1]]
    starts = starts or [s for s in range(low, high - length + 1) if s != span[0]] or [span[0]]
    start = int(drawn.choice(starts))
    return start, start + length


@torch.no_grad()
def _greedy(lm: LanguageModel, ids: list[int], most: int) -> list[int]:
    rows = torch.tensor([ids], device=lm.device)
    found = uncompiled(lm.model).generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=most,
        pad_token_id=lm.pad_id,
    )  # fmt: skip
    reply = [int(token) for token in found[0, len(ids) :]]
    end = next((i for i, token in enumerate(reply) if token in lm.special_ids), len(reply))
    return reply[:end]


def input_output(
    lm: LanguageModel,
    prompt: Sequence[int],
    reply: Sequence[int],
    config: AttributeConfig,
    chosen: Sequence[int] | None = None,
) -> np.ndarray:
    """S `[prompt tokens, chosen reply tokens]`, float64."""
    ids = torch.tensor([[*prompt, *reply]], device=lm.device)
    n, wanted = len(prompt), list(range(len(reply))) if chosen is None else list(chosen)
    targets = torch.tensor(list(reply), device=lm.device)[wanted]
    at = [n - 1 + m for m in wanted]
    if config.method == "frozen":
        net = FrozenNetwork(lm, ids[0].tolist(), last=len(reply) + 1)
        start = net.embeddings.clone().requires_grad_(True)
        with torch.enable_grad():
            logits = net.run(start)[: len(reply)][wanted]
            values = logits.gather(1, targets[:, None])[:, 0] - logits.mean(-1)
            grads = _gradients(values, start)
        return _products(grads, start.detach(), n)
    embedding: Any = lm.model.get_input_embeddings()
    with torch.no_grad():
        whole = embedding(ids).detach()
        mean = mean_embedding(lm)
    total = torch.zeros(len(wanted), *whole.shape[1:], dtype=torch.float64)
    steps = config.ig_steps if config.method == "ig" else 1
    for step in range(steps):
        point = whole.clone()
        if config.method == "ig":
            point[:, :n] = torch.lerp(mean.expand_as(whole[:, :n]), whole[:, :n],
                                      (step + 0.5) / steps)  # fmt: skip
        point.requires_grad_(True)
        with torch.enable_grad():
            logits = _logits(lm, ids, point)[at]
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            values = logprobs.exp() if config.target == "prob" else logprobs
            grads = _gradients(values, point)
        total += grads.double().cpu() / steps
    difference = whole - mean if config.method == "ig" else whole
    return _products(total, difference.cpu(), n)


def mean_embedding(lm: LanguageModel) -> Tensor:
    """The mean of all input embeddings, `[d_model]`, as the embedding module gives them."""
    embedding: Any = lm.model.get_input_embeddings()
    rows = torch.arange(embedding.weight.shape[0], device=lm.device)
    with torch.no_grad():
        found: Tensor = embedding(rows[None])[0].float().mean(0)
    return found.to(lm.dtype)


def _products(grads: Tensor, values: Tensor, n: int) -> np.ndarray:
    found = (grads.double() * values.double()).sum(-1)[:, :n].T
    return np.asarray(found.cpu().numpy())


def _gradients(values: Tensor, start: Tensor) -> Tensor:
    """d values / d start, `[values, T, d_model]`, several at once."""
    rows = torch.eye(len(values), dtype=values.dtype, device=values.device)
    found = []
    for chunk in rows.split(_CHUNK):
        (grad,) = torch.autograd.grad(
            values, start, chunk, retain_graph=True, is_grads_batched=True
        )
        found.append(grad[:, 0])
    return torch.cat(found).detach()


def _logits(lm: LanguageModel, ids: Tensor, embeddings: Tensor) -> Tensor:
    """Logits `[T, vocabulary]` with embeddings `[1, T, d_model]` in place of those of `ids`."""
    embedding: Any = lm.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *_: embeddings)
    try:
        logits: Tensor = uncompiled(lm.model)(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits


@torch.no_grad()
def reply_logprobs(
    lm: LanguageModel, prompt: Sequence[int], reply: Sequence[int], ablated: Sequence[Sequence[int]]
) -> list[float]:
    """Mean log-probability of a reply's tokens with some prompt embeddings set to the mean."""
    ids = torch.tensor([[*prompt, *reply]], device=lm.device)
    embedding: Any = lm.model.get_input_embeddings()
    whole, mean = embedding(ids), mean_embedding(lm)
    targets = torch.tensor(list(reply), device=lm.device)[:, None]
    found = []
    for tokens in ablated:
        point = whole.clone()
        point[0, list(tokens)] = mean
        logits = _logits(lm, ids, point)[len(prompt) - 1 : -1]
        found.append(float(logits.double().log_softmax(-1).gather(1, targets).mean()))
    return found
