"""The table of docs/formats.md: every architecture through every format, by the original loaders.

`SAESTEER_WRITE_DOCS=1` with all packages installed writes it; without, the page is compared with
what is seen here.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import formats
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae, save_sae
from saesteer.checkpoints.sparse_autoencoder import SAE

from .conftest import D_MODEL, D_OUT, D_SAE, activations, difference, make

PAGE = Path(__file__).resolve().parents[3] / "docs" / "formats.md"
BIAS = {"apply_b_dec_to_input": True}
CASES: dict[str, SAE] = {
    "standard": make("standard", **BIAS),
    "standard, no input bias": make("standard"),
    "gated": make("gated", **BIAS),
    "gated, no input bias": make("gated"),
    "jumprelu": make("jumprelu"),
    "jumprelu, input bias": make("jumprelu", **BIAS),
    "topk": make("topk", **BIAS),
    "topk, no input bias": make("topk"),
    "topk by decoder norm": make("topk", rescale_acts_by_decoder_norm=True, **BIAS),
    "abstopk": make("abstopk", **BIAS),
    "groupmax": make("groupmax", **BIAS),
    "matching pursuit": make("matching_pursuit", residual_threshold=0.5, **BIAS),
    "matching pursuit, no input bias": make("matching_pursuit", max_iterations=6),
    "topk, layer_norm": make("topk", normalize_activations="layer_norm", **BIAS),
    "jumprelu, constant norm": make("jumprelu", normalize_activations="constant_norm_rescale"),
    "relu transcoder": make("standard", d_out=D_OUT),
    "relu skip transcoder": make("standard", d_out=D_OUT, skip=True),
    "jumprelu skip transcoder": make("jumprelu", d_out=D_OUT, skip=True),
    "topk skip transcoder, one width": make("topk", d_out=D_MODEL, skip=True),
}
# Float32 products in another order and one rounding of what was folded.
TOLERANCE = 1e-5
HEAD = """| format | SAE | written here, read there | written there, read here |
| --- | --- | --- | --- |"""

Theirs = tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Path], Any]]


def saelens(folder: Path) -> Theirs:
    sae_lens = pytest.importorskip("sae_lens")
    loaded = sae_lens.SAE.load_from_disk(folder)
    return loaded.encode, loaded, loaded.save_model


def sparsify(folder: Path) -> Theirs:
    package = pytest.importorskip("sparsify")
    from sparsify import sparse_coder, utils

    sparse_coder.decoder_impl = utils.eager_decode  # theirs for machines without a GPU
    loaded = package.SparseCoder.load_from_disk(folder)

    def encode(x: torch.Tensor) -> torch.Tensor:
        acts, indices, _ = loaded.encode(x)
        return torch.zeros(len(x), D_SAE).scatter(1, indices, acts)

    return encode, lambda x: loaded(x).sae_out, loaded.save_to_disk


def dictionary_learning(folder: Path) -> Theirs:
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import top_k

    named = re.findall(r'"dict_class": "(\w+)"', (folder / "config.json").read_text())[0]
    home: Any = top_k if named == "AutoEncoderTopK" else dictionary
    keep = {"normalize_decoder": False} if named == "AutoEncoder" else {}
    loaded = getattr(home, named).from_pretrained(folder / "ae.pt", **keep)

    def save(target: Path) -> None:
        target.mkdir()
        torch.save(loaded.state_dict(), target / "ae.pt")
        (target / "config.json").write_text((folder / "config.json").read_text())

    return loaded.encode, loaded, save


def saesteer(folder: Path) -> Theirs:
    loaded = load_sae(folder)

    def save(target: Path) -> None:
        save_sae(target, loaded.spec, **loaded.tensors())

    return loaded.encode, loaded.reconstruct, save


LOADERS: dict[str, Callable[[Path], Theirs]] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "saesteer": saesteer,
}


def far(ours: SAE, encode: Callable[[Any], Any], forward: Callable[[Any], Any]) -> float:
    x = activations()
    with torch.no_grad():
        f = ours.encode(x)
        assert 0 < (f != 0).float().mean() < 0.9
        return max(difference(f, encode(x)), difference(ours.reconstruct(x), forward(x)))


def round_trip(name: str, sae: SAE, place: Path) -> tuple[float, float] | None:
    """The largest differences when we write and they read, and when they write and we read."""
    try:
        formats.write(name, sae, place / "ours")
    except UserError:
        return None
    encode, forward, save = LOADERS[name](place / "ours")
    out = far(sae, encode, forward)
    save(place / "theirs")
    back = far(load_sae(place / "theirs"), encode, forward)
    return out, back


@pytest.mark.parametrize("name", LOADERS)
def test_the_table(tmp_path: Path, name: str) -> None:
    seen: dict[str, str] = {}
    for number, (case, sae) in enumerate(CASES.items()):
        found = round_trip(name, sae, tmp_path / str(number))
        assert found is None or max(found) < TOLERANCE, case
        cells = ("refused", "refused") if found is None else tuple(f"{v:.1e}" for v in found)
        seen[case] = f"| {name} | {case} | {cells[0]} | {cells[1]} |"
    if os.environ.get("SAESTEER_WRITE_DOCS"):
        write(name, list(seen.values()))
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {name} \| (.*?) \| (.*?) \| (.*?) \|$", page, re.M)
    shown = {row[0]: row[1:] for row in rows}
    assert list(shown) == list(seen)
    for case, row in seen.items():
        # Another machine rounds otherwise; what is refused is refused everywhere.
        assert ("refused" in row) == ("refused" in shown[case]), case
    assert any("refused" not in row for row in seen.values())


def write(name: str, rows: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    old = rf"(<!-- {name} -->\n)(?:\|.*\n)*"
    text = "\n".join([HEAD, *rows, ""])
    PAGE.write_text(re.sub(old, lambda found: found[1] + text, page), encoding="utf-8")
