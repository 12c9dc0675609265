"""The demo as a call, on a tiny model that follows no instruction."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import plain
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering import DemoSize, demo, load_plan
from saesteer.steering.finding.find import FindConfig
from saesteer.steering.finding.phases import ReadConfig
from saesteer.steering.finding.search import SearchConfig
from saesteer.steering.tasks.task import Task, load_task

SMALL = DemoSize(
    reply_contents=2,
    depths=(0.4, 0.7),
    harvest_tokens=1024,
    train_tokens=4096,
    latents_per_d_model=2,
    pages=2,
    page_tokens=200,
    find=FindConfig(
        budget_minutes=0.001,
        read=ReadConfig(contents=4, max_new_tokens=4, batch_size=12),
        search=SearchConfig(first=2, more=0, rows=12, finalists=1),
        dev=2,
        test=2,
        latents=4,
        when=True,
    ),
)


def easy(name: str) -> Task:
    """A random model follows nothing; a check that every reply passes lets the road go on."""
    task = load_task(name)
    return replace(
        task,
        contents={split: texts[:5] for split, texts in task.contents.items()},
        check_name="length",
        check_arguments={},
        max_new_tokens=4,
    )


def test_every_stage_leaves_its_artefacts(lm: LanguageModel, tmp_path: Path) -> None:
    tasks = [easy("french"), easy("question")]
    out, stages = tmp_path / "demo", []
    found = demo(
        out,
        tasks,
        model=lm,
        size=SMALL,
        progress=lambda stage, done, total, note: stages.append(stage),
    )
    written = json.loads((out / "demo.json").read_text())
    assert found["complete"] and json.loads(json.dumps(plain(found))) == written
    finding = [f"find {task.name}" for task in tasks]
    assert list(found["stages"]) == ["model", "harvest", "train", *finding, "latents"]
    harvested = found["stages"]["harvest"]
    assert harvested["tokens"] >= SMALL.harvest_tokens and harvested["layers"] == [1, 2]
    assert {"layer 1", "layer 2"} < set(found["stages"]["train"])
    for task in tasks:
        folder = out / f"plan-{task.name}"
        told = found["stages"][f"find {task.name}"]
        kept = json.loads((folder / "find.json").read_text())
        assert {name: kept[name] for name in told if name != "seconds"} == json.loads(
            json.dumps({name: value for name, value in told.items() if name != "seconds"})
        )
        assert {"unsteered", "prompted", "steered", "steered_latents"} <= set(told["arms"])
        assert load_plan(folder).parts and load_plan(folder / "latents").parts
        assert (folder / "find.html").is_file()
    page = (out / found["page"]).read_text()
    for words in (
        'id="french"',
        'id="question"',
        "Unrelated questions:",
        tasks[0].contents["test"][0],
    ):
        assert words in page
    linked = set(re.findall(r'href="(latents/layer-\d/latents/\d+\.html)"', page))
    made = {path.relative_to(out).as_posix() for path in out.glob("latents/*/latents/*.html")}
    assert linked and linked == made
    assert "harvest" in stages and any(stage.startswith("search, ") for stage in stages)
    with pytest.raises(UsageError, match="not empty"):
        demo(out, tasks, model=lm, size=SMALL)
