"""`saesteer demo` on a tiny model."""

import json
from pathlib import Path

import pytest

from saesteer.steering.demonstration import pipeline
from saesteer.steering.finding.find import FindConfig
from saesteer.steering.finding.phases import ReadConfig
from saesteer.steering.finding.search import SearchConfig

from .conftest import OnTerminal, plain_text

SMALL = pipeline.DemoSize(
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
        search=SearchConfig(first=1, more=0, rows=12, finalists=1),
        dev=1,
        test=1,
        latents=4,
        when=True,
    ),
)


def test_each_stage_is_announced_and_told(
    on_terminal: OnTerminal,
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    task: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(pipeline, "QUICK", SMALL)
    out = tmp_path / "demo"
    words = ("demo", "--quick", "--model", model, "--task", task, "-o", out)
    status, seen = on_terminal(*words)
    assert status == 0, seen
    told = plain_text(seen)
    assert "\x1b[1m1. model\x1b[0m" in seen  # headings are bold, and no code is printed
    document = json.loads((out / "demo.json").read_text())
    stages = document["stages"]
    for place, name in enumerate(stages, 1):
        assert f"\n{place}. {name}  " in told
    assert told.count("   took ") == len(stages) == 5
    for words_of in ("dead latents", "unsteered", "prompted", "steered, in latents", "setting:"):
        assert words_of in told
    assert "Success and damage" in told and "unrelated questions: " in told
    (plan,) = out.glob("plan-*")
    following, page = told.splitlines()[-2:]
    assert f"--plan {plan} -p" in following
    assert page == f"page: {out / 'demo.html'}" and (out / "demo.html").is_file()
    status, seen = on_terminal(*words)
    assert status == 2 and "--out" in seen
