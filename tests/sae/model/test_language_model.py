"""Any model family is understood from its structure; weights have an identity."""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saesteer.checkpoints import model_files
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.model_files import ResolvedModel
from saesteer.sae.model.hooks import resolve_site, run_to
from saesteer.sae.model.language_model import (
    LanguageModel,
    find_blocks,
    has_fast_bfloat16,
    load_model,
    pick_device,
    pick_dtype,
    weight_fingerprint,
    wrap_model,
)

BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "phi": "model.layers",
    "olmo2": "model.layers",
    "mistral": "model.layers",
    "mixtral": "model.layers",
    "gemma3_multimodal": "model.language_model.layers",
    "llava": "model.language_model.layers",
}
Shared = Callable[..., LanguageModel]


def test_every_family_has_an_expectation(families: tuple[str, ...]) -> None:
    assert set(BLOCKS) == set(families)


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_norm_and_unembedding_of_every_family(family: str, shared_lm: Shared) -> None:
    lm = shared_lm(family)
    assert lm.blocks_path == BLOCKS[family]
    assert (lm.n_layers, lm.d_model) == (4, 32)
    assert lm.dtype == torch.float32 and lm.device.type == "cpu"
    ids = torch.arange(10, 20)[None]
    last: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = lm.blocks[-1].register_forward_hook(keep)
    with torch.inference_mode():
        logits = lm.model(input_ids=ids).logits
        handle.remove()
        assert not hasattr(lm.text_model(input_ids=ids), "logits")
        assert lm.final_norm is not None
        by_hand = lm.unembed(lm.final_norm(last[0]))
    if family == "gemma2":  # caps its logits smoothly at 30
        by_hand = 30 * torch.tanh(by_hand / 30)
    # The same products in the same order, up to how rows are batched.
    torch.testing.assert_close(by_hand, logits, rtol=1e-5, atol=1e-5)


def test_text_tower_is_found_beside_a_vision_tower_of_the_same_depth(fresh_lm: Shared) -> None:
    model = fresh_lm("llava").model
    (name, layers) = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and "vision" in name
    )
    layers.extend(copy.deepcopy(list(layers)))
    assert len(layers) == 4, name
    assert find_blocks(model)[0] == "model.language_model.layers"


class _Ambiguous(nn.Module):
    """Two lists of blocks that nothing tells apart."""

    def __init__(self, lists: int) -> None:
        super().__init__()
        for i in range(lists):
            blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            setattr(self, f"stack{i}", blocks)

    class config:
        @staticmethod
        def get_text_config(decoder: bool) -> Any:
            return type("Text", (), {"num_hidden_layers": 3, "hidden_size": 2})


@pytest.mark.parametrize(("lists", "candidates"), [(0, "none"), (2, "stack0, stack1")])
def test_unclear_blocks_are_an_error_that_names_the_flag(lists: int, candidates: str) -> None:
    with pytest.raises(
        UserError, match=rf"3 decoder blocks \(candidates: {candidates}\).*`blocks`"
    ):
        find_blocks(_Ambiguous(lists))


def test_blocks_override(shared_lm: Shared, tiny_lm: Callable[..., tuple[Any, Any]]) -> None:
    assert find_blocks(_Ambiguous(2), "stack1")[0] == "stack1"
    lm = wrap_model(*tiny_lm("gpt2"), blocks_path="transformer.h")
    assert lm.n_layers == 4
    with pytest.raises(UserError, match="`blocks` transformer.g: the model has no such module"):
        find_blocks(lm.model, "transformer.g")
    with pytest.raises(UserError, match="`blocks` lm_head is a Linear, not a list of blocks"):
        find_blocks(lm.model, "lm_head")


def test_special_ids_and_pad(shared_lm: Shared) -> None:
    lm = shared_lm()
    assert lm.special_ids.tolist() == [0, 1, 2]
    assert lm.pad_id == 2
    assert lm.has_chat_template and not shared_lm(chat=False).has_chat_template


def test_special_ids_ask_the_tokenizer_once(fresh_lm: Shared) -> None:
    """Gemma's tokenizer makes a table of its 6,000 added tokens at every access."""
    lm, asked = fresh_lm(), 0
    own = type(lm.tokenizer)

    class Counting(own):  # type: ignore[misc, valid-type]
        @property
        def added_tokens_decoder(self) -> Any:
            nonlocal asked
            asked += 1
            return super().added_tokens_decoder

    lm.tokenizer.__class__ = Counting
    assert lm.special_ids.tolist() == [0, 1, 2]
    assert asked <= 2  # `all_special_ids` may look, too


# --- loading


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_multimodal", "llava"])
def test_load_from_a_folder(
    family: str,
    tiny_model_dir: Callable[..., Path],
    shared_lm: Shared,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_model_dir(family)
    capfd.readouterr()
    lm = load_model(str(folder), device="cpu", dtype="float32")
    # Ours say what is happening; the library's bars and warnings would tear a progress display.
    assert capfd.readouterr() == ("", "")
    assert lm.blocks_path == BLOCKS[family] and lm.name == str(folder)
    assert lm.fingerprint == shared_lm(family).fingerprint
    assert not lm.model.training
    ids = torch.arange(10, 30)[None]
    with torch.inference_mode():
        loaded, made = (m(input_ids=ids).logits for m in (lm.model, shared_lm(family).model))
    assert torch.equal(loaded, made)


def test_fingerprint_is_the_weights_own_in_every_dtype(
    tiny_model_dir: Callable[..., Path], fresh_lm: Shared, tmp_path: Path
) -> None:
    lm = fresh_lm()
    # Values that float16 cannot hold, and an outlier that it turns into infinity.
    with torch.no_grad():
        lm.blocks[0].mlp.down_proj.weight[0, :2] = torch.tensor([3e-7, 1e5])
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loads = {dtype: load_model(str(tmp_path), device="cpu", dtype=dtype) for dtype in
             ("float32", "bfloat16", "float16")}  # fmt: skip
    expected = weight_fingerprint(lm.model)
    assert {dtype: load.fingerprint for dtype, load in loads.items()} == dict.fromkeys(
        loads, expected
    )
    for dtype, load in loads.items():
        assert load.dtype == getattr(torch, dtype)
        assert {p.dtype for p in load.model.parameters()} == {getattr(torch, dtype)}
    assert len(expected) == 16 and int(expected, 16) >= 0


def test_fingerprint_changes_with_weights_names_and_shapes() -> None:
    def linear(fill: float, **extra: nn.Module) -> nn.Module:
        module = nn.Module()
        module.a = nn.Linear(3, 2, bias=False)
        nn.init.constant_(module.a.weight, fill)
        for name, child in extra.items():
            module.add_module(name, child)
        return module

    first = weight_fingerprint(linear(1.0))
    assert first == weight_fingerprint(linear(1.0))
    assert first != weight_fingerprint(linear(1.0078125))  # the next bfloat16
    assert first != weight_fingerprint(linear(1.0, b=nn.Linear(1, 1)))
    renamed = nn.Module()
    renamed.b = linear(1.0).a
    assert first != weight_fingerprint(renamed)
    flat = nn.Module()
    flat.a = nn.Linear(6, 1, bias=False)
    nn.init.constant_(flat.a.weight, 1.0)
    assert first != weight_fingerprint(flat)


def test_fingerprint_samples_evenly_spaced_values() -> None:
    model = nn.Linear(100, 100, bias=False)
    before = weight_fingerprint(model, sample=2500)
    with torch.no_grad():
        model.weight.view(-1)[3] += 1  # every fourth value is read
    assert weight_fingerprint(model, sample=2500) == before
    with torch.no_grad():
        model.weight.view(-1)[9996] += 1
    assert weight_fingerprint(model, sample=2500) != before


def test_unknown_models_are_one_line_errors(tmp_path: Path) -> None:
    for name in ("no-such-owner/no-such-model", str(tmp_path / "absent"), str(tmp_path)):
        with pytest.raises(UserError, match="`model`") as caught:
            load_model(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_missing_are_never_made_up(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights, first lm_head.weight"):
        load_model(str(folder), device="cpu")


def test_a_folder_that_transformers_refuses(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), folder)
    wrong = {"model_type": "llama", "hidden_size": "wide"}
    (folder / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"could not be loaded \(.*hidden_size") as caught:
        load_model(str(folder), device="cpu")
    assert "Hub" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def model_with_code(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of a type of its own, whose Python file leaves a trace when it runs."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'foreign'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return folder


def test_code_beside_a_model_is_never_run_unasked(
    model_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("a question was asked"))
    with pytest.raises(UserError, match="needs Python code of its own.*`trust_remote_code`"):
        load_model(str(model_with_code), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_runs_when_it_is_trusted(
    model_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    lm = load_model(str(model_with_code), device="cpu", trust_remote_code=True)
    assert (tmp_path / "ran").exists() and lm.n_layers == 4


def test_code_beside_a_tokenizer_is_never_run_unasked(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("a question was asked"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.Slow", "own.Fast"]}
    settings["tokenizer_class"] = "Fast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    # The library may open the file of tokens without the code, or refuse: it may not run it.
    with contextlib.suppress(UserError):
        load_model(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["someone/attention", {"": "someone/attention"}])
def test_a_config_that_names_code_of_the_hub_is_refused(
    value: object, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": value}))
    with pytest.raises(UserError, match="code of someone/attention, which is not fetched"):
        load_model(str(folder), device="cpu")


def test_hub_models_are_read_through_the_guarded_call(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_dir()
    asked: list[tuple[str, str]] = []

    def resolve(name: str, progress: Any, **how: Any) -> ResolvedModel:
        return ResolvedModel(name, str(folder), "hub", local_files_only=False)

    def call(read: Callable[[], Any], what: str, todo: str) -> Any:
        asked.append((what, todo))
        return read()

    monkeypatch.setattr(model_files, "resolve_model", resolve)
    monkeypatch.setattr(model_files, "hub_call", call)
    assert load_model("owner/model", device="cpu").name == "owner/model"
    assert [what for what, _ in asked] == ["`model` owner/model"]


# --- devices and dtypes


@pytest.mark.parametrize("device", ["gpu", "meta", "cpu:x"])
def test_unknown_device(device: str) -> None:
    with pytest.raises(UsageError, match=f"`device` must be .* got '{device}'"):
        pick_device(device)


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="`device` cuda was asked for.*use cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="`device` cuda:2 does not exist: torch sees 2"):
        pick_device("cuda:2")


def test_dtype_names(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float16", cpu) == torch.float16
    with pytest.raises(UsageError, match="`dtype` must be auto, float32, .* got 'int8'"):
        pick_dtype("int8", cpu)
    native = has_fast_bfloat16(cpu)
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)


# --- only what is needed, and large models


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_multimodal", "llava"])
def test_weights_that_nobody_needs_are_freed(family: str, fresh_lm: Any, shared_lm: Any) -> None:
    lm, whole = fresh_lm(family), shared_lm(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = run_to(whole, [resolve_site(whole, 1)], input_ids=ids)
    lm.keep_only(1)
    after = run_to(lm, [resolve_site(lm, 1)], input_ids=ids)
    assert torch.equal(before[1, "resid_post"], after[1, "resid_post"])
    assert all(p.is_meta for block in lm.blocks[2:] for p in block.parameters())
    assert lm.unembed.weight.is_meta
    held = {name for name, p in lm.model.named_parameters() if not p.is_meta}
    assert not any("vision" in name for name in held)
    assert lm.n_layers == 4 and lm.device == torch.device("cpu") and lm.dtype == torch.float32


def test_a_tied_head_leaves_the_embedding(tiny_lm: Any) -> None:
    model, tokenizer = tiny_lm("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    lm = wrap_model(model, tokenizer)
    lm.keep_only(0)
    assert model.lm_head.weight.is_meta and not model.model.embed_tokens.weight.is_meta
    run_to(lm, [resolve_site(lm, 0)], input_ids=torch.tensor([[5, 6]]))


def test_weights_spread_by_accelerate(tiny_model_dir: Any, shared_lm: Any) -> None:
    folder = str(tiny_model_dir("llama"))
    lm = load_model(folder, device="cpu", dtype="float32", device_map="auto")
    assert lm.fingerprint == shared_lm("llama").fingerprint
    lm.keep_only(2)  # harmless, whatever accelerate holds where
    seen = run_to(lm, [resolve_site(lm, 2)], input_ids=torch.tensor([[5, 6, 7]]))
    whole = shared_lm("llama")
    expected = run_to(whole, [resolve_site(whole, 2)], input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(seen[2, "resid_post"], expected[2, "resid_post"])


def test_weights_that_are_elsewhere_until_needed(tiny_lm: Any, shared_lm: Any) -> None:
    """accelerate's offloading: every parameter is a shell between passes."""
    from accelerate import cpu_offload

    model, tokenizer = tiny_lm("llama")
    cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in model.model.layers.parameters())
    lm, whole = wrap_model(model, tokenizer), shared_lm("llama")
    assert lm.fingerprint == whole.fingerprint
    assert lm.device == torch.device("cpu")
    ids = torch.tensor([[5, 6, 7]])
    seen = run_to(lm, [resolve_site(lm, 2)], input_ids=ids)
    expected = run_to(whole, [resolve_site(whole, 2)], input_ids=ids)
    assert torch.equal(seen[2, "resid_post"], expected[2, "resid_post"])


def test_placements_that_cannot_be(tiny_model_dir: Any, monkeypatch: Any) -> None:
    folder = str(tiny_model_dir("llama"))
    with pytest.raises(UsageError, match="`device_map` must be auto, got 'balanced'"):
        load_model(folder, device_map="balanced")
    with pytest.raises(UsageError, match="`quantize` must be 8bit or 4bit, got '2bit'"):
        load_model(folder, quantize="2bit")
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`quantize` 4bit needs bitsandbytes.*saesteer\[quant\]"):
        load_model(folder, quantize="4bit")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights(bits: str, tiny_lm: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokenizer = tiny_lm("llama")
    # Its blocks of 64 weights need rows of that length.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), **sizes})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole = load_model(str(tmp_path), device="cpu", dtype="float32")
    lm = load_model(str(tmp_path), device="cpu", dtype="float32", quantize=bits)
    assert lm.dtype.is_floating_point and lm.d_model == 64
    assert lm.fingerprint != whole.fingerprint
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        rows = run_to(lm, [resolve_site(lm, 1)], input_ids=ids)[1, "resid_post"]
        reported = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        exact = run_to(whole, [resolve_site(whole, 1)], input_ids=ids)[1, "resid_post"]
        lm.keep_only(1)
        again = run_to(lm, [resolve_site(lm, 1)], input_ids=ids)[1, "resid_post"]
    assert torch.equal(rows, reported) and torch.equal(again, rows)
    assert all(weight.is_meta for weight in lm.blocks[3].parameters())
    assert 0 < float((rows.float() - exact).norm() / exact.norm()) < 0.5


class _Packed(nn.Parameter):
    """Weights of a class of their own that cannot be moved, as those of bitsandbytes."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("its scales have no meta kernel")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = func in (torch.Tensor.to, torch.empty_like) and any(
            str(value) == "meta" for value in (*args, *(kwargs or {}).values())
        )
        if moved:
            raise NotImplementedError("its scales have no meta kernel")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_that_cannot_be_moved_are_freed_too(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    ids = torch.tensor([[5, 6, 7]])
    before = run_to(lm, [resolve_site(lm, 1)], input_ids=ids)[1, "resid_post"]
    for block in lm.blocks:
        for module in block.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None and weight.dim() == 2:
                    module._parameters[name] = _Packed(weight.detach(), requires_grad=False)
    lm.keep_only(1)
    assert all(weight.is_meta for weight in lm.blocks[2].parameters())
    assert not any(weight.is_meta for weight in lm.blocks[1].parameters())
    with torch.no_grad():
        after = run_to(lm, [resolve_site(lm, 1)], input_ids=ids)[1, "resid_post"]
    assert torch.equal(after, before)
