"""Reading prompts for a ranking, against the slow reference: places, pools, parts, batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.sae_file import SAE, save_sae
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.ranking import reading as reading_module
from saesteer.steering.ranking.rank import RankConfig, rank

from ..ranking_by_hand import (
    CLOSE,
    CONTENTS,
    D_SAE,
    LAYER,
    TASK,
    TRAIN,
    WORDINGS,
    check_columns,
    columns,
    latents_of,
    random_sae,
    sample,
    token_ids,
    user_end,
)

CASES: list[dict[str, Any]] = [
    {"by": "saif", "read": "last"},
    {"by": "saif", "read": "last", "position": "pre"},
    {"by": "rate", "read": "last", "family": "gpt2", "chat": False},
    {"by": "meandiff", "read": "last", "family": "gemma2", "arch": "jumprelu"},
    {"by": "saif", "read": "last", "layer": 3},
    {"by": "saif", "read": "template"},
    {"by": "meandiff", "read": "template", "position": "pre", "family": "gpt2", "chat": False},
    {"by": "saif", "read": "span"},
    {"by": "rate", "read": "span", "position": "pre", "pool": "mean", "arch": "standard"},
    {"by": "meandiff", "read": "span", "pool": "mean", "family": "gpt2", "chat": False},
    {"by": "rate", "read": "span", "position": "pre", "family": "gpt_neox", "chat": False},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_prompts_are_scored_as_by_hand(
    case: dict[str, Any], lm_of: Callable[..., LanguageModel]
) -> None:
    place = dict(case)
    lm = lm_of(place.pop("family", "llama"), chat=place.pop("chat", True))
    sae = random_sae(place.pop("arch", "topk"), place.pop("layer", LAYER))
    config = RankConfig(contents=CONTENTS, batch_size=3, **place)
    ranking = rank(lm, sae, TASK, config)

    def joined(content: str, wording: str) -> str:
        return f"{content}\n{wording}" if config.position == "post" else f"{wording}\n{content}"

    plain = [sample(lm, sae, content, None, config) for content in TRAIN]
    by_wording = [
        [sample(lm, sae, joined(content, wording), wording, config) for content in TRAIN]
        for wording in WORDINGS
    ]
    found = columns([acts for group in by_wording for acts in group], plain)
    check_columns(ranking, found)
    sensitivity = np.zeros((len(WORDINGS), D_SAE))
    for number, group in enumerate(by_wording):
        for instructed, alone in zip(group, plain, strict=True):
            for j in range(D_SAE):
                sensitivity[number, j] += (instructed[j] > 0 and not alone[j] > 0) / len(TRAIN)
    np.testing.assert_allclose(ranking.by_variant.numpy(), sensitivity, **CLOSE)
    found["saif"] = sensitivity.mean(axis=0)
    np.testing.assert_allclose(ranking.score.numpy(), found[case["by"]], **CLOSE)
    assert (ranking.positives, ranking.negatives) == (len(WORDINGS) * CONTENTS, CONTENTS)
    assert ranking.replies_used is None
    # The case says something: some latents are on, and some more with the instruction.
    assert 0 < found["rate_positive"].mean() < 1
    assert ranking.top(1)


def test_explain_holds_every_column(lm: LanguageModel) -> None:
    ranking = rank(lm, random_sae(), TASK, RankConfig(contents=CONTENTS))
    latent = ranking.top(1)[0]
    row = ranking.explain(latent)
    alone = ranking.by_variant[:, latent].numpy()
    assert row["id"] == latent
    assert row["score"] == pytest.approx(alone.mean())
    assert row["variant_min"] == alone.min()
    assert row["variant_std"] == pytest.approx(alone.std())
    assert row["max"] >= row["mu"] > 0


def test_names_and_paths_are_opened(
    lm: LanguageModel, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    sae = random_sae()
    save_sae(tmp_path / "sae", sae.spec, **sae.tensors())
    config = RankConfig(contents=1)
    found = rank(str(tiny_model_dir("llama")), str(tmp_path / "sae"), "french", config)
    wanted = rank(lm, sae, "french", config)
    assert found.positives == 12  # the selection wordings of a built-in task
    assert torch.equal(found.score, wanted.score)


def test_the_batch_size_changes_nothing(lm: LanguageModel) -> None:
    sae = random_sae()
    found = [
        rank(lm, sae, TASK, RankConfig(contents=CONTENTS, batch_size=size)) for size in (1, 4, 99)
    ]
    for other in found[1:]:
        assert torch.equal(other.score, found[0].score)
        torch.testing.assert_close(other.mu, found[0].mu, **CLOSE)


@pytest.mark.parametrize("read", ["last", "span", "reply"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_latents_are_encoded_in_parts_of_bounded_size(
    pool: str, read: str, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a million latents a few tokens fill a part; what is found is the same."""
    sae = random_sae()
    config = RankConfig(
        by="meandiff", read=read, pool=pool, contents=3, all_replies=True, max_new_tokens=5,
        temperature=0.0,
    )  # fmt: skip
    wanted = rank(lm, sae, TASK, config)
    sizes: list[int] = []
    encode = SAE.encode

    def spy(self: SAE, x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel() // x.shape[-1])
        return encode(self, x)

    monkeypatch.setattr(reading_module, "_ACTS_AT_ONCE", 3 * D_SAE)
    monkeypatch.setattr(SAE, "encode", spy)
    found = rank(lm, sae, TASK, config)
    assert max(sizes) == 3
    for name, column in wanted.columns.items():
        torch.testing.assert_close(found.columns[name], column, **CLOSE)
    torch.testing.assert_close(found.control_rate, wanted.control_rate)
    torch.testing.assert_close(found.sigma, wanted.sigma, **CLOSE)


def test_control_rates_count_every_token_of_plain_texts(lm: LanguageModel) -> None:
    sae, config = random_sae(), RankConfig(contents=CONTENTS)
    ranking = rank(lm, sae, TASK, config)
    inside, outside = [], []
    for text in TRAIN:
        ids = token_ids(lm, text)
        end = user_end(lm, ids)
        start = end - len(lm.tokenizer(text)["input_ids"])
        for place, acts in enumerate(latents_of(lm, sae, ids)):
            (inside if start <= place < end else outside).append(acts > 0)
    np.testing.assert_allclose(ranking.control_rate.numpy(), np.mean(inside, axis=0))
    np.testing.assert_allclose(ranking.template_rate.numpy(), np.mean(outside, axis=0))
