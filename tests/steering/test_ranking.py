"""Ranking against a slow reference: one text at a time, latents by numpy, statistics by loops."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saesteer.checkpoints.errors import NonFiniteError, UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.generation import Completion
from saesteer.sae.models import LanguageModel, load_model, wrap_model
from saesteer.sae.prompts import EncodedPrompt, encode_prompt
from saesteer.steering import reading as reading_module
from saesteer.steering import samples as samples_module
from saesteer.steering.ranking import (
    RankConfig,
    Ranking,
    lens_tokens,
    plan_from_ranking,
    rank,
)
from saesteer.steering.tasks import Task, Variant

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


# --- models and SAEs -----------------------------------------------------------------------------


@pytest.fixture
def make_lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> Callable[..., LanguageModel]:
    def make(family: str = "llama", *, chat: bool = True) -> LanguageModel:
        model, tokenizer = tiny_lm(family)
        if not chat:
            tokenizer.chat_template = None
        return wrap_model(model, tokenizer, f"tiny-{family}")

    return make


@pytest.fixture
def lm(make_lm: Callable[..., LanguageModel]) -> LanguageModel:
    return make_lm()


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


# --- the slow reference --------------------------------------------------------------------------


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


# --- reading prompts -----------------------------------------------------------------------------

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
    case: dict[str, Any], make_lm: Callable[..., LanguageModel]
) -> None:
    place = dict(case)
    lm = make_lm(place.pop("family", "llama"), chat=place.pop("chat", True))
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
    sae.save(tmp_path / "sae")
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


# --- reading replies -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("by", [None, "meandiff"])
@pytest.mark.parametrize("all_replies", [False, True])
def test_replies_are_scored_as_by_hand(
    by: str | None,
    all_replies: bool,
    chat: bool,
    make_lm: Callable[..., LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, sae = make_lm(chat=chat), random_sae()
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
    with pytest.raises(UserError, match="--read last would read attention sinks alone"):
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


# --- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["saif", "rate", "meandiff"])
def test_a_planted_latent_is_found(by: str, lm: LanguageModel) -> None:
    """The instruction's last token writes a direction that one latent reads."""
    planted, wordings = 11, ("Answer it Q", "Say more Q")
    task = dataclasses.replace(TASK, instruction=wordings[0], variants=(Variant(wordings[1]),))
    last = {lm.tokenizer(wording)["input_ids"][-1] for wording in wordings}
    assert len(last) == 1
    direction = torch.nn.functional.normalize(
        torch.randn(32, generator=torch.Generator().manual_seed(9)), dim=0
    )
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[last.pop()] += 60 * direction
    sae = random_sae()
    sae.W_enc -= torch.outer(direction, direction @ sae.W_enc)  # no other latent reads it
    sae.W_enc[:, planted] = direction
    sae.b_enc[planted] = -30
    # What is planted is as long as an attention sink, and is to be read here.
    config = RankConfig(by=by, contents=CONTENTS, max_norm_ratio=1e9)
    ranking = rank(lm, sae, task, config)
    assert ranking.top(3)[0] == planted
    assert ranking.rate_positive[planted] == 1
    assert ranking.rate_negative[planted] == 0
    if by != "meandiff":
        assert ranking.score[planted] == 1


def made_ranking(lm: LanguageModel, score: Sequence[float], mu: Sequence[float]) -> Ranking:
    """A ranking with these scores; the rest does not matter."""
    blank = torch.zeros(len(score), dtype=torch.float64)
    real = rank(lm, random_sae(), TASK, RankConfig(contents=1))
    return dataclasses.replace(
        real,
        score=torch.tensor(score, dtype=torch.float64),
        mu=torch.tensor(mu, dtype=torch.float64),
        sigma=blank,
        highest=blank,
    )


def test_the_best_are_by_score_then_mu_then_number(lm: LanguageModel) -> None:
    rest = [0.0] * (D_SAE - 6)
    ranking = made_ranking(
        lm, [0.5, 0.5, 0.0, 0.9, 0.5, -1.0, *rest], [1.0, 2.0, 9.0, 0.1, 2.0, 9.0, *rest]
    )
    assert ranking.top(10) == [3, 1, 4, 0]  # none that scores 0 or less
    assert ranking.top(2) == [3, 1]


@pytest.mark.parametrize("by", ["saif", "rate"])
def test_scores_that_tie_are_equal_to_the_bit(
    by: str, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.1 + 0.1 + 0.1 is not 0.3 in floating point, and 0.4 - 0.1 is not 0.5 - 0.2."""
    # How many of ten contents each of three latents fires on: alone, and with each wording.
    counts = {"saif": ([0, 0, 0], [[1, 3, 0], [1, 0, 2], [1, 0, 1]])}
    counts["rate"] = ([1, 2, 3], [[4, 5, 6], [4, 5, 6], [4, 5, 6]])
    plain, instructed = counts[by]
    left = [plain, *instructed]

    def read(reader: Any, texts: list[str], instruction: str | None, count: Any) -> Any:
        acts = torch.zeros(10, D_SAE)
        for latent, fires in enumerate(left.pop(0)):
            acts[10 - fires :, latent] = 1.0 + latent
        return enumerate(acts)

    monkeypatch.setattr(samples_module, "read_texts", read)
    many = dataclasses.replace(TASK, contents={"train": tuple("abcdefghij")})
    ranking = rank(lm, random_sae(), many, RankConfig(by=by))
    assert len(set(ranking.score[:3].tolist())) == 1
    assert ranking.score[0] == pytest.approx(0.1 if by == "saif" else 0.3)
    assert ranking.top(3) == [2, 1, 0]  # by mu


@pytest.mark.parametrize("by", ["welch", "cohen"])
def test_a_latent_that_is_constant_in_each_class_is_a_discovery(
    by: str, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its t is without bound: p and q are 0, the filter keeps it, and what is written is finite."""

    def read(reader: Any, texts: list[str], instruction: str | None, count: Any) -> Any:
        acts = torch.zeros(10, D_SAE)
        acts[:, 5] = 1.0  # always on, whatever is asked
        acts[:, 7] = 0.0 if instruction is None else 2.0
        acts[:, 9] = torch.arange(10) % 3  # varies, and does not differ
        return enumerate(acts)

    monkeypatch.setattr(samples_module, "read_texts", read)
    many = dataclasses.replace(TASK, contents={"train": tuple("abcdefghij")})
    ranking = rank(lm, random_sae(), many, RankConfig(by=by, drop=("fdr",), max_fdr=0.01))
    assert ranking.top(3) == [7]
    assert (ranking.p[7], ranking.q[7]) == (0, 0)
    assert ranking.p[[5, 9, 0]].tolist() == ranking.q[[5, 9, 0]].tolist() == [1, 1, 1]
    for latent in (7, 5, 9, 0):
        json.dumps(ranking.explain(latent), allow_nan=False)
    plan = plan_from_ranking(lm, random_sae(), ranking, top=1)
    json.dumps([plan.metrics, dataclasses.asdict(plan.latents[0])], allow_nan=False)


def test_only_train_contents_and_selection_wordings_are_read(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(lm: LanguageModel, text: str, *, chat: bool) -> EncodedPrompt:
        seen.append(text)
        return encode_prompt(lm, text, chat=chat)

    monkeypatch.setattr(reading_module, "encode_prompt", spy)
    rank(lm, random_sae(), TASK, RankConfig(contents=3))
    allowed = {*TRAIN[:3], *(f"{c}\n{w}" for c in TRAIN[:3] for w in WORDINGS)}
    assert set(seen) == allowed
    assert len(seen) == len(allowed)
    seen.clear()
    rank(
        lm, random_sae(), TASK,
        RankConfig(read="reply", contents=2, all_replies=True, max_new_tokens=2),
    )  # fmt: skip
    assert set(seen) == {*TRAIN[:2], *(f"{c}\n{w}" for c in TRAIN[:2] for w in WORDINGS[:2])}


def test_progress_counts_each_stage_to_its_end(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, int, int, str]] = []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        shown.append((stage, done, total, note))

    rank(lm, random_sae(), TASK, RankConfig(contents=5, batch_size=4), progress=progress)
    stage, total, unit = "rank: read prompts", 20, "samples"
    assert {(name, of, note) for name, _, of, note in shown} == {(stage, total, unit)}
    # Each wording is read in a batch of four and one of the last.
    assert [done for _, done, _, _ in shown] == [0, 4, 5, 9, 10, 14, 15, 19, 20]
    shown.clear()
    config = RankConfig(read="reply", contents=3, all_replies=True, batch_size=4, max_new_tokens=2)
    rank(lm, random_sae(), TASK, config, progress=progress)
    by_stage: dict[str, list[tuple[int, int, str]]] = {}
    for name, done, total, note in shown:
        by_stage.setdefault(name, []).append((done, total, note))
    assert by_stage == {
        "rank: instructed replies": [(0, 6, "replies"), (4, 6, "replies"), (6, 6, "replies")],
        "rank: plain replies": [(0, 3, "replies"), (3, 3, "replies")],
        "rank: read instructed": [(0, 6, "replies"), (4, 6, "replies"), (6, 6, "replies")],
        "rank: read plain": [(0, 3, "replies"), (3, 3, "replies")],
    }


@pytest.mark.gpu
@pytest.mark.parametrize("read", ["span", "reply"])
def test_an_sae_in_memory_goes_where_the_model_is(read: str, lm: LanguageModel) -> None:
    sae = random_sae()
    config = RankConfig(
        read=read, by="meandiff", contents=2, all_replies=True, temperature=0.0, max_new_tokens=3
    )
    wanted = rank(lm, sae, TASK, config)
    lm.model.to("cuda")
    found = rank(lm, sae, TASK, config)
    assert sae.W_enc.device.type == "cpu"
    # Float32 products of another library, through two blocks; a latent at its threshold may flip.
    torch.testing.assert_close(found.score, wanted.score, rtol=0, atol=0.05)
    assert plan_from_ranking(lm, sae, found, top=3).directions.device.type == "cpu"


# --- what cannot be ranked -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"read": "first"}, "--read must be one of last, template, span, reply, got 'first'"),
        ({"by": "luck"}, "--by must be one of saif, rate, logodds, .*, causal, got 'luck'"),
        ({"drop": ("dense", "odd")}, "--drop must be one of dense, template, duplicate, fdr, got"),
        ({"max_fdr": 0.0}, "--max-fdr must be above 0 and at most 1, got 0.0"),
        ({"doses": ()}, "--doses must be positive numbers, got"),
        ({"doses": (0.3, -1.0)}, "--doses must be positive numbers, got"),
        ({"shortlist": 0}, "--shortlist must be at least 1, got 0"),
        ({"position": "inside"}, "--position must be one of post, pre, got 'inside'"),
        ({"pool": "sum"}, "--pool must be one of max, mean, got 'sum'"),
        ({"by": "saif", "read": "reply"}, "--by saif .* --read reply .*: use --by rate"),
        ({"contents": 0}, "--rank-contents must be at least 1, got 0"),
        ({"reply_variants": 0}, "--reply-variants must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"max_norm_ratio": 1.0}, "--max-norm-ratio must be above 1, got 1.0"),
        ({"max_norm_ratio": math.nan}, "--max-norm-ratio must be above 1, got nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RankConfig(**settings)


def test_nothing_told_apart(lm: LanguageModel) -> None:
    silent = random_sae("standard")
    silent.b_enc -= 1e6
    ranking = rank(lm, silent, TASK, RankConfig(contents=2))
    with pytest.raises(UserError, match="no latent tells lists apart at layer 1.*--replies"):
        ranking.top(15)
    with pytest.raises(UserError, match="no latent tells lists apart"):
        plan_from_ranking(lm, silent, ranking)


def test_no_reply_passes(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, lm, lambda text: "Something else.")
    with pytest.raises(UserError, match="none of 10 replies to 'lists' passes .*--all-replies"):
        rank(lm, random_sae(), TASK, RankConfig(read="reply", contents=CONTENTS))
    assert len(calls) == 1  # plain contents were not answered for nothing


def test_a_task_without_a_check_has_no_passing_replies(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scripted(monkeypatch, lm, reply_to)
    unchecked = dataclasses.replace(TASK, check_name=None, check_arguments=None)
    with pytest.raises(UsageError, match="'lists' has none: give --all-replies"):
        rank(lm, random_sae(), unchecked, RankConfig(read="reply", contents=CONTENTS))
    assert not calls
    config = RankConfig(read="reply", contents=CONTENTS, all_replies=True)
    assert rank(lm, random_sae(), unchecked, config).replies_used == (10, 10)


def test_no_train_contents(lm: LanguageModel) -> None:
    empty = dataclasses.replace(TASK, contents={"dev": ("a",), "test": ("b",)})
    with pytest.raises(UserError, match="task 'lists' has no contents in its train split"):
        rank(lm, random_sae(), empty)


def test_an_unknown_task(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="unknown task 'klingon': --task takes"):
        rank(lm, random_sae(), "klingon")


def test_an_sae_of_another_model(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="an-sae has d_model 16, --model tiny-llama has 32"):
        rank(lm, random_sae(d_model=16), TASK)
    facts = {"saesteer": {"model": {"hash": "0123"}}}
    other = random_sae(metadata=facts, model_name="elsewhere")
    with pytest.raises(UserError, match="trained on elsewhere with weights 0123.*or --force"):
        rank(lm, other, TASK)
    assert rank(lm, other, TASK, RankConfig(contents=1), force=True).positives == 3
    with pytest.raises(UserError, match="--layer 2 conflicts with --sae an-sae.*layer 1"):
        rank(lm, random_sae(), TASK, layer=2)


def test_activations_that_are_not_finite(lm: LanguageModel) -> None:
    with torch.no_grad():
        next(lm.blocks[0].parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinite activations at layer 1: try --dtype"):
        rank(lm, random_sae(), TASK, RankConfig(contents=1))


# --- lens and plan -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
def test_lens_tokens_are_those_the_direction_raises(
    family: str, make_lm: Callable[..., LanguageModel]
) -> None:
    lm = make_lm(family)
    head = lm.model.get_output_embeddings().weight
    if family == "qwen2":  # its vocabulary is padded: make the untrained rows tempting
        with torch.no_grad():
            head[len(lm.tokenizer) :] *= 100
    W_U = head.double().numpy()
    norm = lm.final_norm
    assert norm is not None
    weight = norm.weight.double().numpy()  # type: ignore[operator, union-attr]
    for d in random_sae().W_dec[:3]:
        x = d.double().numpy()
        if family == "gpt2":
            normed = (x - x.mean()) / x.std() * weight
            normed = normed + norm.bias.double().numpy()  # type: ignore[operator, union-attr]
        else:
            gain = 1 + weight if family == "gemma2" else weight
            normed = x / np.sqrt((x**2).mean()) * gain
        logits = (W_U @ normed)[: len(lm.tokenizer)]
        wanted = [lm.tokenizer.decode([int(i)]) for i in np.argsort(-logits)[:5]]
        assert lens_tokens(lm, d, 5) == wanted
        assert lens_tokens(lm, d * 1e-3, 5) == wanted  # a direction's length means nothing


def test_a_plan_holds_the_best_latents(lm: LanguageModel) -> None:
    sae = random_sae()
    ranking = rank(lm, sae, TASK, RankConfig(contents=CONTENTS))
    plan = plan_from_ranking(lm, sae, ranking, top=4, scale=2.0, beta=0.5, scope="all")
    assert list(plan.ids) == ranking.top(4)
    assert torch.equal(plan.directions, sae.W_dec[ranking.top(4)])
    for latent in plan.latents:
        assert latent.score == ranking.score[latent.id]
        assert latent.mu == ranking.mu[latent.id]
        assert latent.sigma == ranking.sigma[latent.id]
        assert latent.max == ranking.highest[latent.id]
        assert list(latent.lens) == lens_tokens(lm, sae.W_dec[latent.id])
    assert plan.doses() == pytest.approx([2 * (a.mu + 0.5 * a.sigma) for a in plan.latents])  # type: ignore[operator]
    assert (plan.layer, plan.site, plan.scope) == (LAYER, "resid_post", "all")
    assert plan.task is not None
    assert (plan.task.name, plan.task.hash) == (TASK.name, TASK.hash)
    assert set(plan.task.instructions) == {*WORDINGS, "Kept apart as items"}
    assert plan.metrics["by"] == "saif" and plan.metrics["positives"] == 15


def test_a_plan_takes_no_latent_that_scores_nothing(lm: LanguageModel) -> None:
    found = made_ranking(lm, [0.5, 0.0, 0.7] + [-0.1] * (D_SAE - 3), [1.0] * D_SAE)
    plan = plan_from_ranking(lm, random_sae(), found, top=15)
    assert plan.ids == (2, 0)
    with pytest.raises(UsageError, match="--top must be at least 1, got 0"):
        plan_from_ranking(lm, random_sae(), found, top=0)


def test_the_last_block_is_reached_from_the_end(
    tiny_model_dir: Callable[..., Path],
) -> None:
    """An SAE that names no layer is read where `layer` says; negative counts from the end."""
    lm = load_model(str(tiny_model_dir("llama")), device="cpu")
    nameless = random_sae(hook_name="")
    with pytest.raises(UsageError, match="names no layer: give --layer"):
        rank(lm, nameless, TASK)
    found = rank(lm, nameless, TASK, RankConfig(contents=2), layer=-1)
    wanted = rank(lm, random_sae(layer=3), TASK, RankConfig(contents=2))
    assert found.point.layer == 3
    assert torch.equal(found.score, wanted.score)
