"""Conditions on the prompt: thresholds, classifiers, latents, and what they leave alone."""

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.finding.gating import _classifier, _threshold, find_gate, last_states
from saesteer.steering.finding.phases import Phases
from saesteer.steering.finding.setting import Proposals, Setting
from saesteer.steering.hooking.generation import generate_steered

from ..whole_row import make_sae, plain
from .small_task import CONTENTS, TASK

OTHERS = [f"yield {i}?" for i in range(12)]


def test_states_are_those_of_the_last_token(lm: LanguageModel) -> None:
    found = last_states(lm, CONTENTS[:3], [1, 3])
    for place, layer in enumerate((1, 3)):
        for i, text in enumerate(CONTENTS[:3]):
            wanted = plain(lm, layer, encode_prompt(lm, text, chat=True).token_ids)[-1]
            torch.testing.assert_close(found[place, i], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs", "threshold"),
    [
        ([3.0, 4.0], [0.0, 1.0], 2.0),  # apart: the middle of the gap
        ([1.0, 4.0, 5.0, 6.0], [0.0, 0.5, 2.0], 0.75),  # one of theirs is let in: fewest wrong
    ],
)
def test_a_threshold_divides_where_fewest_are_wrong(
    ours: list[float], theirs: list[float], threshold: float
) -> None:
    found = _threshold(torch.tensor(ours).double(), torch.tensor(theirs).double())
    wrong = sum(x <= found for x in ours) / len(ours) + sum(x > found for x in theirs) / len(theirs)
    best = sum(x <= threshold for x in ours) / len(ours)
    best += sum(x > threshold for x in theirs) / len(theirs)
    assert wrong == pytest.approx(min(best, wrong))
    if min(ours) > max(theirs):
        assert found == pytest.approx(threshold)


def test_a_classifier_of_kinds_that_differ_in_one_direction() -> None:
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 40, 6, generator=draw)
    kinds[0, :, 2] += 8
    weight = _classifier(kinds[0], kinds[1])
    assert int(weight.abs().argmax()) == 2 and float(weight[2]) > 0.9
    with pytest.raises(UserError, match="look the same to the model"):
        _classifier(kinds[0], kinds[0])


@pytest.mark.usefixtures("endless")
def test_a_gate_keeps_contents_and_stops_others(lm: LanguageModel) -> None:
    sae = make_sae(lm, layer=2)
    gate = find_gate(lm, CONTENTS, OTHERS, saes=[sae])
    assert gate.balance > 0.8
    draw = torch.Generator().manual_seed(0)
    shape = lm.n_layers, 3, lm.d_model
    tail = torch.randn(shape, generator=draw) * 5
    phases = Phases("tail", tail, tail[:, 0], torch.ones(4), tail, (1, 1))
    plan = Proposals(lm, TASK, phases).plan(Setting((1, 2), 2.0, (2,), 1.0), gate.condition)
    answers = generate_steered(lm, [*CONTENTS, *OTHERS], plan, max_new_tokens=3, baseline=True)
    held = [bool(answer.tokens_touched) for answer in answers]
    assert sum(held[: len(CONTENTS)]) / len(CONTENTS) > 0.7
    assert sum(held[len(CONTENTS) :]) / len(OTHERS) < 0.3
    for answer, touched in zip(answers, held, strict=True):
        assert touched or answer.completion == answer.baseline


def test_too_few_texts_are_an_error(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="`when` needs at least 4 contents and 4 other prompts"):
        find_gate(lm, CONTENTS[:3], OTHERS)
