"""`diff`: what fine-tuning changed in the weights, by words of heads and concepts of MLPs.

Everything is measured a second time on the base plus noise of the same norm, matrix by matrix, as
the tuned model's change: that says how much is mere change.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.reading_config import DiffConfig
from saesteer.mechanisms.readings.concepts import (
    direction_words,
    field_shares,
    largest_angle,
    leading_directions,
    neuron_rows,
    overlap,
)
from saesteer.mechanisms.readings.diff_result import WeightDiff
from saesteer.mechanisms.readings.head_words import head_words, related_words, word_embeddings
from saesteer.mechanisms.readings.word_lists import (
    FIELDS,
    INSTRUCTION_VERBS,
    OTHER_VERBS,
    frequent_words,
    matched_verbs,
)
from saesteer.mechanisms.statistics import permutation_test
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model, wrap_model
from saesteer.sae.runs.facts import model_facts
from saesteer.steering.evaluation.intervals import holm

Array = np.ndarray
_GROUP = 8
_WORDS = 1000


def diff(
    base: str | LanguageModel,
    tuned: str | LanguageModel,
    config: DiffConfig | None = None,
    *,
    words: Sequence[str] | None = None,
    verbs: Sequence[str] = INSTRUCTION_VERBS,
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> WeightDiff:
    """Compare the weights of two models of one form.

    Args:
        words: words of the head pairs; None for the most frequent English ones, with both lists of
            verbs.
        verbs: instruction verbs, compared with others of like frequency.

    Raises:
        UserError: models of other sizes or tokens; weights that are equal.
    """
    config = config or DiffConfig()
    began = time.perf_counter()
    one = as_language_model(base, device=device, dtype=dtype)
    two = as_language_model(tuned, device=device, dtype=dtype)
    _check_alike(one, two)
    noised = noise_like(one, two, config.seed)
    others = matched_verbs(verbs, OTHER_VERBS)
    listed = list(dict.fromkeys([*(words or frequent_words(_WORDS)), *verbs, *others]))
    found_heads: list[dict[str, Any]] = []
    found_blocks: list[dict[str, Any]] = []
    pairs: list[list[dict[str, int]]] = []
    if "heads" in config.what:
        related = related_words(word_embeddings(one, listed), config)
        counts = []
        for number, lm in enumerate((one, two, noised)):
            progress("words of heads", number, 3, "models")
            counts.append(head_words(lm, listed, related, config))
        found_heads = compare_words(counts, listed, list(verbs), others, config.seed)
        pairs = [
            [
                {"base": int(a), "tuned": int(b), "noise": int(c)}
                for a, b, c in zip(*row, strict=True)
            ]
            for row in zip(*(table.sum(-1) for table in counts), strict=True)
        ]
    if "concepts" in config.what:
        found_blocks = _concepts(one, two, noised, config, progress)
    return WeightDiff(
        base=model_facts(one) | {"n_layers": one.n_layers},
        tuned=model_facts(two),
        config=config,
        n_words=len(listed),
        verbs=tuple(verbs),
        others=tuple(others),
        pairs=tuple(map(tuple, pairs)),
        heads=tuple(found_heads),
        concepts=tuple(found_blocks),
        seconds=time.perf_counter() - began,
    )


def _check_alike(one: LanguageModel, two: LanguageModel) -> None:
    shapes = [
        {name: tuple(p.shape) for name, p in lm.model.named_parameters()} for lm in (one, two)
    ]
    if shapes[0] != shapes[1]:
        other = next(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
        raise UserError(
            f"`tuned` {two.name} is not of the form of `base` {one.name}: {other} is "
            f"{shapes[1].get(other, 'missing')} and {shapes[0].get(other, 'missing')}; compare a "
            "model with its own fine-tune"
        )
    if one.tokenizer.get_vocab() != two.tokenizer.get_vocab():
        raise UserError(f"`tuned` {two.name} has other tokens than `base` {one.name}")
    if one.fingerprint == two.fingerprint:
        raise UserError(f"`tuned` {two.name} has the weights of `base` {one.name}: nothing to see")


def noise_like(one: LanguageModel, two: LanguageModel, seed: int) -> LanguageModel:
    """The base plus, for each of its tensors, Gaussian noise of the norm of tuned - base."""
    model = copy.deepcopy(one.model)
    drawn = torch.Generator().manual_seed(seed)
    after = dict(two.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            length = (after[name].detach() - parameter).float().norm()
            noise = torch.randn(parameter.shape, generator=drawn).to(parameter.device)
            parameter += (noise * length / noise.norm().clamp_min(1e-12)).to(parameter)
    return wrap_model(model, one.tokenizer, f"{one.name} + noise")


def compare_words(
    counts: Sequence[Array],
    words: Sequence[str],
    verbs: Sequence[str],
    others: Sequence[str],
    seed: int,
) -> list[dict[str, Any]]:
    """By groups of eight blocks: for each word the share of heads with more pairs than the base
    among those that changed; instruction verbs against others, by permutation over words (which
    share heads, and so are no independent samples), Holm over groups. The same for noise.

    `counts` are `[L, H, words]` of base, tuned and noise.
    """
    place = {word: i for i, word in enumerate(words)}
    ours, theirs = [place[v] for v in verbs], [place[v] for v in others]
    rows: list[dict[str, Any]] = []
    for start in range(0, counts[0].shape[0], _GROUP):
        own = slice(start, start + _GROUP)
        row: dict[str, Any] = {"blocks": [start, min(start + _GROUP, counts[0].shape[0]) - 1]}
        for name, table in (("tuned", counts[1]), ("noise", counts[2])):
            change = (table[own] - counts[0][own]).reshape(-1, len(words))
            changed = (change != 0).sum(0)
            share = np.divide((change > 0).sum(0), changed, out=np.full(len(words), np.nan),
                              where=changed > 0)  # fmt: skip
            a, b = share[ours], share[theirs]
            a, b = a[~np.isnan(a)], b[~np.isnan(b)]
            few = min(len(a), len(b)) < 2
            row[name] = {
                "verbs": float(a.mean()) if len(a) else None,
                "others": float(b.mean()) if len(b) else None,
                "p": None if few else permutation_test(a, b, seed=seed),
            }
        rows.append(row)
    for name in ("tuned", "noise"):
        known = [row[name] for row in rows if row[name]["p"] is not None]
        for one, p in zip(known, holm([one["p"] for one in known]), strict=True):
            one["p_adjusted"] = p
    return rows


def _concepts(
    one: LanguageModel,
    two: LanguageModel,
    noised: LanguageModel,
    config: DiffConfig,
    progress: Progress,
) -> list[dict[str, Any]]:
    """By block: overlap of the written subspaces, and the words of the leading directions."""
    k = min(config.k, one.d_model - 1)
    rows = []
    before = None
    for layer in range(one.n_layers):
        progress("concepts of MLPs", layer, one.n_layers, "blocks")
        (v, share), (tuned, _), (noise, _) = (
            leading_directions(neuron_rows(lm, layer), k) for lm in (one, two, noised)
        )
        shown = min(10, k)
        named = direction_words(one, v[:, :shown], config.top)
        tuned_words = direction_words(two, tuned[:, :shown], config.top)
        rows.append(
            {
                "layer": layer,
                "k": k,
                "overlap": overlap(v, tuned),
                "noise": overlap(v, noise),
                "between_blocks": None if before is None else overlap(before, v),
                "unrelated": k / one.d_model,
                "largest_angle": largest_angle(v, tuned),
                "variance": float(share.sum()),
                "words": [[end[:8] for end in ends] for ends in named[:3]],
                "fields": field_shares(named, FIELDS, config.seed),
                "tuned_fields": field_shares(tuned_words, FIELDS, config.seed),
            }
        )
        before = v
    progress("concepts of MLPs", one.n_layers, one.n_layers, "blocks")
    return rows
