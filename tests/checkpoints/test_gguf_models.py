"""Models in GGUF files: converted once, with every weight, or refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saesteer.checkpoints import model_files
from saesteer.checkpoints.errors import UserError

from .model_sources import refused, write_gguf

pytestmark = pytest.mark.usefixtures("fresh")


def test_convert_keeps_every_weight(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = write_gguf(tmp_path / "a.gguf", seed=3)
    model_files.convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    found = load_file(tmp_path / "out" / "model.safetensors")
    # The rows of q and k are reordered by design; everything else keeps its place.
    for theirs, ours in {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    }.items():
        assert np.array_equal(found[f"{theirs}.weight"].numpy(), written[f"{ours}.weight"]), theirs
    q = np.sort(found["model.layers.0.self_attn.q_proj.weight"].numpy(), axis=0)
    assert np.array_equal(q, np.sort(written["blk.0.attn_q.weight"], axis=0))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert os.listdir(tmp_path / "out") and len(os.listdir(tmp_path)) == 2  # no leftovers
    with model_files.quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    ids = tokenizer("ab héllo<|im_end|>")["input_ids"]
    assert ids[-1] == 2 and tokenizer.decode(ids) == "ab héllo<|im_end|>"
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_gguf_file_is_converted_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = model_files.resolve_model(str(tiny_gguf), said.append)
    assert found.kind == "gguf" and (Path(found.path_or_repo) / "config.json").is_file()
    assert Path(found.path_or_repo).parent == tmp_path / "cache" / "gguf"
    assert said == ["converting tiny.gguf to safetensors"]
    monkeypatch.setattr(model_files, "convert_gguf", None)
    copy = tmp_path / "another name.GGUF"
    copy.write_bytes(tiny_gguf.read_bytes())
    assert model_files.resolve_model(str(copy)).path_or_repo == found.path_or_repo


def test_gguf_files_that_are_none(tiny_gguf: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("text")
    assert "is not a GGUF file" in refused(tmp_path / "text.gguf")
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:5000])
    assert "transformers cannot read this GGUF file" in refused(tmp_path / "cut.gguf")
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()] == []


def test_disk_full_while_converting(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert "no space left while writing" in refused(tiny_gguf)
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()] == []


def test_recorded_paths_lead_to_the_conversion(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    moved = tmp_path / "models" / "mine.gguf"
    moved.write_bytes(tiny_gguf.read_bytes())
    monkeypatch.chdir(tmp_path)
    found = model_files.resolve_model("models/mine.gguf")
    assert found.name == str(moved), "another folder's commands find it"
    moved.unlink()
    said: list[str] = []
    for name in ("models/mine.gguf", str(moved), "elsewhere/mine.gguf"):
        again = model_files.resolve_model(name, said.append, recorded=True)
        assert again.path_or_repo == found.path_or_repo
        with pytest.raises(UserError, match="no such file"):
            model_files.resolve_model(name)  # a person may have mistyped it
    assert len(said) == 3 and "models/mine.gguf is not there: its conversion" in said[0]
    # Two files of that name: it cannot be told which.
    write_gguf(moved, seed=5)
    model_files.resolve_model(str(moved))
    other = tmp_path / "mine.gguf"
    write_gguf(other, seed=6)
    model_files.resolve_model(str(other))
    other.unlink()
    with pytest.raises(UserError, match="no such file"):
        model_files.resolve_model("elsewhere/mine.gguf", recorded=True)


def test_half_the_bytes_where_nothing_is_lost() -> None:
    exact = torch.tensor([1.5, -0.25, 3e38]).bfloat16().float()
    in_float16 = torch.tensor([1 + 2**-10, 2**-20]).half().float()
    quantised = torch.tensor([0.1, 0.3])
    tied = quantised.view(2)
    weights = {"a": exact, "b": in_float16, "c": quantised, "d": tied, "e": exact}
    found = model_files._narrowed(weights)
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    assert kinds == {
        "a": torch.bfloat16, "b": torch.float16, "c": torch.float32, "d": torch.float32,
        "e": torch.bfloat16,
    }  # fmt: skip
    assert all(torch.equal(found[name].float(), weights[name]) for name in weights)
    assert found["c"].data_ptr() == found["d"].data_ptr()
    assert found["a"].data_ptr() == found["e"].data_ptr()
