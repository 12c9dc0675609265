"""Queues, deadlines, cancellation and failures: what one request does to the others."""

import threading
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.evaluation.damage import NeutralProbe, Question
from saesteer.steering.hooking.generation import generate_steered
from saesteer.steering.hooking.tracking.finite import NotFiniteError
from saesteer.steering.serving.engine import BusyError, ClosedError
from saesteer.steering.serving.generation import DeadlineError

from ..small_plans import small_plan
from .engine_help import Answers, ask, generation, running

pytestmark = pytest.mark.usefixtures("endless")

LONG = 900


class Clock:
    """Seconds that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def held(engine: Any) -> threading.Event:
    """Hold the engine between two passes until the event is set."""
    go, reached = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        assert go.wait(60)

    engine.call(wait)
    assert reached.wait(60)
    return go


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(lm: LanguageModel) -> None:
    with running(lm, settings={"max_batch": 1, "queue": 2}) as engine:
        go = held(engine)
        asked = [ask(engine, generation(lm, "x", max_new_tokens=2)) for _ in range(3)]
        with pytest.raises(BusyError):
            ask(engine, generation(lm, "x", max_new_tokens=2))
        assert engine.waiting == 3
        go.set()
        for answers in asked:
            assert len(answers.wait().facts().token_ids) == 2
        assert len(ask(engine, generation(lm, "x", max_new_tokens=2)).wait().facts().token_ids) == 2


def test_a_late_request_fails_and_the_others_go_on(lm: LanguageModel) -> None:
    clock = Clock()
    with running(lm, clock=clock, settings={"max_batch": 2}) as engine:
        go = held(engine)
        late = ask(engine, generation(lm, "x", max_new_tokens=LONG, deadline=5.0))
        good = ask(engine, generation(lm, "x", max_new_tokens=30))
        waiting = ask(engine, generation(lm, "x", max_new_tokens=2, deadline=5.0))
        go.set()
        late.first()
        go = held(engine)
        clock.now = 6.0
        go.set()
        for answers in (late, waiting):
            with pytest.raises(DeadlineError):
                answers.wait()
        assert len(good.wait().facts().token_ids) == 30


def test_a_cancelled_request_leaves_and_says_nothing_more(lm: LanguageModel) -> None:
    with running(lm) as engine:
        gone, other = Answers(), ask(engine, generation(lm, "x", max_new_tokens=60))
        ticket = engine.submit(generation(lm, "Rain", max_new_tokens=LONG), gone.events.put)
        gone.first()
        go = held(engine)
        engine.cancel(ticket)
        told = gone.events.qsize()
        go.set()
        assert len(other.wait().facts().token_ids) == 60
        assert gone.events.qsize() == told
    assert engine.running == 0


def test_rows_wait_until_the_caches_have_room(lm: LanguageModel) -> None:
    """Three rows of 40 tokens and some fit into 100 only one after the other."""
    most = 0

    class Watching:
        def pass_done(self, rows: int, tokens: int, seconds: float, prompts: bool) -> None:
            nonlocal most
            most = max(most, engine.running)

        def request_begun(self, waited: float) -> None: ...

        def request_ended(self, how: str) -> None: ...

    with running(lm, settings={"cache_tokens": 100}) as engine:
        engine._observer = Watching()  # type: ignore[assignment]
        asked = [ask(engine, generation(lm, "Rain", max_new_tokens=30)) for _ in range(3)]
        for answers in asked:
            assert len(answers.wait().facts().token_ids) == 30
    assert most == 1


def test_a_row_that_fails_takes_no_other_with_it(lm: LanguageModel) -> None:
    plan = small_plan(lm, [3], scale=0.4)
    wanted = generate_steered(lm, ["Rain"], plan, max_new_tokens=12)[0].token_ids
    with running(lm) as engine:
        go = held(engine)
        huge = ask(
            engine, generation(lm, "x", plans=[plan.with_changes(scale=3e38)], max_new_tokens=5)
        )
        nowhere = plan.with_changes(scope="span:500-600")
        outside = ask(engine, generation(lm, "x", plans=[nowhere], max_new_tokens=5))
        good = ask(engine, generation(lm, "Rain", plans=[plan], max_new_tokens=12))
        go.set()
        with pytest.raises(NotFiniteError, match="lower `scale`"):
            huge.wait()
        with pytest.raises(UserError, match="begins after the end of a prompt"):
            outside.wait()
        assert list(good.wait().facts().token_ids) == wanted


def test_an_error_of_a_pass_ends_its_requests_and_not_the_engine(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(lm) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(lm.model, "forward", lambda **given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ask(engine, generation(lm, "x")).wait()
        assert len(ask(engine, generation(lm, "x")).wait().facts().token_ids) == 16


def test_stopping_gives_up_what_is_left_and_leaves_the_model_alone(lm: LanguageModel) -> None:
    plan = small_plan(lm, [3], scale=0.4)
    with running(lm) as engine:
        asked = ask(engine, generation(lm, "x", plans=[plan], max_new_tokens=LONG))
        asked.first()
        engine.stop(0.0)
        with pytest.raises(ClosedError):
            asked.wait()
        with pytest.raises(ClosedError):
            ask(engine, generation(lm, "x"))
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert generate_steered(lm, ["x"], plan, max_new_tokens=2)  # nobody steers it any more


def test_measuring_waits_for_a_border_and_rows_go_on_after_it(lm: LanguageModel) -> None:
    plan = small_plan(lm, [3], scale=0.4)
    questions = [Question("What is the capital of France?", ("Paris",))]
    wanted = NeutralProbe(lm, questions, max_new_tokens=4).measure(plan).kl
    alone = generate_steered(lm, ["Rain"], plan, max_new_tokens=30)[0].token_ids
    with running(lm) as engine:
        row = ask(engine, generation(lm, "Rain", plans=[plan], max_new_tokens=30))
        row.first()
        probe = NeutralProbe(lm, questions, max_new_tokens=4)
        found = engine.call(lambda: probe.measure(plan)).result(60)
        assert list(row.wait().facts().token_ids) == alone
    assert found.kl == pytest.approx(wanted, rel=1e-4)
    assert torch.is_grad_enabled()


def test_a_request_of_several_answers_ends_with_the_last(lm: LanguageModel) -> None:
    request = generation(lm, "Rain", n=3, max_new_tokens=4)
    with running(lm, settings={"max_batch": 2}) as engine:
        found = ask(engine, request).wait(3)
    assert {choice: len(found.facts(choice).token_ids) for choice in range(3)} == {0: 4, 1: 4, 2: 4}
