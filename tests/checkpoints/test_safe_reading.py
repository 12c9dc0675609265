"""Malformed and hostile files: a one-line UserError each, in bounded time and memory, no code run.

The corpus is built here, file by file, and goes through `load_sae` as a person would give it; the
fuzzers change bytes and headers of whole files of every kind.
"""

import io
import json
import os
import pickle
import resource
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saesteer.checkpoints import safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAESpec, load_sae, save_sae

D_MODEL, D_SAE = 6, 10
SECONDS, BYTES = 120.0, 512 << 20
"""What one bad file may take at most; the alarm ends the test run."""

Corpus = dict[str, Callable[[Path], Path]]


def tensors(threshold: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator),
        "W_dec": torch.randn(D_SAE, D_MODEL, generator=generator),
        "b_dec": torch.randn(D_MODEL, generator=generator),
    }
    return {**found, "threshold": found["b_enc"].abs()} if threshold else found


def saelens(folder: Path) -> Path:
    spec = SAESpec(architecture="jumprelu", d_model=D_MODEL, d_sae=D_SAE)
    save_sae(folder, spec, **tensors())
    return folder


def with_header(change: Callable[[dict[str, Any]], Any], room: int | None = None) -> Any:
    """A SAELens folder whose safetensors header was changed; `room` keeps so many data bytes."""

    def build(folder: Path) -> Path:
        path = saelens(folder) / "sae_weights.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        text = change(header) or header
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :][:room])
        return folder

    return build


def with_config(**changes: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        config = json.loads((saelens(folder) / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({**config, **changes}))
        return folder

    return build


def with_text(text: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (saelens(folder) / "cfg.json").write_text(text)
        return folder

    return build


def with_values(name: str, value: torch.Tensor) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = saelens(folder) / "sae_weights.safetensors"
        save_file({**load_file(path), name: value}, path)
        return folder

    return build


class Runs:
    """An object whose unpickling would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def openai_state() -> dict[str, Any]:
    found = tensors()
    return {
        "pre_bias": found["b_dec"],
        "latent_bias": found["b_enc"],
        "encoder.weight": found["W_enc"].T.contiguous(),
        "decoder.weight": found["W_dec"].T.contiguous(),
        "activation": "ReLU",
    }


def pt(**changes: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        torch.save({**openai_state(), **changes}, folder / "sae.pt")
        return folder

    return build


def pt_members(
    change: Callable[[dict[str, bytes]], Any], compress: int = zipfile.ZIP_STORED
) -> Callable[[Path], Path]:
    """A .pt whose archive was taken apart, changed and put together again."""

    def build(folder: Path) -> Path:
        path = pt()(folder) / "sae.pt"
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members = change(members) or members
        with zipfile.ZipFile(path, "w", compress) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return folder

    return build


def code_in_pt(folder: Path) -> Path:
    torch.save({**openai_state(), "more": Runs(folder / "ran")}, folder / "sae.pt")
    return folder


def bare_pickle(folder: Path) -> Path:
    (folder / "ae.pt").write_bytes(pickle.dumps(Runs(folder / "ran")))
    return folder


def npz(**changes: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        arrays = {**{k: v.numpy() for k, v in tensors().items()}, **changes}
        np.savez(folder / "params.npz", **arrays)
        return folder

    return build


def npz_code(folder: Path) -> Path:
    found = np.empty(1, dtype=object)
    found[0] = Runs(folder / "ran")
    return npz(W_enc=found)(folder)


def npz_bomb(folder: Path) -> Path:
    """64 MiB of zeros in 64 KiB."""
    arrays = {k: v.numpy() for k, v in tensors().items()}
    with zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                if name != "W_enc":
                    np.lib.format.write_array(member, array)
                    continue
                header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 12, 1 << 12)}
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(1 << 6):
                    member.write(b"\0" * (1 << 20))
    return folder


def npz_header_only(shape: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        with zipfile.ZipFile(npz()(folder) / "params.npz", "w") as archive:
            archive.writestr("W_enc.npy", npy)
        return folder

    return build


def link_out(folder: Path) -> Path:
    """The weights are a link to a good file elsewhere."""
    other = folder.parent / f"{folder.name}-elsewhere"
    saelens(other)
    path = saelens(folder) / "sae_weights.safetensors"
    path.unlink()
    path.symlink_to(other / "sae_weights.safetensors")
    return folder


def device(folder: Path) -> Path:
    path = saelens(folder) / "cfg.json"
    path.unlink()
    path.symlink_to("/dev/zero")
    return folder


def pipe(folder: Path) -> Path:
    path = saelens(folder) / "cfg.json"
    path.unlink()
    os.mkfifo(path)
    return folder


def truncated(name: str, build: Callable[[Path], Path], keep: float) -> Callable[[Path], Path]:
    def cut(folder: Path) -> Path:
        path = build(folder) / name
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * keep)])
        return folder

    return cut


def nested(depth: int) -> bytes:
    """A pickle that nests lists `depth` deep, each holding the one before it ten times."""
    inner = b"]" + b"".join(b"q" + bytes([0]) for _ in range(1))
    program = b"\x80\x02" + inner
    for level in range(1, depth):
        program += b"](" + b"".join(b"h" + bytes([level - 1]) for _ in range(200)) + b"e"
        program += b"q" + bytes([level])
    return program + b"."


def set_entry(name: str, **row: Any) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        header[name] = {**header[name], **row}

    return change


def twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + ', "b_enc": ' + json.dumps(header["b_enc"]) + "}").encode()


WEIGHTS = "sae_weights.safetensors"
CORPUS: Corpus = {
    # truncated
    "safetensors cut in its header": truncated(WEIGHTS, saelens, 0.2),
    "safetensors cut in its data": truncated(WEIGHTS, saelens, 0.9),
    "safetensors of three bytes": truncated(WEIGHTS, saelens, 0.001),
    "safetensors longer than it says": with_header(lambda h: {**h, "W_enc": h["b_enc"]}),
    "npz cut": truncated("params.npz", npz(), 0.6),
    "pt cut": truncated("sae.pt", pt(), 0.6),
    "empty pt": truncated("sae.pt", pt(), 0.0),
    # oversized headers and numbers
    "header length of 2**60": lambda f: _overwrite(saelens(f) / WEIGHTS, (1 << 60)),
    "header of 9 MiB": with_header(lambda h: (json.dumps(h) + " " * (9 << 20)).encode()),
    "config of 5 MiB": with_text("{" + " " * (5 << 20) + "}"),
    "config nested 100,000 deep": with_text("[" * 100_000),
    "config with a number of 10,000 digits": with_text('{"d_in": ' + "9" * 10_000 + "}"),
    "tensor of 2**60 numbers": with_header(set_entry("b_enc", shape=[1 << 60])),
    "5,000 tensors": with_header(lambda h: {f"t{i}": h["b_enc"] for i in range(5000)}),
    "npz shape of 2**62": npz_header_only("(1073741824, 4294967296)"),
    "pt pickle of 2 MiB": pt(more="x" * (2 << 20)),
    # wrong dtypes
    "safetensors of int8": with_values("b_enc", torch.zeros(D_SAE, dtype=torch.int8)),
    "safetensors dtype F8": with_header(set_entry("b_enc", dtype="F8_E4M3")),
    "safetensors dtype 7": with_header(set_entry("b_enc", dtype=7)),
    "npz of complex": npz(b_enc=np.zeros(D_SAE, dtype=complex)),
    "npz of text": npz(b_enc=np.array(["a"] * D_SAE)),
    "pt of complex": pt(latent_bias=torch.zeros(D_SAE, dtype=torch.complex64)),
    "pt of integers": pt(latent_bias=torch.zeros(D_SAE, dtype=torch.int64)),
    # values
    "NaN": with_values("W_dec", torch.full((D_SAE, D_MODEL), torch.nan)),
    "infinity": with_values("b_dec", torch.full((D_MODEL,), torch.inf)),
    "NaN in npz": npz(b_dec=np.full(D_MODEL, np.nan, dtype=np.float32)),
    "NaN in pt": pt(pre_bias=torch.full((D_MODEL,), torch.nan)),
    # shapes
    "negative shape": with_header(set_entry("b_enc", shape=[-D_SAE])),
    "shape of text": with_header(set_entry("b_enc", shape="10")),
    "shape true": with_header(set_entry("b_enc", shape=[True])),
    "offsets that overlap": with_header(set_entry("b_enc", data_offsets=[0, 4 * D_SAE])),
    "offsets turned around": with_header(set_entry("b_enc", data_offsets=[40, 0])),
    "offsets that are none": with_header(set_entry("b_enc", data_offsets=None)),
    "npz negative shape": npz_header_only("(-4, 5)"),
    "npz shape that is code": npz_header_only("(__import__('os').system('true'),)"),
    "matrix of five axes": with_values("W_enc", torch.zeros(1, 1, 1, D_MODEL, D_SAE)),
    "empty matrix": npz(W_enc=np.zeros((0, D_SAE), dtype=np.float32)),
    "widths that differ": npz(W_dec=np.zeros((D_SAE, D_MODEL + 1), np.float32)[:, :-2]),
    "a config of other widths": with_config(d_in=D_MODEL + 1),
    "negative width": with_config(d_in=-D_MODEL),
    "width of text": with_config(d_sae="10"),
    "width of half": with_config(d_sae=10.5),
    "width infinite": with_config(d_in=float("inf")),
    "width not a number": with_config(d_sae=float("nan")),
    "architecture a list": with_config(architecture=["topk"]),
    "normalisation a list": with_config(normalize_activations=[None]),
    "dtype a mapping": with_config(dtype={"a": 1}),
    "safetensors dtype a list": with_header(set_entry("b_enc", dtype=[])),
    # keys
    "a key twice in the header": with_header(twice),
    "a key twice in the config": with_text('{"d_in": 6, "d_in": 7}'),
    "no keys": with_text("{}"),
    "config a list": with_text("[1]"),
    "config not UTF-8": lambda f: _overwrite(saelens(f) / "cfg.json", b"\xff\xfe{"),
    "header a list": with_header(lambda h: b"[]"),
    "header a number": with_header(lambda h: b"7"),
    "metadata a text": with_config(metadata="6.0", sae_lens_version="6.0.0"),
    "pt with an unknown tensor": pt(extra=torch.zeros(3)),
    "pt a list": lambda f: _pt(f, [1, 2]),
    "pt a tensor": lambda f: _pt(f, torch.zeros(3)),
    "pt empty": lambda f: _pt(f, {}),
    # archives
    "zip bomb in npz": npz_bomb,
    "pt compressed": pt_members(lambda m: None, zipfile.ZIP_DEFLATED),
    "pt without numbers": pt_members(
        lambda m: {k: v for k, v in m.items() if "/data/" not in k}
    ),
    "pt with short numbers": pt_members(
        lambda m: {k: v[:8] if "/data/" in k else v for k, v in m.items()}
    ),
    "pt without a pickle": pt_members(
        lambda m: {k: v for k, v in m.items() if "data.pkl" not in k}
    ),
    "pt with two pickles": pt_members(lambda m: {**m, "other/data.pkl": b"."}),
    "pt with a name that leaves it": pt_members(lambda m: {**m, "sae/../../x": b"."}),
    "npz that is a text": lambda f: _overwrite(npz()(f) / "params.npz", b"hello"),
    "pt of lists in lists": pt_members(
        lambda m: {k: nested(12) if k.endswith("data.pkl") else v for k, v in m.items()}
    ),
    "pt with a hole in its memo": pt_members(
        lambda m: {
            k: b"\x80\x02}r\xff\xff\xff\x7f." if k.endswith("data.pkl") else v
            for k, v in m.items()
        }
    ),
    # code
    "code in pt": code_in_pt,
    "code in a bare pickle": bare_pickle,
    "code in npz": npz_code,
    "pickle that calls by STACK_GLOBAL": pt_members(
        lambda m: {
            k: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
            if k.endswith("data.pkl")
            else v
            for k, v in m.items()
        }
    ),
    "pickle that makes instances": pt_members(
        lambda m: {
            k: b"\x80\x02(cos\nsystem\noo." if k.endswith("data.pkl") else v for k, v in m.items()
        }
    ),
    "a class of torch's own": pt(more=torch.nn.Linear(2, 2)),
    # ways out of the folder
    "link out of the folder": link_out,
    "link to a device": device,
    "a pipe": pipe,
}  # fmt: skip


def _overwrite(path: Path, content: int | bytes) -> Path:
    raw = path.read_bytes()
    if isinstance(content, int):
        content = content.to_bytes(8, "little") + raw[8:]
    path.write_bytes(content)
    return path.parent


def _pt(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "sae.pt")
    return folder


def refusal(path: Path) -> str:
    """The one line that loading a bad file ends with, within the limits of time and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not a measurement: a guard against a reader that waits or walks for ever.
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with pytest.raises(UserError) as error:
            load_sae(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    # In kilobytes on Linux; a peak that was reached before cannot grow, and passes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BYTES >> 10
    text = str(error.value)
    assert "\n" not in text and "--sae" in text and len(text) < 1000
    return text


@pytest.mark.parametrize("name", CORPUS)
def test_every_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    refusal(CORPUS[name](folder))
    assert not (folder / "ran").exists()


def test_the_good_files_of_the_corpus_load(tmp_path: Path) -> None:
    """So that the corpus is refused for what is wrong with it."""
    for number, build in enumerate((saelens, pt(), npz(), with_header(lambda h: None))):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert load_sae(build(folder)).spec.d_sae == D_SAE


def test_links_inside_a_hub_cache_pass(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "0123"
    saelens(snapshot / "layer")
    (repo / "blobs").mkdir()
    path = snapshot / "layer" / WEIGHTS
    path.rename(repo / "blobs" / "abcd")
    path.symlink_to("../../../blobs/abcd")
    assert load_sae(snapshot / "layer").spec.d_sae == D_SAE


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "a\\..\\x", "a\0b"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="leaves the folder"):
        safe_reading.inner_file(tmp_path, name)


def test_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path)
    monkeypatch.setattr(os, "sysconf", lambda name: 16)
    with pytest.raises(UserError, match="more than this machine's memory"):
        safe_reading.safetensors_header(tmp_path / WEIGHTS)


def test_weights_only_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    load = torch.load

    def spy(*arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords)
        return load(*arguments, **keywords)

    monkeypatch.setattr(torch, "load", spy)
    load_sae(pt()(tmp_path))
    assert [keywords["weights_only"] for keywords in asked] == [True]
    asked.clear()
    code_in_pt(tmp_path)
    refusal(tmp_path)
    assert not asked  # refused before torch sees it


# --- fuzzers ---------------------------------------------------------------------------------


def whole(kind: str) -> bytes:
    """The bytes of a good file of each kind."""
    buffer = io.BytesIO()
    if kind == "pt":
        torch.save(openai_state(), buffer)
    elif kind == "npz":
        np.savez(buffer, **{k: v.numpy() for k, v in tensors().items()})
    else:
        from safetensors.torch import save

        return save({k.replace("W_", "w_"): v for k, v in tensors().items()})
    return buffer.getvalue()


WHOLE = {kind: whole(kind) for kind in ("pt", "npz", "safetensors")}
NAMES = {"pt": "sae.pt", "npz": "params.npz", "safetensors": "params.safetensors"}
FUZZ = settings(
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def survives(path: Path) -> None:
    """Loading gives an SAE of finite weights or a one-line UserError; nothing else."""
    try:
        sae = load_sae(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(bool(torch.isfinite(t).all()) for t in sae.tensors().values())


@pytest.mark.parametrize("kind", WHOLE)
@FUZZ
@given(data=st.data())
def test_changed_bytes(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    raw = bytearray(WHOLE[kind])
    places = st.integers(0, len(raw) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        raw[place] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), places))]
    path = tmp_path / NAMES[kind]
    path.write_bytes(raw)
    survives(path)


@pytest.mark.parametrize("kind", WHOLE)
@FUZZ
@given(raw=st.binary(max_size=400))
def test_any_bytes(tmp_path: Path, kind: str, raw: bytes) -> None:
    path = tmp_path / NAMES[kind]
    path.write_bytes(raw)
    survives(path)


def test_an_archive_over_several_disks(tmp_path: Path) -> None:
    raw = bytearray(WHOLE["pt"])
    locator = raw.rindex(b"PK\x06\x07")
    raw[locator + 4] = 1
    (tmp_path / "sae.pt").write_bytes(raw)
    refusal(tmp_path / "sae.pt")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, min_size=1)
)
def test_any_header(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "sae"
    survives(with_header(set_entry("b_enc", **changes))(folder))


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from(
            ["architecture", "d_in", "d_sae", "d_out", "k", "dtype", "metadata", "hook_name",
             "normalize_activations", "reshape_activations", "apply_b_dec_to_input",
             "sae_lens_version", "activation_fn_kwargs", "rescale_acts_by_decoder_norm",
             "residual_threshold", "max_iterations", "stop_on_duplicate_support"]
        ),  # fmt: skip
        JSON | st.sampled_from(["matching_pursuit", "gated", "topk"]),
        min_size=1,
    )
)  # fmt: skip
def test_any_config(tmp_path: Path, changes: dict[str, Any]) -> None:
    survives(with_config(**changes)(tmp_path / "sae"))


def linear(decoder: bool = True) -> dict[str, torch.Tensor]:
    found = tensors()
    named = {"encoder.weight": found["W_enc"].T.contiguous(), "encoder.bias": found["b_enc"]}
    if not decoder:
        return {**named, "W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    turned = {"decoder.weight": found["W_dec"].T.contiguous(), "decoder.bias": found["b_dec"]}
    return {**named, **turned}


def openmoss() -> dict[str, torch.Tensor]:
    names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
    return {names[key]: value for key, value in tensors().items() if key in names}


def plain() -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors().items() if key != "threshold"}


# Config, weights, what is in them, and the keys that the reader asks for.
FOREIGN: dict[str, tuple[str, str, Callable[[], dict[str, torch.Tensor]], tuple[str, ...]]] = {
    "sparsify": (
        "cfg.json", "sae.safetensors", lambda: linear(decoder=False),
        ("activation", "k", "d_in", "num_latents", "transcode"),
    ),
    "dictionary_learning": ("config.json", "ae.pt", linear, ("trainer", "buffer")),
    "llama-scope": (
        "hyperparams.json", "checkpoints/final.safetensors", linear,
        ("dataset_average_activation_norm", "jump_relu_threshold", "hook_point_in"),
    ),
    "llama-scope-r1": (
        "config.json", "sae_weights.safetensors",
        lambda: {**linear(), "log_jumprelu_threshold": tensors()["b_enc"]},
        ("dataset_average_activation_norm", "hook_point_in", "act_fn", "d_model"),
    ),
    "openmoss": (
        "config.json", "sae_weights.safetensors", openmoss,
        ("sae_type", "act_fn", "top_k", "norm_activation", "sparsity_include_decoder_norm",
         "hook_point_in", "hook_point_out", "use_glu_encoder", "d_model"),
    ),
    "gemma-scope-2": (
        "config.json", "params.safetensors",
        lambda: {key.replace("W_", "w_"): value for key, value in tensors().items()},
        ("architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out"),
    ),
    "transcoder-layers": ("config.yaml", "layer_3.safetensors", plain, ("model_name",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@FUZZ
@given(data=st.data())
def test_any_config_of_other_formats(tmp_path: Path, name: str, data: st.DataObject) -> None:
    config_file, weights, build, keys = FOREIGN[name]
    (tmp_path / weights).parent.mkdir(exist_ok=True)
    if weights.endswith(".pt"):
        torch.save(build(), tmp_path / weights)
    else:
        save_file(build(), tmp_path / weights)
    if name == "transcoder-layers":
        (tmp_path / "wandb-config.yaml").write_text("")
    config = data.draw(st.dictionaries(st.sampled_from(keys), JSON))
    (tmp_path / config_file).write_text(json.dumps(config))
    survives(tmp_path)


@FUZZ
@given(
    scaler=st.dictionaries(st.sampled_from(["scaling_factor", "has_whitening"]), JSON),
    changes=st.dictionaries(
        st.sampled_from(["architecture", "normalize_activations", "rescale_acts_by_decoder_norm"]),
        st.sampled_from(["topk", "batchtopk", "expected_average_only_in", True]) | JSON,
    ),
)
def test_any_scaler_of_a_checkpoint(
    tmp_path: Path, scaler: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = tmp_path / "sae"
    with_config(**changes)(folder)
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    survives(folder)


@FUZZ
@given(program=st.binary(max_size=200), protocol=st.booleans())
def test_any_pickle(tmp_path: Path, program: bytes, protocol: bool) -> None:
    """In a whole archive, so that the pickle itself is what is read."""
    program = b"\x80\x02" + program + b"." if protocol else program
    build = pt_members(
        lambda m: {k: program if k.endswith("data.pkl") else v for k, v in m.items()}
    )
    survives(build(tmp_path))
