"""`saesteer models` lists what opens without the network."""

import json
from pathlib import Path

import pytest

from .conftest import Cli


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with a language model and an encoder, and a converted .gguf file."""
    hub = tmp_path / "hub"
    for name, architecture in (("lm", "LlamaForCausalLM"), ("enc", "BertForMaskedLM")):
        snapshot = hub / f"models--made-up--{name}" / "snapshots" / "0123456789abcdef"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        refs = hub / f"models--made-up--{name}" / "refs"
        refs.mkdir()
        (refs / "main").write_text("0123456789abcdef")
    own = tmp_path / "own" / "gguf" / "0123" / "model"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    (own / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("SAESTEER_CACHE", str(tmp_path / "own"))
    return own


def test_lists_aliases_cached_models_and_conversions(cli: Cli, caches: Path) -> None:
    found = {row["model"]: row for row in cli("models", "--json").json()}
    assert set(found) == {
        "smollm2-135m-instruct",
        "smollm2-135m-instruct-q4",
        "made-up/lm",
        str(caches),
    }
    assert found[str(caches)]["bytes"] == 1002
    assert found["smollm2-135m-instruct-q4"]["bytes"] is None  # not converted yet


def test_the_table_says_how_large_they_are(cli: Cli, caches: Path) -> None:
    out = cli("models").out
    assert "made-up/lm" in out and "made-up/enc" not in out
    assert "1.0 kB" in out


def test_without_any_cache(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("SAESTEER_CACHE", str(tmp_path / "none"))
    assert len(cli("models", "--json").json()) == 2
