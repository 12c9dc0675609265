"""Settings, their plans, and the parameters that stand for them."""

import pytest
import torch
from torch import Tensor

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.finding.phases import Phases
from saesteer.steering.finding.search import parameters_of, setting_of
from saesteer.steering.finding.setting import SCHEDULES, Proposals, Setting
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.schedules import parse_schedule

from ..whole_row import CLOSE, plain
from .small_task import TASK


def made_up(lm: LanguageModel, scope: str = "tail", places: int = 4) -> Phases:
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    n, d = lm.n_layers, lm.d_model
    tail, replies = noise(n, places, d), noise(n, d)
    return Phases(scope, tail, replies, torch.ones(n), noise(n, 3, d), (3, 3))


BOTH = Setting((0, 1, 3), 1.5, (1, 2), 0.4, schedule="opening")


def test_a_plan_does_what_the_setting_says(lm: LanguageModel) -> None:
    phases = made_up(lm)
    plan = Proposals(lm, TASK, phases).plan(BOTH)
    kinds = [(part.layer, part.method, part.scope) for part in plan.parts]
    assert kinds == [
        (0, "set-to", "tail"), (1, "set-to", "tail"), (3, "set-to", "tail"),
        (1, "add", "replies"), (2, "add", "replies"),
    ]  # fmt: skip
    close = {"rtol": 1e-6, "atol": 1e-6}
    for part in plan.parts[:3]:
        wanted = 1.5 * phases.tail[part.layer].double()
        torch.testing.assert_close(part.added_vectors(), wanted, **close)
    for part in plan.parts[3:]:
        wanted = 0.4 * phases.replies[part.layer].double()
        torch.testing.assert_close(part.added_vector(), wanted, **close)
        assert part.schedule == "steps:0=1.5,8=1"


def test_the_tail_is_put_to_its_place_in_the_model(lm: LanguageModel) -> None:
    phases = made_up(lm)
    plan = Proposals(lm, TASK, phases).plan(Setting((1, 3), 2.0, (), 0.0))
    prompt = encode_prompt(lm, "yield it", chat=True)
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad(), steer(lm, plan, prompts=[prompt]):
        found = lm.model(ids, output_hidden_states=True).hidden_states[2][0]
    wanted = plain(lm, 1, prompt.token_ids)
    wanted[-4:] += 2.0 * phases.tail[1]
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize(
    ("setting", "phases"),
    [
        (BOTH, "both"),
        (Setting((0, 1), 1.0, (), 0.0, "add"), "tail"),
        (Setting((), 0.0, (2, 3), 0.2), "replies"),
    ],
)
def test_each_phase_may_be_left_out(setting: Setting, phases: str, lm: LanguageModel) -> None:
    assert setting.phases == setting.row()["phases"] == phases
    plan = Proposals(lm, TASK, made_up(lm, "last-prompt", 1)).plan(setting)
    scopes = {part.scope for part in plan.parts}
    expected = {"both": {"last-prompt", "replies"}, "tail": {"last-prompt"}, "replies": {"replies"}}
    assert scopes == expected[phases]


def test_every_schedule_can_be_parsed() -> None:
    assert all(parse_schedule(text) for text in SCHEDULES.values())


def test_parameters_come_back_as_the_setting() -> None:
    optuna = pytest.importorskip("optuna")
    n = 12
    settings = [
        Setting(tuple(range(n)), 1.25, (4, 5, 6), 0.2),
        Setting(tuple(range(3, 10)), 0.75, (8,), 0.5, "add", "close"),
        Setting(tuple(range(n)), 2.0, (), 0.0),
        Setting((), 0.0, (2, 3), 0.4, schedule="body"),
    ]
    for setting in settings:
        again = setting_of(optuna.trial.FixedTrial(parameters_of(setting, n)), n)
        assert again.reply_dose == pytest.approx(setting.reply_dose)
        assert again == Setting(**{**vars(setting), "reply_dose": again.reply_dose})
