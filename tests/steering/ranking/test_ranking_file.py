"""What a ranking leaves on disk, without the command line."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from saesteer.checkpoints.files import plain
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering import (
    RankConfig,
    load_plan,
    plan_from_ranking,
    rank,
    ranking_document,
    save_ranking,
)

from ..ranking_by_hand import CONTENTS, D_SAE, TASK, random_sae


def test_a_ranking_is_written_and_read_back(lm: LanguageModel, tmp_path: Path) -> None:
    sae = random_sae()
    ranking = rank(lm, sae, TASK, RankConfig(by="rate", read="span", contents=CONTENTS, shuffles=2))
    plan = plan_from_ranking(lm, sae, ranking, top=2)
    document = save_ranking(tmp_path / "plan", lm, sae, ranking, plan)
    written = json.loads((tmp_path / "plan" / "ranking.json").read_text())
    assert written == json.loads(json.dumps(plain(document)))
    assert document["plan"] == tmp_path / "plan" / "plan.yaml"
    assert all(row.pop("page") is None for row in document["latents"])  # there are none
    assert {**document, "plan": None} == ranking_document(lm, sae, ranking, plan)
    assert [row["id"] for row in written["latents"]] == list(plan.ids) == list(ranking.top(2))
    assert load_plan(tmp_path / "plan").ids == plan.ids
    scores = load_file(tmp_path / "plan" / "scores.safetensors")
    assert {"rate", "auroc", "p", "q", "mu", "template_rate"} <= set(scores)
    assert all(column.shape == (D_SAE,) for column in scores.values())
    assert torch.equal(scores["rate"], ranking.score)


def test_what_is_explained(lm: LanguageModel) -> None:
    sae = random_sae()
    ranking = rank(lm, sae, TASK, RankConfig(by="rate", read="span", contents=CONTENTS, shuffles=0))
    plan = plan_from_ranking(lm, sae, ranking, top=2)
    assert "explain" not in ranking_document(lm, sae, ranking, plan)
    found = ranking_document(lm, sae, ranking, plan, explain=())["explain"]
    assert [row["id"] for row in found] == list(plan.ids)
    other = next(i for i in range(D_SAE) if i not in plan.ids)
    (row,) = ranking_document(lm, sae, ranking, plan, explain=[other])["explain"]
    assert row["id"] == other and row["lens"]
