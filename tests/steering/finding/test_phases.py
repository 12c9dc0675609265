"""What is read at tails and replies, against one row at a time; replies are sampled once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.finding import phases as module
from saesteer.steering.finding.phases import ReadConfig, random_phases, read_phases, sampled
from saesteer.steering.tasks.task import compose

from .small_task import TASK

CONFIG = ReadConfig(contents=3, wordings=2, reply_wordings=1, max_new_tokens=4, batch_size=4)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAESTEER_CACHE", str(tmp_path))
    return tmp_path


def states(lm: LanguageModel, tokens: list[int]) -> Tensor:
    """After every block `[layers, tokens, d_model]`, of one row by itself."""
    found = []
    for layer in range(lm.n_layers):
        seen: list[Tensor] = []

        def keep(h: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(h[0].double())

        with torch.no_grad(), hooked(resolve_site(lm, layer), keep):
            lm.model(input_ids=torch.tensor([tokens]), use_cache=False)
        found.append(seen[0])
    return torch.stack(found)


@pytest.mark.parametrize("chat", [True, False])
def test_both_phases_against_one_row_at_a_time(chat: bool, lm_of: Any) -> None:
    lm = lm_of(chat=chat, endless=True)
    found = read_phases(lm, TASK, CONFIG)
    contents = list(TASK.contents["train"])[:3]

    def prompts(wording: str | None) -> list[Any]:
        texts = contents if wording is None else [compose(text, wording) for text in contents]
        return [encode_prompt(lm, text, chat=chat) for text in texts]

    wordings = [variant.text for variant in TASK.select_variants[:2]]
    answered, plain = prompts(wordings[0]), prompts(None)
    replies = sampled(lm, [*answered, *plain], CONFIG)
    T = len(plain[0]) - plain[0].user_span[1] if chat else 1
    assert found.scope == ("tail" if chat else "last-prompt") and found.tail.shape[1] == T
    tails = [
        torch.stack([states(lm, p.token_ids)[:, -T:] for p in group]).mean(dim=0)
        for group in ([*answered, *prompts(wordings[1])], plain)
    ]
    torch.testing.assert_close(found.tail.double(), tails[0] - tails[1], rtol=1e-4, atol=1e-5)
    said = []
    for group, part in ((answered, replies[:3]), (plain, replies[3:])):
        rows = [
            states(lm, [*p.token_ids, *r.token_ids])[:, len(p) :]
            for p, r in zip(group, part, strict=True)
        ]
        said.append(torch.cat(rows, dim=1).mean(dim=1))
    torch.testing.assert_close(found.replies.double(), said[0] - said[1], rtol=1e-4, atol=1e-5)
    last = torch.stack([states(lm, p.token_ids)[:, -1] for p in plain], dim=1)
    torch.testing.assert_close(found.last.double(), last, rtol=1e-4, atol=1e-5)
    assert found.replies_used == (3, 3)


def test_replies_are_sampled_once_and_a_cut_run_goes_on(
    lm: LanguageModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [encode_prompt(lm, text, chat=True) for text in TASK.contents["train"]]
    calls: list[int] = []
    original = lm.model.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(lm.model, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        sampled(lm, prompts, CONFIG)
    made = sampled(lm, prompts, CONFIG)
    assert calls == [4, 4, 4]  # the first batch was kept
    assert sampled(lm, prompts, CONFIG) == made and len(calls) == 3
    assert len(list((cache / "replies").iterdir())) == 1


def test_a_task_without_train_contents_is_an_error(lm: LanguageModel) -> None:
    from dataclasses import replace

    task = replace(TASK, contents={"dev": TASK.contents["dev"]})
    with pytest.raises(UserError, match="'lists' has no train contents to read"):
        read_phases(lm, task, CONFIG)


def test_random_phases_have_the_same_lengths(lm: LanguageModel) -> None:
    found = read_phases(lm, TASK, CONFIG)
    noise = random_phases(found)
    for ours, theirs in ((noise.tail, found.tail), (noise.replies, found.replies)):
        torch.testing.assert_close(ours.norm(dim=-1), theirs.norm(dim=-1))
        assert not torch.allclose(ours, theirs)


def test_a_long_tail_is_cut(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TAIL", 3)
    assert read_phases(lm, TASK, CONFIG).tail.shape[1] == 3
