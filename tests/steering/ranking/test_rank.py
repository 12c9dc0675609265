"""What a ranking finds, what it refuses, and the plan that is made of it."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import NonFiniteError, UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel, load_model
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt
from saesteer.steering.ranking import reading as reading_module
from saesteer.steering.ranking import samples as samples_module
from saesteer.steering.ranking.rank import RankConfig, Ranking, lens_tokens, plan_from_ranking, rank
from saesteer.steering.tasks.task import Variant

from ..ranking_by_hand import (
    CONTENTS,
    D_SAE,
    LAYER,
    TASK,
    TRAIN,
    WORDINGS,
    random_sae,
    reply_to,
    scripted,
)


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


def test_a_ranking_shows_its_best_and_is_a_frame(lm: LanguageModel) -> None:
    ranking = made_ranking(lm, [0.0, 0.5, *[0.0] * (D_SAE - 2)], [1.0] * D_SAE)
    best = 1
    assert "best={1: 0.5, " in repr(ranking) and len(repr(ranking)) < 400
    frame = ranking.to_frame()
    assert frame.index.name == "latent" and frame.index[0] == best
    assert len(frame) == len(ranking.score)
    assert frame.loc[best, "score"] == float(ranking.score[best])


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"read": "first"}, "`read` must be one of last, template, span, reply, got 'first'"),
        ({"by": "luck"}, "`by` must be one of saif, rate, logodds, .*, causal, got 'luck'"),
        ({"drop": ("dense", "odd")}, "`drop` must be one of dense, template, duplicate, fdr, got"),
        ({"max_fdr": 0.0}, "`max_fdr` must be above 0 and at most 1, got 0.0"),
        ({"doses": ()}, "`doses` must be positive numbers, got"),
        ({"doses": (0.3, -1.0)}, "`doses` must be positive numbers, got"),
        ({"shortlist": 0}, "`shortlist` must be at least 1, got 0"),
        ({"position": "inside"}, "`position` must be one of post, pre, got 'inside'"),
        ({"pool": "sum"}, "`pool` must be one of max, mean, got 'sum'"),
        ({"by": "saif", "read": "reply"}, "`by` saif .* `read` reply .*: use `by` rate"),
        ({"contents": 0}, "`contents` must be at least 1, got 0"),
        ({"reply_variants": 0}, "`reply_variants` must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"batch_size": -1}, "`batch_size` must be at least 1, got -1"),
        ({"max_norm_ratio": 1.0}, "`max_norm_ratio` must be above 1, got 1.0"),
        ({"max_norm_ratio": math.nan}, "`max_norm_ratio` must be above 1, got nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RankConfig(**settings)


def test_nothing_told_apart(lm: LanguageModel) -> None:
    silent = random_sae("standard")
    silent.b_enc -= 1e6
    ranking = rank(lm, silent, TASK, RankConfig(contents=2))
    with pytest.raises(UserError, match="no latent tells lists apart at layer 1.*`replies`"):
        ranking.top(15)
    with pytest.raises(UserError, match="no latent tells lists apart"):
        plan_from_ranking(lm, silent, ranking)


def test_no_reply_passes(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, lm, lambda text: "Something else.")
    with pytest.raises(UserError, match="none of 10 replies to 'lists' passes .*`all_replies`"):
        rank(lm, random_sae(), TASK, RankConfig(read="reply", contents=CONTENTS))
    assert len(calls) == 1  # plain contents were not answered for nothing


def test_a_task_without_a_check_has_no_passing_replies(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scripted(monkeypatch, lm, reply_to)
    unchecked = dataclasses.replace(TASK, check_name=None, check_arguments=None)
    with pytest.raises(UsageError, match="'lists' has none: give `all_replies`"):
        rank(lm, random_sae(), unchecked, RankConfig(read="reply", contents=CONTENTS))
    assert not calls
    config = RankConfig(read="reply", contents=CONTENTS, all_replies=True)
    assert rank(lm, random_sae(), unchecked, config).replies_used == (10, 10)


def test_no_train_contents(lm: LanguageModel) -> None:
    empty = dataclasses.replace(TASK, contents={"dev": ("a",), "test": ("b",)})
    with pytest.raises(UserError, match="task 'lists' has no contents in its train split"):
        rank(lm, random_sae(), empty)


def test_an_unknown_task(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="unknown task 'klingon': `task` takes"):
        rank(lm, random_sae(), "klingon")


def test_an_sae_of_another_model(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="an-sae has d_model 16, `model` tiny has 32"):
        rank(lm, random_sae(d_model=16), TASK)
    facts = {"saesteer": {"model": {"hash": "0123"}}}
    other = random_sae(metadata=facts, model_name="elsewhere")
    with pytest.raises(UserError, match="trained on elsewhere with weights 0123.*or `force`"):
        rank(lm, other, TASK)
    assert rank(lm, other, TASK, RankConfig(contents=1), force=True).positives == 3
    with pytest.raises(UserError, match="`layer` 2 conflicts with `sae` an-sae.*layer 1"):
        rank(lm, random_sae(), TASK, layer=2)


def test_activations_that_are_not_finite(lm: LanguageModel) -> None:
    with torch.no_grad():
        next(lm.blocks[0].parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinite activations at layer 1: try `dtype`"):
        rank(lm, random_sae(), TASK, RankConfig(contents=1))


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
    with pytest.raises(UsageError, match="`top` must be at least 1, got 0"):
        plan_from_ranking(lm, random_sae(), found, top=0)


def test_the_last_block_is_reached_from_the_end(
    tiny_model_dir: Callable[..., Path],
) -> None:
    """An SAE that names no layer is read where `layer` says; negative counts from the end."""
    lm = load_model(str(tiny_model_dir("llama")), device="cpu")
    nameless = random_sae(hook_name="")
    with pytest.raises(UsageError, match="names no layer: give `layer`"):
        rank(lm, nameless, TASK)
    found = rank(lm, nameless, TASK, RankConfig(contents=2), layer=-1)
    wanted = rank(lm, random_sae(layer=3), TASK, RankConfig(contents=2))
    assert found.point.layer == 3
    assert torch.equal(found.score, wanted.score)
