"""`head_words`: pairs of words that a head's query and key answer to alike.

A word is the mean input embedding of its tokens, put in place of the residual stream before every
block; q and k of single tokens are then read through the attention tap, so that norms, biases and
QK-norm are in, for every family and without naming a weight. A dimension d of a head holds the
words of largest |q_d| and of largest |k_d|; a pair counts where q_d k_d > 0 and the words are
related, and is the head's where it counts in more than one dimension.

In a rotary model dimensions turn in planes (a, b): at distance D the score of a plane is
(q_a k_a + q_b k_b) cos wD + (q_a k_b - q_b k_a) sin wD. Distance 0 is read by dimension, as in
Wu et al. (2310.00492); others by plane, with the query at position D.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.patching.sites import Edit, at_sites
from saesteer.mechanisms.reading_config import DiffConfig
from saesteer.sae.model.attention import head_tap, heads
from saesteer.sae.model.language_model import LanguageModel

Array = np.ndarray
_BATCH = 512


@torch.no_grad()
def word_embeddings(lm: LanguageModel, words: Sequence[str]) -> Tensor:
    """Mean input embedding of each word's tokens, a blank before it, `[words, d_model]`."""
    embedding: Any = lm.model.get_input_embeddings()
    rows = []
    for word in words:
        ids = lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"`words`: the tokenizer of {lm.name} makes no token of {word!r}")
        rows.append(embedding(torch.tensor([ids], device=lm.device))[0].mean(0))
    return torch.stack(rows)


@torch.no_grad()
def queries_and_keys(
    lm: LanguageModel, embeddings: Tensor, position: int = 0
) -> tuple[Tensor, Tensor]:
    """q and k `[L, words, H, d_head]` of single tokens at a position, float32."""
    layout = heads(lm)
    shape = lm.n_layers, len(embeddings), layout.n_heads, layout.d_head
    found = {"q": torch.empty(shape), "k": torch.empty(shape)}
    for start in range(0, len(embeddings), _BATCH):
        own = embeddings[start : start + _BATCH, None]

        def put(h: Tensor, own: Tensor = own) -> Tensor:
            return own.to(h)

        edits: dict[tuple[int, str], Edit] = {}
        for layer in range(lm.n_layers):
            edits[layer, "resid_pre"] = put
            for site, table in found.items():
                into = table[layer, start : start + len(own)]
                edits[layer, site] = _into(into)
        with head_tap(lm) as tap, at_sites(lm, tap, edits):
            ids = torch.full((len(own), 1), lm.pad_id, device=lm.device)
            where = torch.full_like(ids, position)
            text: Any = lm.text_model
            text(input_ids=ids, position_ids=where, use_cache=False)
    return found["q"], found["k"]


def _into(table: Tensor) -> Edit:
    def read(values: Tensor) -> None:
        table.copy_(values[:, :, 0])

    return read


def planes(turned: Tensor, still: Tensor) -> list[tuple[int, int]]:
    """Which dimensions turn together, found from q `[…, d_head]` at two positions: rotation keeps
    the length of each plane. Raises UserError where no known pairing does."""
    width = still.shape[-1]
    flat, other = still.reshape(-1, width).double(), turned.reshape(-1, width).double()
    for pairs in (
        [(i, i + width // 2) for i in range(width // 2)],
        [(i, i + 1) for i in range(0, width, 2)],
    ):
        a, b = (torch.tensor(one) for one in zip(*pairs, strict=True))
        before = flat[:, a].square() + flat[:, b].square()
        after = other[:, a].square() + other[:, b].square()
        if float((before - after).abs().max()) <= 1e-4 * float(before.max()):
            return pairs
    raise UserError("`distance` needs a model whose whole heads are rotated: leave it at 0")


def related_words(embeddings: Tensor, config: DiffConfig) -> Array:
    """Which words count as related, `[words, words]` bool: centred cosine over mean + 1.96 sd of
    all pairs, a stand-in for word vectors; or all. A word is not related to itself."""
    n = len(embeddings)
    if config.related == "none":
        found = np.ones((n, n), dtype=bool)
    else:
        centred = embeddings.float() - embeddings.float().mean(0)
        unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
        cosine = (unit @ unit.T).cpu().numpy()
        off = ~np.eye(n, dtype=bool)
        found = cosine > cosine[off].mean() + 1.96 * cosine[off].std()
    np.fill_diagonal(found, False)
    return found


def pair_counts(
    q: Array, k: Array, related: Array, most: int, turning: Sequence[tuple[int, int]] | None
) -> Array:
    """In how many dimensions (or planes, if given) of one head each pair of words counts,
    `[words, words]`. `q` and `k` are `[words, d_head]`."""
    counts = np.zeros(related.shape, dtype=np.int16)
    units = [(d,) for d in range(q.shape[1])] if turning is None else [tuple(p) for p in turning]
    most = min(most, len(q))
    for unit in units:
        own_q, own_k = q[:, unit], k[:, unit]
        rows = np.argpartition(-np.linalg.norm(own_q, axis=1), most - 1)[:most]
        columns = np.argpartition(-np.linalg.norm(own_k, axis=1), most - 1)[:most]
        product = own_q[rows] @ own_k[columns].T
        place = np.ix_(rows, columns)
        counts[place] += (product > 0) & related[place]
    return counts


def head_words(
    lm: LanguageModel, words: Sequence[str], related: Array, config: DiffConfig
) -> Array:
    """Pairs that each word is in, as query or as key, by head: `[L, H, words]`, summed over the
    distances."""
    embeddings = word_embeddings(lm, words)
    q, k = queries_and_keys(lm, embeddings)
    found = np.zeros((q.shape[0], q.shape[2], len(words)), dtype=np.int64)
    for distance in config.distance:
        turned = q if distance == 0 else queries_and_keys(lm, embeddings, distance)[0]
        turning = None if distance == 0 else planes(turned, q)
        for layer in range(q.shape[0]):
            for head in range(q.shape[2]):
                known = pair_counts(
                    turned[layer, :, head].numpy(), k[layer, :, head].numpy(), related,
                    config.most, turning,
                ) > 1  # fmt: skip
                found[layer, head] += known.sum(0) + known.sum(1)
    return found
