"""The causal re-rank with scripted answers, and on the way from a ranking to a plan."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.hooks import sae_hook_point
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.grades.repetition import is_degenerate
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.generation import SteeredText, generate_steered
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent
from saesteer.steering.ranking import causal as rerank_module
from saesteer.steering.ranking.causal import CausalTrial, causal_scores, causal_trials
from saesteer.steering.ranking.rank import RankConfig, plan_from_ranking, rank
from saesteer.steering.tasks.task import Task, Variant

D_SAE = 16

TASK = Task(
    name="lists",
    instruction="Use a list",
    variants=(Variant("Make it a list, please."),),
    contents={"train": ("A tuple needs a comma.", "yield", "Modules are objects", "unread")},
    check_name="keyword",
    check_arguments={"keyword": "indeed"},
)
TRAIN = TASK.contents["train"][:3]


@pytest.fixture
def lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> LanguageModel:
    return wrap_model(*tiny_lm("llama"), "tiny-llama")


@pytest.fixture
def sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    return SAE(
        spec=SAESpec(
            architecture="topk", d_model=32, d_sae=D_SAE, k=5,
            hook_name="blocks.1.hook_resid_post", apply_b_dec_to_input=True,
        ),
        W_enc=torch.randn(32, D_SAE, generator=generator) / 3,
        b_enc=torch.randn(D_SAE, generator=generator),
        W_dec=torch.randn(D_SAE, 32, generator=generator),
        b_dec=torch.randn(32, generator=generator),
    )  # fmt: skip


def scripted(
    monkeypatch: pytest.MonkeyPatch, answers: Callable[[Plan | None, str], str]
) -> list[dict[str, Any]]:
    """Replace steered answers by scripted ones; returns what was asked for."""
    calls: list[dict[str, Any]] = []

    def generate(
        lm: LanguageModel, texts: Sequence[str], plan: ByRow, **settings: Any
    ) -> list[SteeredText]:
        calls.append({"texts": list(texts), "plans": list(plan.plans), **settings})
        says = [answers(one, text) for one, text in zip(plan.plans, texts, strict=True)]  # type: ignore[arg-type]
        # "loop" comes out as one token over and over, which is degenerate.
        ids = [[7] * 40 if "loop" in text else list(range(40)) for text in says]
        return [SteeredText(*row) for row in zip(texts, says, ids, strict=True)]

    monkeypatch.setattr(rerank_module, "generate_steered", generate)
    return calls


def test_the_check_judges_each_latent_at_each_dose(
    lm: LanguageModel, sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(plan: Plan | None, content: str) -> str:
        if plan is None:
            return "indeed" if content == TRAIN[0] else "no"
        if plan.ids == (4,):
            return "indeed a loop" if plan.scale > 0.4 else "yes, indeed"
        return "no"

    calls = scripted(monkeypatch, answers)
    config = RankConfig(causal_contents=3, doses=(0.3, 0.6), max_new_tokens=9)
    point = sae_hook_point(sae, lm)
    trials = causal_trials(lm, sae, point, TASK, config, [4, 9], list(TASK.contents["train"]))
    assert trials == [
        CausalTrial(None, 0.0, 1, 0, 3),
        CausalTrial(4, 0.3, 3, 0, 3),
        CausalTrial(4, 0.6, 0, 3, 3),
        CausalTrial(9, 0.3, 0, 0, 3),
        CausalTrial(9, 0.6, 0, 0, 3),
    ]
    assert causal_scores(trials) == {4: pytest.approx(2 / 3), 9: pytest.approx(-1 / 3)}
    (call,) = calls
    assert call["max_new_tokens"] == 9
    asked = [
        (text, None if plan is None else (plan.ids, plan.unit, plan.scale))
        for text, plan in zip(call["texts"], call["plans"], strict=True)
    ]
    assert asked == [
        (text, trial)
        for text in TRAIN
        for trial in (
            None, ((4,), "rel", 0.3), ((4,), "rel", 0.6), ((9,), "rel", 0.3), ((9,), "rel", 0.6),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_together_is_as_one_by_one(batch_size: int, lm: LanguageModel, sae: SAE) -> None:
    """Rows with plans of their own say what each plan says alone, whatever the batches."""
    steered: list[SteeredText] = []

    def spy(*args: Any, **settings: Any) -> list[SteeredText]:
        steered.extend(generate_steered(*args, **settings))
        return steered

    point, ids, doses = sae_hook_point(sae, lm), [2, 5, 11], (0.3, 2.0)
    config = RankConfig(
        causal_contents=3, doses=doses, max_new_tokens=6, batch_size=batch_size
    )  # fmt: skip
    # A check that about half of the answers pass, so that a mixed-up row changes a count.
    check = dataclasses.replace(
        TASK, check_name="length", check_arguments={"unit": "characters", "minimum": 22}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rerank_module, "generate_steered", spy)
        trials = causal_trials(lm, sae, point, check, config, ids, list(TRAIN))
    expected, texts = [], {}
    for latent, dose in [(None, 0.0), *((i, dose) for i in ids for dose in doses)]:
        plan = None if latent is None else make_plan(
            lm, sae, [PlannedLatent(id=latent, value=1.0)], layer=1, site="resid_post", unit="rel",
            scale=dose,
        )  # fmt: skip
        alone = [generate_steered(lm, [text], plan, max_new_tokens=6)[0] for text in TRAIN]
        passed = [check.verdict(one.completion, text) is Verdict.PASS
                  for one, text in zip(alone, TRAIN, strict=True)]  # fmt: skip
        broken = [is_degenerate(one.token_ids) for one in alone]
        good = sum(ok and not bad for ok, bad in zip(passed, broken, strict=True))
        expected.append(CausalTrial(latent, dose, good, sum(broken), 3))
        texts[latent, dose] = [one.token_ids for one in alone]
    assert trials == expected
    assert len({tuple(map(tuple, said)) for said in texts.values()}) > 4  # steering said much
    together = [one.token_ids for one in steered]
    assert together == [said[place] for place in range(3) for said in texts.values()]


def test_doses_are_the_same_for_every_latent(lm: LanguageModel, sae: SAE) -> None:
    """Decoder rows of any length: the edit is as long as was asked for."""
    sae.W_dec *= torch.arange(1, D_SAE + 1)[:, None]
    doses: list[float | None] = []

    def spy(*args: Any, **settings: Any) -> list[SteeredText]:
        found = generate_steered(*args, **settings)
        doses.extend(text.relative_dose for text in found)
        return found

    config = RankConfig(causal_contents=2, doses=(0.25,), max_new_tokens=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rerank_module, "generate_steered", spy)
        causal_trials(lm, sae, sae_hook_point(sae, lm), TASK, config, [0, 15], list(TRAIN))
    assert doses[::3] == [None, None]  # unsteered
    assert doses[1::3] + doses[2::3] == pytest.approx([0.25] * 4, rel=1e-4)


def test_causal_ranks_by_what_steering_does(
    lm: LanguageModel, sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the scores before it say, the latent that makes answers pass comes first."""
    config = RankConfig(by="fused", contents=3, all_replies=True, max_new_tokens=4, candidates=6)
    fused = rank(lm, sae, TASK, config)
    short = fused.top(4)
    wanted = short[2]
    scripted(monkeypatch, lambda plan, text: "indeed" if plan and plan.ids == (wanted,) else "no")
    ranking = rank(lm, sae, TASK, dataclasses.replace(config, by="causal", shortlist=4))
    assert ranking.top(15) == [wanted]
    assert {t.latent for t in ranking.trials} == {None, *short}
    assert int(ranking.columns["causal"].isnan().sum()) == D_SAE - 4
    assert ranking.explain(wanted)["trials"] == [
        {"dose": dose, "successes": 3, "degenerate": 0, "n": 3} for dose in (0.3, 0.6)
    ]
    assert plan_from_ranking(lm, sae, ranking).ids == (wanted,)
    torch.testing.assert_close(ranking.columns["fused"], fused.score)
    # Only candidates were tried for the output score, and they were the best before it.
    assert int((~fused.columns["output"].isnan()).sum()) == 6
    scripted(monkeypatch, lambda plan, text: "no")
    ranking = rank(lm, sae, TASK, dataclasses.replace(config, by="causal", shortlist=4))
    with pytest.raises(UserError, match="no latent of 4 on the shortlist makes more .* 0 of 3"):
        ranking.top(15)


@pytest.mark.parametrize("by", ["lens", "effect", "atp", "output", "fused", "corr", "auroc"])
@pytest.mark.parametrize("read", ["last", "reply"])
def test_every_score_ranks(by: str, read: str, lm: LanguageModel, sae: SAE) -> None:
    config = RankConfig(by=by, read=read, contents=3, all_replies=True, max_new_tokens=4)
    ranking = rank(lm, sae, TASK, config)
    assert ranking.score is ranking.columns[by]
    assert ("saif" in ranking.columns) == (read == "last")
    if by == "corr" and read == "reply":  # no reply of a random model passes
        assert not ranking.score.any()
        return
    ids = ranking.top(5)
    scores = [float(ranking.score[i]) for i in ids]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > (0.5 if by == "auroc" else 0)
    for column in ranking.columns.values():
        assert column.shape == (D_SAE,) and column.dtype == torch.float64


def test_filters_and_duplicates_leave_the_plan(lm: LanguageModel, sae: SAE) -> None:
    config = RankConfig(by="rate", contents=3)
    ranking = rank(lm, sae, TASK, config)
    best = ranking.top(D_SAE)
    assert len(best) >= 3
    twin = dataclasses.replace(sae, W_dec=sae.W_dec.clone())
    twin.W_dec[best[1]] = 2 * sae.W_dec[best[0]]
    found = rank(lm, twin, TASK, dataclasses.replace(config, drop=("duplicate",)))
    assert found.duplicate_of == {best[1]: best[0]}
    assert found.flags(best[1])["duplicate"] == f"nearly the direction of {best[0]}"
    assert found.top(2) == [best[0], best[2]]
    dense = found.filters["dense"]
    assert dense.tolist() == (found.control_rate > 0.2).tolist()
    dropped = rank(lm, sae, TASK, dataclasses.replace(config, drop=("dense",)))
    assert dropped.dropped()["dense"] == sum(bool(dense[i]) for i in best) > 0
    left = [i for i in best if not dense[i]]
    if left:
        assert dropped.top(D_SAE) == left
    strict = rank(lm, sae, TASK, dataclasses.replace(config, drop=("fdr",), max_fdr=1e-9))
    with pytest.raises(UserError, match="`drop` fdr leaves no latent of .* raise `max_fdr`"):
        strict.top(3)


def test_a_task_without_a_check_cannot_be_steered_for(lm: LanguageModel, sae: SAE) -> None:
    unchecked = dataclasses.replace(TASK, check_name=None, check_arguments=None)
    with pytest.raises(UsageError, match="`by` causal .* 'lists' has none"):
        rank(lm, sae, unchecked, RankConfig(by="causal"))


def test_answers_that_do_not_follow_give_no_gradient(lm: LanguageModel, sae: SAE) -> None:
    with pytest.raises(UserError, match="none of 3 answers to 'lists' follows it"):
        rank(lm, sae, TASK, RankConfig(by="effect", contents=3, max_new_tokens=4))
