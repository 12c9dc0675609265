"""Conversion: the report, what is folded, and refusing to write what does not agree."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import conversion, folds, formats
from saesteer.checkpoints.conversion import compare, convert, random_rows
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec, load_sae

D_MODEL, D_SAE = 12, 40


def make(architecture: str = "jumprelu", **changes: Any) -> SAE:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    chosen = architecture in ("topk", "abstopk", "groupmax")
    spec = SAESpec(
        architecture=architecture,  # type: ignore[arg-type]
        d_model=D_MODEL,
        d_sae=D_SAE,
        k=5 if chosen else None,
        **{"apply_b_dec_to_input": True, **changes},
    )
    gated = architecture == "gated"
    return SAE(
        spec=spec,
        W_enc=noise(D_MODEL, D_SAE),
        b_enc=30 * noise(D_SAE),
        W_dec=noise(D_SAE, D_MODEL) * (0.5 + noise(D_SAE, 1).abs()),
        b_dec=20 * noise(D_MODEL),
        threshold=20 * noise(D_SAE).abs() if architecture == "jumprelu" else None,
        b_mag=20 * noise(D_SAE) if gated else None,
        r_mag=noise(D_SAE) if gated else None,
    )


def saved(folder: Path, sae: SAE) -> Path:
    formats.write("saesteer", sae, folder)
    return folder


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "saesteer"])
def test_a_conversion(tmp_path: Path, format: str) -> None:
    source = saved(tmp_path / "a", make())
    x = 30 * torch.randn(32, D_MODEL)
    report = convert(source, tmp_path / "b", format, activations=x)
    assert report["format_from"] == "saelens" and report["format_to"] == format
    for part in ("random", "real"):
        assert report[part]["latents_relative"] < 1e-6 and report[part]["flips"] == 0
        assert report[part]["l0_before"] == report[part]["l0_after"] > 0
    assert report["random"]["rows"] == 256 and report["real"]["rows"] == 32
    assert ("sae_lens" in report) == (format == "saelens")
    if format == "saelens":
        assert report["sae_lens"]["latents_relative"] < 1e-6
    if format == "dictionary_learning":
        assert any("folded into b_enc" in note for note in report["notes"])
    again = load_sae(tmp_path / "b")
    assert torch.allclose(again.encode(x), load_sae(source).encode(x), atol=1e-3)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_report_alone_writes_nothing(tmp_path: Path) -> None:
    source = saved(tmp_path / "a", make())
    assert convert(source, None, "saelens")["tensors"]["W_enc"] == [D_MODEL, D_SAE]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "a", make())
    write = formats.write

    def wrong(name: str, sae: SAE, folder: Path) -> SAE:
        return write(name, dataclasses.replace(sae, b_enc=sae.b_enc * 1.01), folder)

    monkeypatch.setattr(formats, "write", wrong)
    with pytest.raises(UserError, match="differ: .* nothing was written") as error:
        convert(source, tmp_path / "b", "saesteer")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_another_dtype(tmp_path: Path, dtype: str) -> None:
    source = saved(tmp_path / "a", make("standard"))
    report = convert(source, tmp_path / "b", dtype=dtype)
    assert load_sae(tmp_path / "b").spec.dtype == dtype == report["dtype_to"]
    assert (report["random"]["latents_max"] > 0) == (dtype != "float64")


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_canonical(tmp_path: Path, architecture: str) -> None:
    sae = make(architecture)
    report = convert(saved(tmp_path / "a", sae), tmp_path / "b", canonical=True)
    again = load_sae(tmp_path / "b")
    assert torch.allclose(again.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6)
    assert not again.spec.apply_b_dec_to_input and report["random"]["flips"] == 0
    x = 30 * torch.randn(16, D_MODEL, generator=torch.Generator().manual_seed(1))
    # Latents are the lengths they add, up to float32.
    expected = sae.encode(x) * sae.W_dec.norm(dim=1)
    assert torch.allclose(again.encode(x), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_as_a_jumprelu(tmp_path: Path, architecture: str, canonical: bool) -> None:
    """The same latents and reconstruction, by one inference path."""
    source = saved(tmp_path / "a", make(architecture))
    report = convert(source, tmp_path / "b", jumprelu=True, canonical=canonical)
    assert report["random"]["l0_before"] > 0 == report["random"]["flips"]
    written = load_sae(tmp_path / "b")
    assert written.spec.architecture == "jumprelu"
    assert set(written.tensors()) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


def test_a_choice_among_latents_is_no_jumprelu(tmp_path: Path) -> None:
    source = saved(tmp_path / "a", make("topk"))
    with pytest.raises(UserError, match="of architecture topk chooses its latents by comparing"):
        convert(source, tmp_path / "b", jumprelu=True)


def test_no_canonical_form(tmp_path: Path) -> None:
    for sae, words in (
        (make("topk"), "would change which are chosen"),
        (make("standard", normalize_activations="layer_norm"), "scales each token"),
    ):
        source = saved(tmp_path / sae.spec.architecture, sae)
        with pytest.raises(UserError, match=words):
            convert(source, tmp_path / "b", canonical=True)


def test_wrong_arguments(tmp_path: Path) -> None:
    source = saved(tmp_path / "a", make())
    with pytest.raises(UsageError, match="`format` must be one of saelens, sparsify"):
        convert(source, None, "pickle")
    with pytest.raises(UserError, match="width 3"):
        convert(source, None, activations=torch.zeros(2, 3))
    with pytest.raises(UserError, match="sparsify has topk"):
        convert(source, tmp_path / "b", "sparsify")
    assert not (tmp_path / "b").exists()


def test_a_flip_is_counted_and_kept_out_of_the_differences() -> None:
    sae = make("standard", apply_b_dec_to_input=False)
    shifted = dataclasses.replace(sae, b_enc=sae.b_enc.clone())
    x = random_rows(sae, rows=8)
    q = sae.to(dtype="float64").pre_acts(x)
    row, latent = (q > 0).nonzero()[0].tolist()
    shifted.b_enc[latent] -= float(q[row, latent]) + 1e-3
    found = compare(sae, shifted, x[row : row + 1])
    assert found["flips"] == 1 and found["latents_max"] == 0
    assert found["l0_before"] - found["l0_after"] == 1 and found["reconstruction_max"] > 0


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "abstopk", "groupmax"])
def test_input_bias_both_ways(architecture: str) -> None:
    sae = make(architecture).to(dtype="float64")
    x = 30 * torch.randn(16, D_MODEL, dtype=torch.float64)
    folded = folds.fold_input_bias(sae)
    for other in (folded, folds.unfold_input_bias(folded)):
        # float64 sums in another order.
        assert torch.allclose(other.encode(x), sae.encode(x), rtol=1e-9, atol=1e-9)
        assert torch.allclose(other.reconstruct(x), sae.reconstruct(x), rtol=1e-9, atol=1e-9)
    assert not torch.equal(folded.b_enc, sae.b_enc)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_whitening(architecture: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for input_bias in (False, True):
        sae = make(architecture, apply_b_dec_to_input=input_bias).to(dtype="float64")
        mean = torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
        matrix = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
        inverse = torch.linalg.inv(matrix)
        folded = folds.fold_whitening(sae, mean, matrix, inverse)
        x = 30 * torch.randn(16, D_MODEL, generator=generator, dtype=torch.float64)
        z = (x - mean) @ matrix
        # A condition of about 100 in float64.
        assert torch.allclose(folded.encode(x), sae.encode(z), rtol=1e-8, atol=1e-6)
        expected = sae.reconstruct(z) @ inverse + mean
        assert torch.allclose(folded.reconstruct(x), expected, rtol=1e-8, atol=1e-6)


def test_random_rows_wake_latents_of_every_size() -> None:
    for size in (1e-3, 1.0, 1e3):
        sae = make("standard")
        scaled = dataclasses.replace(sae, b_enc=sae.b_enc * size, b_dec=sae.b_dec * size)
        active = (scaled.encode(random_rows(scaled).float()) > 0).float().mean()
        assert 0.2 < active < 0.8
    assert torch.equal(random_rows(sae, 4), random_rows(sae, 4))
    assert conversion.RANDOM_ROWS == len(random_rows(sae))
