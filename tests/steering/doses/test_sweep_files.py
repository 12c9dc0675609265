"""A sweep from SAEs to a folder, without the command line."""

import json
from dataclasses import replace
from pathlib import Path

from saesteer.checkpoints.files import plain
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering import (
    Decoding,
    Grid,
    load_plan,
    ranked_plans,
    save_sweep,
    sweep,
    sweep_document,
)

from ..ranking_by_hand import D_SAE, TASK, random_sae

QUICK = replace(TASK, max_new_tokens=3, contents={**TASK.contents, "train": ("yield", "a comma")})


def test_saes_are_ranked_in_every_way(lm: LanguageModel) -> None:
    sae = random_sae()
    one = ranked_plans(lm, [sae], QUICK, by=["rate"], read=["span"], top=2)
    assert list(one) == ["layer 1 span rate"]
    (plan,) = one.values()
    assert (len(plan.latents), plan.metrics["read"], plan.metrics["by"]) == (2, "span", "rate")
    ways = ranked_plans(lm, [sae], QUICK, by=["rate", "meandiff"], position=["post", "pre"], top=1)
    assert list(ways) == [
        "layer 1 post rate",
        "layer 1 post meandiff",
        "layer 1 pre rate",
        "layer 1 pre meandiff",
    ]
    twins = [replace(sae, source=f"runs/{name}") for name in ("a", "b")]
    assert list(ranked_plans(lm, twins, QUICK, by=["rate"], top=D_SAE)) == ["a rate", "b rate"]


def test_a_sweep_is_written_with_its_plan(lm: LanguageModel, tmp_path: Path) -> None:
    plans = ranked_plans(lm, [random_sae()], QUICK, by=["rate", "meandiff"], top=1)
    greedy = Decoding(temperature=0.0)
    found = sweep(lm, QUICK, plans, Grid(k=(1,), scale=(1.0,)), rounds=[(1, 1)], decoding=greedy)
    (tmp_path / "ranked").mkdir()
    (tmp_path / "ranked" / "ranking.json").write_text('{"stability": {}}')
    out = tmp_path / "sweep"
    document = save_sweep(out, lm, found, ranked=tmp_path / "ranked")
    assert document == sweep_document(lm, found)
    assert json.loads((out / "sweep.json").read_text()) == json.loads(json.dumps(plain(document)))
    assert document["model"] == {"name": lm.name, "hash": lm.fingerprint}
    assert {row["plan"] for row in document["trials"]} == set(plans)
    assert load_plan(out).ids == found.chosen.plan.ids
    assert (out / "sweep.svg").read_text().startswith("<svg")
    assert json.loads((out / "ranking.json").read_text()) == {"stability": {}}
