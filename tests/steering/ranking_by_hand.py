"""A slow reference of ranking: one text at a time, latents by numpy, statistics by loops."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.generation import Completion
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.ranking import reading as reading_module
from saesteer.steering.ranking.rank import RankConfig, Ranking
from saesteer.steering.tasks.task import Task, Variant

LAYER = 1

D_SAE = 24

WORDINGS = ("Use a list", "Make it a list, please.", "Faites une liste")
"""The selection wordings in the order of `by_variant`: the instruction, English, others."""

TASK = Task(
    name="lists",
    instruction=WORDINGS[0],
    variants=(
        Variant(WORDINGS[2], "fr"),
        Variant("Kept apart as items", "en", "evaluate"),
        Variant(WORDINGS[1], "en"),
    ),
    contents={
        "train": (
            "A tuple of one element needs a comma.",
            "yield",
            "Statements end at the newline, which is a token of its own.",
            "Use a list of names",  # holds the words of the instruction
            "Modules are objects indeed and so are their functions",  # the check's own word
            "never read: beyond the number of contents",
        ),
        "dev": ("the dev split must stay unseen",),
        "test": ("the test split must stay unseen",),
    },
    check_name="keyword",
    check_arguments={"keyword": "indeed"},
)

CONTENTS = 5

PASSING = (0, 2, 3)
"""Contents whose instructed replies pass: the reply to 1 fails, and that to 4 cannot be judged."""

TRAIN = TASK.contents["train"][:CONTENTS]

# Products of padded batches are summed in another order than those of single rows (float32
# roundings, 1e-7 of values near 10, through a few blocks); statistics are float64.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

Array = NDArray[np.float64]


def random_sae(architecture: str = "topk", layer: int = LAYER, **changes: Any) -> SAE:
    generator = torch.Generator().manual_seed(0)
    facts: dict[str, Any] = {
        "architecture": architecture,
        "d_model": 32,
        "d_sae": D_SAE,
        "k": 6 if architecture == "topk" else None,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "apply_b_dec_to_input": True,
    }
    spec = SAESpec(**{**facts, **changes})
    return SAE(
        spec=spec,
        W_enc=torch.randn(spec.d_model, spec.d_sae, generator=generator) / 3,
        b_enc=torch.randn(spec.d_sae, generator=generator) - 1,
        W_dec=torch.nn.functional.normalize(
            torch.randn(spec.d_sae, spec.d_model, generator=generator)
        ),
        b_dec=torch.randn(spec.d_model, generator=generator),
        threshold=torch.full((spec.d_sae,), 0.5) if architecture == "jumprelu" else None,
        source="an-sae",
        sha256="ab",
    )


def token_ids(lm: LanguageModel, text: str) -> list[int]:
    if not lm.has_chat_template:
        return list(lm.tokenizer(text)["input_ids"])
    turn = [{"role": "user", "content": text}]
    rendered = lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(lm.tokenizer(rendered, add_special_tokens=False)["input_ids"])


def token_ids_plain(lm: LanguageModel, text: str) -> list[int]:
    """Without the chat template."""
    return list(lm.tokenizer(text)["input_ids"])


def latents_of(lm: LanguageModel, sae: SAE, ids: Sequence[int]) -> Array:
    """Latents `[tokens, d_sae]` of one text, run alone through the whole model."""
    layer = sae.spec.layer
    assert layer is not None
    seen: list[Any] = []
    # hidden_states ends with the final norm's output, so the last block is watched instead.
    handle = lm.blocks[layer].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    handle.remove()
    if layer < lm.n_layers - 1:
        residual = out.hidden_states[layer + 1][0]
    else:
        residual = (seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0])[0]
    x = residual.double().numpy()
    weights = {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
    q = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    acts = np.maximum(q, 0)
    if sae.spec.architecture == "jumprelu":
        acts[q <= weights["threshold"]] = 0
    if sae.spec.k is not None:
        for row in acts:
            row[np.argsort(row)[: -sae.spec.k]] = 0
    return acts


def user_end(lm: LanguageModel, ids: Sequence[int]) -> int:
    """One past the last token of the user's text: in ChatML it is where the last turn ends."""
    if not lm.has_chat_template:
        return len(ids)
    return max(i for i, token in enumerate(ids) if token == 2)


def read_at(
    lm: LanguageModel, text: str, instruction: str | None, config: RankConfig
) -> tuple[list[int], list[int]]:
    """Token ids of a text and the positions that the configuration reads."""
    ids = token_ids(lm, text)
    end = user_end(lm, ids)
    if config.read == "template":
        return ids, [len(ids) - 1]
    if config.read == "last" or instruction is None:
        return ids, [end - 1]
    # The tokenizer cuts at the newline, so the instruction's tokens are the same anywhere.
    length = len(lm.tokenizer(instruction)["input_ids"])
    if config.position == "post":
        span = list(range(end - length, end))
    else:
        start = end - len(lm.tokenizer(text)["input_ids"])
        span = list(range(start, start + length))
    assert lm.tokenizer.decode([ids[p] for p in span]) == instruction
    return ids, span


def sample(
    lm: LanguageModel, sae: SAE, text: str, instruction: str | None, config: RankConfig
) -> Array:
    ids, positions = read_at(lm, text, instruction, config)
    acts = latents_of(lm, sae, ids)[positions]
    return acts.max(axis=0) if config.pool == "max" else acts.mean(axis=0)


def columns(positive: Sequence[Array], negative: Sequence[Array]) -> dict[str, Array]:
    """The statistics of every latent, by loops over samples."""
    found = {name: np.zeros(D_SAE) for name in ("mu", "sigma", "highest")}
    for j in range(D_SAE):
        active = [float(acts[j]) for acts in positive if acts[j] > 0]
        if active:
            mean = sum(active) / len(active)
            found["mu"][j] = mean
            found["sigma"][j] = math.sqrt(sum((a - mean) ** 2 for a in active) / len(active))
            found["highest"][j] = max(active)
    found["rate_positive"] = np.array(
        [sum(acts[j] > 0 for acts in positive) / len(positive) for j in range(D_SAE)]
    )
    found["rate_negative"] = np.array(
        [sum(acts[j] > 0 for acts in negative) / len(negative) for j in range(D_SAE)]
    )
    found["rate"] = found["rate_positive"] - found["rate_negative"]
    found["meandiff"] = sum(positive) / len(positive) - sum(negative) / len(negative)
    found["mean_difference"] = found["meandiff"]
    return found


def check_columns(ranking: Ranking, found: dict[str, Array]) -> None:
    for name in ("rate_positive", "rate_negative", "mean_difference", "mu", "sigma", "highest"):
        np.testing.assert_allclose(getattr(ranking, name).numpy(), found[name], **CLOSE)


def scripted(
    monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, reply: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Replace the model's replies; returns the arguments of each call of `generate`."""
    calls: list[dict[str, Any]] = []

    def generate(
        lm: LanguageModel, prompts: Sequence[EncodedPrompt], **arguments: Any
    ) -> list[Completion]:
        calls.append({"texts": [prompt.text for prompt in prompts], **arguments})
        texts = [reply(prompt.text) for prompt in prompts]
        return [Completion(text, list(lm.tokenizer(text)["input_ids"])) for text in texts]

    monkeypatch.setattr(reading_module, "generate", generate)
    return calls


def reply_to(text: str) -> str:
    """A fixed reply to each text; instructed ones pass the check where `PASSING` says."""
    number = TRAIN.index(text.split("\n")[0])
    if "\n" not in text:
        return f"An answer of {number} words; indeed no success here."
    return f"Here it is indeed, {number}." if number != 1 else "No such thing."


def reply_positions(
    lm: LanguageModel, sae: SAE, texts: Sequence[str], left_out: Sequence[int] = ()
) -> list[Array]:
    """Latents at the last prompt token and each reply token, without those of some ids."""
    samples = []
    for text in texts:
        prompt, reply = token_ids(lm, text), lm.tokenizer(reply_to(text))["input_ids"]
        ids = [*prompt, *reply]
        acts = latents_of(lm, sae, ids)
        samples += [acts[p] for p in range(len(prompt) - 1, len(ids)) if ids[p] not in left_out]
    return samples
