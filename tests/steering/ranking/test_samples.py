"""Samples of replies, against the slow reference, and the attention sinks left out of any."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.checks.words import keeping_thoughts
from saesteer.steering.ranking.rank import RankConfig, rank

from ..ranking_by_hand import (
    CLOSE,
    CONTENTS,
    D_SAE,
    PASSING,
    TASK,
    TRAIN,
    WORDINGS,
    Array,
    check_columns,
    columns,
    latents_of,
    random_sae,
    read_at,
    reply_positions,
    reply_to,
    sample,
    scripted,
    token_ids,
    token_ids_plain,
)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("by", [None, "meandiff"])
@pytest.mark.parametrize("all_replies", [False, True])
def test_replies_are_scored_as_by_hand(
    by: str | None,
    all_replies: bool,
    chat: bool,
    lm_of: Callable[..., LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, sae = lm_of(chat=chat), random_sae()
    calls = scripted(monkeypatch, lm, reply_to)
    config = RankConfig(
        read="reply", by=by, contents=CONTENTS, all_replies=all_replies, batch_size=3,
        max_new_tokens=7, temperature=0.3, top_p=0.6, seed=5,
    )  # fmt: skip
    ranking = rank(lm, sae, TASK, config)

    instructed = [f"{content}\n{wording}" for wording in WORDINGS[:2] for content in TRAIN]
    counted = [text for i, text in enumerate(instructed) if all_replies or i % 5 in PASSING]
    positive = reply_positions(lm, sae, counted)
    negative = reply_positions(lm, sae, TRAIN)
    found = columns(positive, negative)
    check_columns(ranking, found)
    np.testing.assert_allclose(ranking.score.numpy(), found[by or "rate"], **CLOSE)
    assert (ranking.positives, ranking.negatives) == (len(positive), len(negative))
    assert ranking.replies_used == (len(counted), 10)
    assert len(ranking.by_variant) == 0
    assert "variant_min" not in ranking.explain(0)
    assert [call["texts"] for call in calls] == [instructed, list(TRAIN)]
    wanted = {"max_new_tokens": 7, "temperature": 0.3, "top_p": 0.6, "seed": 5, "batch_size": 3}
    for call in calls:
        assert {name: call[name] for name in wanted} == wanted


def test_thoughts_before_a_reply_are_not_read(
    lm_of: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, sae = lm_of(), random_sae()
    thought = "<think>\nA list. Not yet.\n</think>\n\n"
    # One reply is nothing but thought, and one has none.
    before = {TRAIN[2]: "", f"{TRAIN[2]}\n{WORDINGS[0]}": ""}
    cut = {TRAIN[3]}

    def reply(text: str) -> str:
        return "<think>\nA list" if text in cut else before.get(text, thought) + reply_to(text)

    def positions(texts: list[str]) -> list[Array]:
        found = []
        for text in texts:
            prompt, said = (
                token_ids(lm, text),
                lm.tokenizer(reply(text), return_offsets_mapping=True),
            )
            acts = latents_of(lm, sae, [*prompt, *said["input_ids"]])
            answer = len(before.get(text, thought))
            inside = [start >= answer for start, _ in said["offset_mapping"]]
            first = inside.index(True) if True in inside else len(inside)
            if text not in cut:  # the token before the answer predicts its first one
                found += list(acts[len(prompt) - 1 + first :])
        return found

    scripted(monkeypatch, lm, reply)
    config = RankConfig(read="reply", contents=CONTENTS, reply_variants=1)
    instructed = [f"{content}\n{WORDINGS[0]}" for content in TRAIN]
    positive = positions([instructed[i] for i in PASSING])
    ranking = rank(lm, sae, TASK, config)
    check_columns(ranking, columns(positive, positions(list(TRAIN))))
    assert ranking.positives == len(positive)
    with keeping_thoughts():
        everything = rank(lm, sae, TASK, config)
    assert everything.positives > ranking.positives
    assert everything.negatives > ranking.negatives


def test_attention_sinks_are_left_out_of_replies(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens whose residual is far longer than the others are no samples."""
    (sink,) = lm.tokenizer("H")["input_ids"]  # the first token of every passing reply
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[sink] *= 300
    sae = random_sae()
    scripted(monkeypatch, lm, reply_to)
    config = RankConfig(read="reply", contents=CONTENTS, reply_variants=1)
    ranking = rank(lm, sae, TASK, config)
    instructed = [f"{content}\n{WORDINGS[0]}" for content in TRAIN]
    counted = [instructed[i] for i in PASSING]
    positive = reply_positions(lm, sae, counted, left_out=[sink])
    check_columns(ranking, columns(positive, reply_positions(lm, sae, TRAIN)))
    assert ranking.positives == len(positive)
    assert ranking.excluded == {"sinks": len(counted)}
    everything = rank(lm, sae, TASK, dataclasses.replace(config, max_norm_ratio=1e9))
    assert everything.positives == len(positive) + len(counted)
    assert ranking.highest.max() < everything.highest.max() / 10


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("by", ["saif", "rate", "meandiff"])
def test_attention_sinks_are_left_out_of_spans(by: str, pool: str, lm: LanguageModel) -> None:
    sink = lm.tokenizer(WORDINGS[1])["input_ids"][0]
    assert sink not in {i for w in WORDINGS[::2] for i in lm.tokenizer(w)["input_ids"]}
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[sink] *= 300
    sae, config = random_sae(), RankConfig(by=by, pool=pool, read="span", contents=CONTENTS)
    ranking = rank(lm, sae, TASK, config)

    def pooled(text: str, wording: str | None) -> Array:
        ids, positions = read_at(lm, text, wording, config)
        acts = latents_of(lm, sae, ids)[[p for p in positions if ids[p] != sink]]
        return acts.max(axis=0) if pool == "max" else acts.mean(axis=0)

    plain = [pooled(content, None) for content in TRAIN]
    positive = [pooled(f"{content}\n{w}", w) for w in WORDINGS for content in TRAIN]
    check_columns(ranking, columns(positive, plain))
    assert (ranking.positives, ranking.negatives) == (15, 5)
    # The second wording's first token, in each of the five texts.
    assert ranking.excluded == {"sinks": CONTENTS}


def test_a_sample_read_at_a_sink_is_dropped_with_its_pair(lm: LanguageModel) -> None:
    ends = [token_ids_plain(lm, text)[-1] for text in (*TRAIN, *WORDINGS)]
    content, wording = 1, 2
    for chosen in (content, len(TRAIN) + wording):
        assert ends.count(ends[chosen]) == 1
    with torch.no_grad():
        for sink in (ends[content], ends[len(TRAIN) + wording]):
            lm.model.get_input_embeddings().weight[sink] *= 300
    sae = random_sae()
    ranking = rank(lm, sae, TASK, RankConfig(contents=CONTENTS))
    kept = [text for i, text in enumerate(TRAIN) if i != content]
    config = RankConfig()
    plain = [sample(lm, sae, text, None, config) for text in kept]
    by_wording = [
        [sample(lm, sae, f"{text}\n{w}", w, config) for text in kept] for w in WORDINGS[:wording]
    ]
    check_columns(ranking, columns([acts for group in by_wording for acts in group], plain))
    assert (ranking.positives, ranking.negatives) == (8, 4)
    assert ranking.excluded == {"sinks": 1 + CONTENTS}
    wanted = [
        [
            np.mean([a[j] > 0 and not b[j] > 0 for a, b in zip(group, plain, strict=True)])
            for j in range(D_SAE)
        ]
        for group in by_wording
    ]
    np.testing.assert_allclose(ranking.by_variant[:wording].numpy(), wanted, **CLOSE)
    np.testing.assert_allclose(ranking.score.numpy(), np.mean(wanted, axis=0), **CLOSE)
    assert not ranking.by_variant[wording].any()


def test_sinks_alone_are_an_error(lm: LanguageModel) -> None:
    """The last token of the only wording is one."""
    task = dataclasses.replace(TASK, variants=())
    with torch.no_grad():
        sink = token_ids_plain(lm, WORDINGS[0])[-1]
        lm.model.get_input_embeddings().weight[sink] *= 300
    with pytest.raises(UserError, match="`read` last would read attention sinks alone"):
        rank(lm, random_sae(), task)


def test_the_models_own_replies_are_read(lm: LanguageModel) -> None:
    sae = random_sae()
    config = RankConfig(
        read="reply", contents=2, reply_variants=1, all_replies=True, temperature=0.0,
        max_new_tokens=5,
    )  # fmt: skip
    ranking = rank(lm, sae, TASK, config)
    kinds: list[list[Array]] = []
    for texts in ([f"{content}\n{WORDINGS[0]}" for content in TRAIN[:2]], TRAIN[:2]):
        samples: list[Array] = []
        for text in texts:
            ids = token_ids(lm, text)
            row = lm.model.generate(
                torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=2
            )[0].tolist()
            while row[-1] == 2:  # the end of the text, which is no token of it
                row.pop()
            samples += list(latents_of(lm, sae, row)[len(ids) - 1 :])
        kinds.append(samples)
    check_columns(ranking, columns(*kinds))
    assert ranking.positives == len(kinds[0]) > 2
