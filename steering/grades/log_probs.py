"""Nats per token of given texts under the unsteered model, in batches of padded rows."""

from collections.abc import Sequence

import torch

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import pad_right

# Log-probabilities over the vocabulary of this many tokens are held at once.
_TOKENS_AT_ONCE = 512


def nats_after(
    lm: LanguageModel, before: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> list[float | None]:
    """Nats per token of each row of token ids after what stands before it; None for empty rows.

    Args:
        before: token ids, at least one for each row; they are not counted.
    """
    found: list[float | None] = [None] * len(rows)
    whole = [[*head, *row] for head, row in zip(before, rows, strict=True)]
    order = sorted((i for i in range(len(rows)) if rows[i]), key=lambda i: len(whole[i]))
    while order:
        size = max(1, _TOKENS_AT_ONCE // len(whole[order[-1]]))
        chunk, order = order[-size:], order[:-size]
        ids, mask = pad_right(lm, [whole[i] for i in chunk])
        counted = mask[:, 1:].clone()
        for place, i in enumerate(chunk):
            counted[place, : len(before[i]) - 1] = 0
        with torch.inference_mode():
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            nats = -log_probs.gather(2, ids[:, 1:, None]).squeeze(2)
            kept = counted.to(nats.dtype)
            means = (nats * kept).sum(dim=1) / kept.sum(dim=1)
        for i, value in zip(chunk, means.tolist(), strict=True):
            found[i] = float(value)
    return found


def cross_entropies(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> list[float | None]:
    """Nats per token of each row of token ids under the model, without a prompt.

    A start token precedes every row, so that its first token counts too. None for empty rows.
    """
    start = lm.tokenizer.bos_token_id
    start = lm.tokenizer.eos_token_id if start is None else start
    start = lm.pad_id if start is None else int(start)
    return nats_after(lm, [[start]] * len(rows), rows)
