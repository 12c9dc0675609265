"""The demo as a call, on a tiny model that follows no instruction."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import plain
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering import DemoSize, demo, load_plan
from saesteer.steering.tasks.task import load_task

SMALL = DemoSize(
    reply_tasks=("json",),
    reply_contents=2,
    plain=1,
    harvest_tokens=1024,
    train_tokens=4096,
    rank_contents=3,
    latents=(1, 2),
    scales=(1.0,),
    scopes=("generation",),
    rounds=((2, 1),),
    latents_per_d_model=2,
)


def test_every_stage_leaves_its_artefacts(lm: LanguageModel, tmp_path: Path) -> None:
    french = load_task("french")
    # A random model writes no French; a check that every reply passes lets the road go on.
    task = replace(
        french,
        contents={split: texts[:4] for split, texts in french.contents.items()},
        check_name="length",
        check_arguments={},
        max_new_tokens=6,
    )
    out, stages = tmp_path / "demo", []
    found = demo(
        out,
        task,
        model=lm,
        size=SMALL,
        progress=lambda stage, done, total, note: stages.append(stage),
    )
    written = json.loads((out / "demo.json").read_text())
    assert found["complete"] and json.loads(json.dumps(plain(found))) == written
    assert list(found["stages"]) == [
        "model",
        "harvest",
        "train",
        "rank, layer 2",
        "rank, layer 3",
        "choose dose, layer 2",
        "choose dose, layer 3",
        "evaluate",
    ]
    assert found["stages"]["harvest"]["tokens"] >= SMALL.harvest_tokens
    assert {"layer 2", "layer 3"} < set(found["stages"]["train"])
    assert len(found["stages"]["choose dose, layer 2"]["trials"]) == 2
    for layer in (2, 3):
        chosen = found["stages"][f"choose dose, layer {layer}"]["chosen"]
        plan = load_plan(out / f"plan-layer-{layer}")
        assert (plan.layer, len(plan.latents), plan.scale) == (layer, chosen["k"], chosen["scale"])
    evaluated = found["stages"]["evaluate"]
    names = [arm["name"] for arm in evaluated["sampled"]]
    assert names == ["unsteered", "prompted", "steered, layer 2", "paper's setting, layer 3"]
    assert [arm["name"] for arm in evaluated["greedy"]] == names
    assert {arm["n"] for arm in evaluated["sampled"]} == {4}
    assert "harvest" in stages
    with pytest.raises(UsageError, match="not empty"):
        demo(out, task, model=lm, size=SMALL)
