"""`saesteer demo` on a tiny model."""

import json
from pathlib import Path

import pytest

from saesteer.steering.demonstration import pipeline

from .conftest import OnTerminal, plain_text

SMALL = pipeline.DemoSize(
    reply_tasks=(),
    reply_contents=2,
    plain=1,
    harvest_tokens=1024,
    train_tokens=4096,
    rank_contents=3,
    latents=(1,),
    scales=(1.0,),
    scopes=("generation",),
    rounds=((1, 1),),
    latents_per_d_model=2,
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
    stages = json.loads((out / "demo.json").read_text())["stages"]
    for place, name in enumerate(stages, 1):
        assert f"\n{place}. {name}  " in told
    assert told.count("   took ") == len(stages) == 8
    for header in ("lens tokens", "dead latents", "||delta||/||h||", "Side by side", "Rates"):
        assert header in told
    assert f"chosen: k 1, scale 1, scope generation; written to {out / 'plan-layer-2'}" in told
    assert "greedy, the same doses" in told
    assert f"--plan {out / 'plan-layer-2'} -p" in told.splitlines()[-1]
    status, seen = on_terminal(*words)
    assert status == 2 and "--out" in seen
