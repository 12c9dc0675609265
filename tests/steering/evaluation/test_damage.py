"""Damage on neutral questions, against figures worked out row by row without padding or cache."""

import dataclasses
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.evaluation import damage
from saesteer.steering.evaluation.damage import NeutralProbe, Question, neutral_questions
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.plan import ModelIdentity, Plan, PlannedLatent, SAEIdentity

QUESTIONS = [
    Question("What is it?", ("it",)),
    Question("Where did the heron stand for so long?", ("here",)),
    Question("Who?", ("me",)),
]


def plan_for(lm: LanguageModel, dose: float, scope: str = "generation") -> Plan:
    return Plan(
        model=ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model),
        sae=SAEIdentity("an-sae", "ab"),
        site="resid_post",
        layer=1,
        latents=(PlannedLatent(id=3, value=dose),),
        directions=torch.randn(1, lm.d_model, generator=torch.Generator().manual_seed(0)),
        scope=scope,
    )


def test_built_in_questions_are_short_facts() -> None:
    questions = neutral_questions()
    assert len(questions) >= 30
    assert len({question.prompt for question in questions}) == len(questions)
    for question in questions:
        assert question.prompt.endswith("?") and question.answers
        assert not question.is_right(question.prompt), question  # an echo is no answer


def test_answers_are_found_as_whole_words() -> None:
    question = Question("?", ("4", "four"))
    assert question.is_right("It is Four.") and question.is_right("4")
    assert not question.is_right("It is 14, or fourteen.")


def test_figures_are_those_of_single_rows(lm: LanguageModel) -> None:
    plan = plan_for(lm, 1.5)
    probe = NeutralProbe(lm, QUESTIONS, max_new_tokens=5)
    found = probe.measure(plan)
    columns: list[list[float]] = [[], [], [], []]
    for question, reply in zip(QUESTIONS, probe._answer(), strict=True):
        prompt = encode_prompt(lm, question.prompt, chat=True)
        ids = torch.tensor([[*prompt.token_ids, *reply]])
        where = slice(len(prompt) - 1, -1)
        with torch.inference_mode():
            p = torch.log_softmax(lm.model(input_ids=ids).logits[0, where].float(), -1)
            with steer(lm, plan, prompt_lengths=[len(prompt)]):
                q = torch.log_softmax(lm.model(input_ids=ids).logits[0, where].float(), -1)
        said = torch.tensor(reply)[:, None]
        columns[0].append(float((p.exp() * (p - q)).sum(1).mean()))
        columns[1].append(float((q.exp() * (q - p)).sum(1).mean()))
        columns[2].append(float((p.argmax(1) == q.argmax(1)).float().mean()))
        columns[3].append(float((p.gather(1, said) - q.gather(1, said)).mean()))
    wanted = [sum(column) / 3 for column in columns]
    # float32, other shapes of the same products
    assert [found.kl, found.kl_reverse, found.top1_agreement, found.delta_ce] == pytest.approx(
        wanted, rel=1e-3, abs=1e-5
    )
    assert found.kl > 0.001 and (found.relative_dose or 0) > 0.05


def test_measuring_again_gives_the_same_with_and_without_what_was_kept(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = NeutralProbe(lm, QUESTIONS, max_new_tokens=4)
    first = probe.measure(plan_for(lm, 1.0))
    other = probe.measure(plan_for(lm, 3.0))
    assert probe._plain and probe.measure(plan_for(lm, 1.0)) == first
    monkeypatch.setattr(damage, "_NUMBERS_KEPT", 0)
    fresh = NeutralProbe(lm, QUESTIONS, max_new_tokens=4)
    assert fresh.measure(plan_for(lm, 3.0)) == other and not fresh._plain


def test_a_dose_beyond_every_norm_is_noticed(lm: LanguageModel) -> None:
    probe = NeutralProbe(lm, QUESTIONS, max_new_tokens=4)
    gentle, huge = probe.measure(plan_for(lm, 0.01)), probe.measure(plan_for(lm, 100.0))
    assert not gentle.leaves_norm_range and gentle.norm_ratio == pytest.approx(1, abs=0.05)
    assert huge.leaves_norm_range and (huge.norm_ratio or 0) > 3
    assert huge.outside_norms == 1.0


def test_sinks_do_not_make_any_length_usual(lm: LanguageModel) -> None:
    """Every third question is one token, a sink: among so many it would be in the middle 98 %."""
    lm.tokenizer.chat_template = None
    (sink,) = lm.tokenizer("H")["input_ids"]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[sink] *= 300
    questions = [Question(text, ("it",)) for text in ("H", "What is it", "Where is it")]
    probe = NeutralProbe(lm, questions * 4, max_new_tokens=2)
    assert (probe.measure(plan_for(lm, 20.0)).outside_norms or 0) == 1.0


def test_flips_are_counted_against_the_unsteered_answers(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = NeutralProbe(lm, QUESTIONS, max_new_tokens=3)
    texts = iter((["it", "there", "me"], ["no", "here", "me"]))
    real = probe._generate

    def scripted() -> Any:
        said = next(texts)
        return [dataclasses.replace(r, text=t) for r, t in zip(real(), said, strict=True)]

    monkeypatch.setattr(probe, "_generate", scripted)
    row = probe.measure(plan_for(lm, 1.0), flips=True).row()
    assert (row["right_before"], row["right_to_wrong"], row["wrong_to_right"]) == (2, 1, 1)
    assert row["side_effect_ratio"] == 0.5 and row["questions"] == 3


def test_a_scope_that_questions_do_not_have_is_an_error(lm: LanguageModel) -> None:
    probe = NeutralProbe(lm, QUESTIONS, max_new_tokens=3)
    with pytest.raises(UserError):
        probe.measure(plan_for(lm, 1.0, scope="after-instruction"))
