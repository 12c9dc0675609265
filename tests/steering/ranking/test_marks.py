"""Which rankings and plans hold a latent."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering import plan_from_latents, planned_latents, save_plan, task_marks


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> LanguageModel:
    return wrap_model(*tiny_lm("llama"), "tiny")


def an_sae(lm: LanguageModel, sha256: str) -> SAE:
    rows = torch.randn(9, lm.d_model, generator=torch.Generator().manual_seed(0))
    spec = SAESpec(architecture="standard", d_model=lm.d_model, d_sae=9,
                   hook_name="blocks.1.hook_resid_post", model_name=lm.name)  # fmt: skip
    zero = torch.zeros(9)
    return SAE(spec, rows.T, zero, rows, torch.zeros(lm.d_model), source="one", sha256=sha256)


def test_a_plan_and_a_ranking_count(lm: LanguageModel, tmp_path: Path) -> None:
    sae = an_sae(lm, "a" * 64)
    plan = plan_from_latents(lm, sae, None, {4: 1.0, 2: 0.5})
    save_plan(plan, tmp_path / "by-hand")
    ranked = tmp_path / "ranked"
    ranked.mkdir()
    document = {
        "task": {"name": "french"}, "sae": {"sha256": "a" * 64, "source": "one"}, "by": "rate",
        "latents": [{"rank": 1, "id": 2, "score": 0.75}, {"rank": 2, "id": 8, "score": None}],
    }  # fmt: skip
    (ranked / "ranking.json").write_text(json.dumps(document))
    found = task_marks([tmp_path / "by-hand", ranked], sae)
    assert {latent: [(m.task, m.rank, m.score, m.by) for m in marks]
            for latent, marks in found.items()} == {
        4: [("by-hand", 1, None, "")],
        2: [("by-hand", 2, None, ""), ("french", 1, 0.75, "rate")],
        8: [("french", 2, None, "rate")],
    }  # fmt: skip
    assert planned_latents(plan, sae) == (4, 2)


def test_what_is_of_another_sae_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    sae = an_sae(lm, "a" * 64)
    other = replace(sae, sha256="b" * 64, source="two")
    plan = plan_from_latents(lm, other, None, {4: 1.0})
    with pytest.raises(UserError, match="holds no latent of `sae` one: it was made with two"):
        planned_latents(plan, sae)
    save_plan(plan, tmp_path)
    with pytest.raises(UserError, match="holds no latent"):
        task_marks([tmp_path], sae)
    with pytest.raises(UserError, match="`plan` .*none"):
        task_marks([tmp_path / "none"], sae)
