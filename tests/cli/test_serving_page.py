"""The commands and programs of docs/serving.md, run."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saesteer.sae.model.language_model import wrap_model
from saesteer.steering.plans.from_sae import plan_from_latents
from saesteer.steering.plans.plan_file import save_plan

from .conftest import Cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.usefixtures("server_ends")
def test_the_command_line(
    cli: Cli, plan: Path, sae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/french-dose").symlink_to(plan)
    Path("runs/sae").symlink_to(sae)
    (line,) = blocks("sh")
    outcome = cli(*shlex.split(line)[1:], "--port", 0)
    assert outcome.status == 0, outcome.err
    assert "playground at http://127.0.0.1:" in outcome.out


def test_the_programs(
    tiny_lm: Callable[..., tuple[Any, Any]],
    sae: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from saesteer.checkpoints.sae_file import load_sae

    monkeypatch.chdir(tmp_path)
    lm = wrap_model(*tiny_lm("llama"), "tiny")
    made = plan_from_latents(lm, load_sae(sae), None, {0: 0.5})
    save_plan(made, "runs/french-dose")
    client, server = blocks("python")
    client = client.replace("http://127.0.0.1:8000", "{url}")
    client = client.replace("smollm2-135m-instruct", "mine")
    assert "\n    ..." in server and "{url}" in client
    run: Callable[[str], None] = lambda url: exec(client.replace("{url}", url), {})  # noqa: E731
    exec(server.replace("    ...", "    run(url)"), {"lm": lm, "run": run})
    assert "'tokens_touched'" in capsys.readouterr().out
