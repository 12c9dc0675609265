"""Builders of malformed and hostile SAE files, and the refusal that loading them must end with.

`CORPUS` holds a builder for each; it takes a folder and returns what a user would give to --sae.
"""

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
from safetensors.torch import load_file, save_file

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAESpec, load_sae, save_sae

D_MODEL, D_SAE = 6, 10

SECONDS, BYTES = 120.0, 512 << 20
"""The most time and memory that one bad file may take; the alarm ends the test run."""

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
    """A SAELens folder whose safetensors header was changed; `room` is how many data bytes stay."""

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
    """A .pt file whose archive members were changed."""

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
    # Not a measurement: a guard against a reader that never ends.
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with pytest.raises(UserError) as error:
            load_sae(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    # In kilobytes on Linux; a peak that was reached before cannot grow, and passes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BYTES >> 10
    text = str(error.value)
    assert "\n" not in text and "`sae`" in text and len(text) < 1000
    return text
