"""`saesteer metrics` on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.sae_file import SAESpec, save_sae

from .conftest import Cli

SMALL = ("--tokens", 300, "--context", 32, "--batch-size", 4, "--bootstrap", 20, "--dtype",
         "float32", "-q")  # fmt: skip


def other_sae(folder: Path, d_model: int = 32, layer: int = 1) -> Path:
    """An SAE for another place than the tiny model has."""
    spec = SAESpec(architecture="topk", d_model=d_model, d_sae=64, k=4,
                   hook_name=f"blocks.{layer}.hook_resid_post", model_name="elsewhere")  # fmt: skip
    rows = torch.nn.functional.normalize(torch.randn(64, d_model), dim=1)
    save_sae(folder, spec, rows.T.contiguous(), torch.zeros(64), rows, torch.zeros(d_model))
    return folder


def test_table(cli: Cli, model: Path, sae: Path) -> None:
    outcome = cli("metrics", "--sae", sae, "--model", model, *SMALL)
    assert outcome.status == 0, outcome.err
    header, *rows, l0, latents, densities, projection, place, seen = outcome.out.splitlines()
    assert header.split()[:2] == ["figure", "value"]
    assert [row.split()[0] for row in rows] == [
        "fvu", "l0", "dead_fraction", "ce_recovered", "ce_recovered_zero", "ce_plain", "ce_spliced",
        "ce_ablated", "ce_zero", "ce_increase", "kl", "cosine", "relative_norm", "shrinkage",
        "token_error", "ev_legacy", "ev_about_zero",
    ]  # fmt: skip
    assert l0.startswith("l0 over tokens: p05 ") and "p95" in l0
    assert latents.startswith("latents: ") and " dead; " in latents
    assert densities.startswith("latents by log10 of their firing rate: -")
    assert projection.startswith("decoder projection (n = 32): ")
    assert len({row.index("  ") for row in rows if row.startswith("ce_")}) > 1
    assert len({line.index("fraction of variance") for line in rows if "fraction of" in line}) == 1
    assert "[" in rows[0]
    assert place.startswith("layer 1 (resid_post)")
    # The SAE was trained on python-docs, which is also what metrics reads by default.
    assert seen.startswith("this text was in the SAE's training: give --data")
    assert outcome.err == f"warning: {seen}\n"


def test_held_out_text_is_no_warning(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt"
    text.write_text("\n\n".join(f"The heron stood still on day {i}." for i in range(100)))
    outcome = cli("metrics", "--sae", sae, "--model", model, *SMALL, "--data", text)
    assert (outcome.status, outcome.err) == (0, "")
    assert "training" not in outcome.out


def test_json_and_file_agree(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    found = cli("metrics", "--sae", sae, "--model", model, *SMALL, "-o", out, "--json").json()
    assert found == json.loads((out / "metrics.json").read_text())
    # Training left a third of the variance unexplained; text of the same kind is little worse.
    assert 0 < found["fvu"]["value"] < 0.8
    assert found["fvu"]["low"] <= found["fvu"]["value"] <= found["fvu"]["high"]
    assert found["l0"]["value"] <= 4
    assert json.loads((out / "run.json").read_text())["verb"] == "metrics"
    line = cli("metrics", "--sae", sae, "--model", model, *SMALL, "-o", out).error(2)
    assert "is not empty: add --force to replace it" in line
    again = cli("metrics", "--sae", sae, "--model", model, *SMALL, "-o", out, "--force")
    assert again.status == 0, again.err


def test_against_another_sae(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    other = other_sae(tmp_path / "other")
    outcome = cli("metrics", "--sae", sae, "--model", model, *SMALL, "--against", other)
    assert outcome.status == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("against ")]
    assert line.startswith(f"against {other}: mean cosine of 64 matched latents 0.")
    same = cli("metrics", "--sae", sae, "--model", model, *SMALL, "--against", sae, "--json").json()
    assert same["stability"]["matched_cosine"] > 0.999
    narrow = other_sae(tmp_path / "narrow", d_model=16)
    line = cli("metrics", "--sae", sae, "--model", model, *SMALL, "--against", narrow).error(1)
    assert f"--against {narrow} writes rows of width 16" in line
    line = cli("metrics", "--sae", sae, "--model", model, "-q", "--against", tmp_path / "no").error(
        1
    )
    assert f"--against {tmp_path / 'no'} does not exist" in line


def test_the_sae_names_its_model(cli: Cli, sae: Path) -> None:
    assert cli("metrics", "--sae", sae, *SMALL).status == 0


def test_wrong_usage(cli: Cli, model: Path, sae: Path) -> None:
    assert "--sae is missing" in cli("metrics", "--model", model, "-q").error(2)
    line = cli("metrics", "--sae", sae, "--model", model, *SMALL, "--layer", 2).error(2)
    assert "--layer 2 conflicts with --sae" in line
    line = cli("metrics", "--sae", sae, "--model", model, *SMALL, "-o", sae, "--force").error(2)
    assert "holds what --sae reads" in line
    assert (sae / "cfg.json").exists()


def test_an_sae_that_is_not_there(cli: Cli, model: Path, tmp_path: Path) -> None:
    line = cli("metrics", "--sae", tmp_path / "none", "--model", model, "-q").error(1)
    assert f"--sae {tmp_path / 'none'} does not exist" in line
    line = cli("metrics", "--sae", tmp_path, "--model", model, "-q").error(1)
    assert "holds no cfg.json" in line


def test_truncated_weights(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    for name in ("cfg.json", "sae_weights.safetensors"):
        content = (sae / name).read_bytes()
        (tmp_path / name).write_bytes(content if name == "cfg.json" else content[:-64])
    line = cli("metrics", "--sae", tmp_path, "--model", model, "-q").error(1)
    assert f"--sae {tmp_path}" in line
    assert "sae_weights.safetensors is damaged or cut short" in line


def test_an_sae_for_another_width_or_layer(cli: Cli, model: Path, tmp_path: Path) -> None:
    narrow = other_sae(tmp_path / "narrow", d_model=16)
    line = cli("metrics", "--sae", narrow, "--model", model, *SMALL).error(1)
    assert f"--sae {narrow} has d_model 16" in line
    assert "has 32" in line
    deep = other_sae(tmp_path / "deep", layer=7)
    line = cli("metrics", "--sae", deep, "--model", model, *SMALL).error(1)
    assert f"--sae {deep} reads layer 7" in line
    assert "4 blocks" in line


def test_an_sae_of_other_weights(cli: Cli, sae: Path, tiny_model_dir: Callable[..., Path]) -> None:
    words = ("metrics", "--sae", sae, "--model", tiny_model_dir("llama", seed=1), *SMALL)
    line = cli(*words).error(1)
    assert "was trained on" in line
    assert "--force" in line
    assert cli(*words, "--force").status == 0


def test_too_little_text(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Short.")
    line = cli("metrics", "--sae", sae, "--model", model, *SMALL, "--data", text).error(1)
    assert f"--data {text}" in line
    assert "fewer tokens than one context of 32" in line


@pytest.mark.parametrize("value", ["0", "-1"])
def test_bootstrap_out_of_range(cli: Cli, sae: Path, value: str) -> None:
    line = cli("metrics", "--sae", sae, "-q", "--bootstrap", value).error(2)
    assert f"--bootstrap must be at least 1, got {value}" in line


def test_text_is_read_as_in_training(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "herons"}, {"role": "assistant", "content": "stand"}]
    chat.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(40)))
    flags = ("--exclude-template", "--isolate-documents", "--max-norm-ratio", "1e9")
    outcome = cli("metrics", "--sae", sae, "--model", model, "--data", chat, *SMALL, *flags)
    assert outcome.status == 0, outcome.err
    assert "tokens of the chat template" in outcome.out
