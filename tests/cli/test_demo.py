"""`saesteer demo` on a tiny model."""

import json
from pathlib import Path

import pytest

from saesteer.cli.__main__ import main
from saesteer.steering.demonstration import pipeline

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
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    task: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(pipeline, "QUICK", SMALL)
    out = tmp_path / "demo"
    words = ["demo", "--quick", "--model", str(model), "--task", str(task), "-o", str(out), "-q"]
    assert main(words) == 0
    told = capfd.readouterr().out
    stages = json.loads((out / "demo.json").read_text())["stages"]
    for place, name in enumerate(stages, 1):
        assert f"\n{place}. {name}  " in told
    assert told.count("   took ") == len(stages) == 8
    for header in ("lens tokens", "dead latents", "||delta||/||h||", "Side by side", "Rates"):
        assert header in told
    assert f"chosen: k 1, scale 1, scope generation; written to {out / 'plan-layer-2'}" in told
    assert "greedy, the same doses" in told
    assert f"--plan {out / 'plan-layer-2'} -p" in told.splitlines()[-1]
    assert main(words) == 2
    assert "--out" in capfd.readouterr().err
