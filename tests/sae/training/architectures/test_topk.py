"""The loss and every gradient against dense float64 mathematics; the form SAEs are shared in."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE, SAESpec, load_sae, save_sae
from saesteer.kernels import native, topk_encode
from saesteer.kernels.ops import encode_topk, sparse_decode
from saesteer.sae.training import auxiliary_loss
from saesteer.sae.training.architecture import DeadList, Parameters, Pass
from saesteer.sae.training.architecture import gradients as pass_gradients
from saesteer.sae.training.architectures.abstopk import AbsTopK
from saesteer.sae.training.architectures.topk import TopK
from saesteer.sae.training.input_scale import InputScale

from ..dense_twins import batch_for, gradients, own_gradients, parameters_for


def in_float32(p: Parameters, requires_grad: bool = False) -> Parameters:
    return {name: q.detach().float().requires_grad_(requires_grad) for name, q in p.items()}


def dense_loss(
    p: Parameters,
    x: Tensor,
    k: int,
    dead: Tensor | None,
    auxk: float,
    *,
    k_aux: int = 512,
    detach: bool = True,
    signed: bool = False,
) -> Tensor:
    """The formulas of the docstring with every matrix written out; `signed`: those of abstopk."""
    pre_acts = x @ p["W_enc_rows"].T + p["b_enc"]

    def keep_signed(values: Tensor, count: int) -> Tensor:
        chosen = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :count]
        return values * torch.zeros_like(values).scatter(1, chosen, 1.0)

    def keep(values: Tensor, count: int) -> Tensor:
        chosen = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
        mask = torch.zeros_like(values).scatter(1, chosen, 1.0)
        return torch.where(values > 0, values, 0.0) * mask

    reconstruction = (keep_signed if signed else keep)(pre_acts, k) @ p["W_dec"] + p["b_dec"]
    total = (x - reconstruction).pow(2).mean()
    if dead is not None and auxk and dead.any():
        residual = x - reconstruction
        if detach:
            residual = residual.detach()
        allowed = torch.where(dead, pre_acts, -torch.inf)
        estimate = keep(allowed, min(k_aux, int(dead.sum()))) @ p["W_dec"]
        variance = (residual - residual.mean(dim=0)).pow(2).sum()
        total = total + auxk * (estimate - residual).pow(2).sum() / variance
    return total


def run(
    p: Parameters,
    x: Tensor,
    k: int,
    dead: Tensor | None = None,
    auxk: float = 0.0,
    kind: type[TopK] = TopK,
) -> Pass:
    architecture = kind(k, auxk)
    listed = dead is not None and architecture.uses_dead
    return architecture.loss(p, x, x, DeadList(dead.nonzero()[:, 0]) if listed else None)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_model=st.integers(1, 11),
    d_sae=st.integers(1, 17),
    share=st.floats(0.0, 1.0),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.sampled_from([0.0, -3.0]),
    kind=st.sampled_from([TopK, AbsTopK]),
)
def test_loss_and_every_gradient(
    rows: int,
    d_model: int,
    d_sae: int,
    share: float,
    dead_share: float,
    bias: float,
    kind: type[TopK],
) -> None:
    """Odd shapes, k from 1 to d_sae, and (bias -3) rows with fewer than k positive latents."""
    k = 1 + round(share * (d_sae - 1))
    p = parameters_for(d_model, d_sae)
    p["b_enc"].data += bias
    x = batch_for(rows, d_model)
    dead = torch.rand(d_sae, generator=torch.Generator().manual_seed(2)) < dead_share
    signed = kind is AbsTopK
    loss = run(p, x, k, dead, auxk=0.25, kind=kind)
    expected = dense_loss(p, x, k, dead, 0.25, signed=signed)
    # float64: only the order of additions differs.
    torch.testing.assert_close(loss.loss, expected, rtol=1e-10, atol=1e-12)
    (found, counts), wanted = pass_gradients(loss, d_sae), gradients(p, expected)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-10, msg=name)
    assert loss.latent_acts.shape == loss.latent_indices.shape == (rows, k)
    error = dense_loss(p, x, k, None, 0.0, signed=signed) * x.numel()
    torch.testing.assert_close(loss.squared_error, error)
    torch.testing.assert_close(loss.squared_deviation, (x - x.mean(dim=0)).pow(2).sum())
    fired = torch.zeros(d_sae, dtype=torch.int64)
    fired.index_add_(
        0, loss.latent_indices.flatten(), (loss.latent_acts != 0).flatten().to(torch.int64)
    )
    assert torch.equal(counts, fired)


def test_auxk_teaches_dead_latents_through_the_encoder() -> None:
    p = parameters_for(6, 20)
    x = batch_for(12, 6)
    with torch.no_grad():
        dead = torch.zeros(20, dtype=torch.bool)
        dead[[3, 8, 11]] = True
        p["b_enc"][~dead] += 20.0  # the others are always among the 3 best
    plain = own_gradients(p, run(p, x, 3, dead, auxk=0.0))
    with_aux = own_gradients(p, run(p, x, 3, dead, auxk=0.5))
    aux = {name: with_aux[name] - plain[name] for name in plain}
    # The residual is held constant: b_dec and living latents feel nothing of the auxiliary loss.
    for name in ("W_enc_rows", "W_dec", "b_enc"):
        assert plain[name][dead].abs().max() == 0
        assert aux[name][~dead].abs().max() < 1e-12
        assert aux[name][dead].abs().amax() > 1e-4, name
    assert aux["b_dec"].abs().max() < 1e-12
    # Without the detach they would.
    leaky = gradients(p, dense_loss(p, x, 3, dead, 0.5, detach=False))
    assert (leaky["b_dec"] - plain["b_dec"]).abs().max() > 1e-4


def test_auxk_reads_at_most_512_dead_latents() -> None:
    p = parameters_for(3, 530)
    x = batch_for(2, 3)
    dead = torch.ones(530, dtype=torch.bool)
    with torch.no_grad():
        p["b_enc"] += 20.0  # all of them would be active
    loss = run(p, x, 1, dead, auxk=1.0)
    torch.testing.assert_close(loss.loss, dense_loss(p, x, 1, dead, 1.0))
    other = dense_loss(p, x, 1, dead, 1.0, k_aux=530)
    assert not torch.isclose(loss.loss, other)


def test_auxk_off_or_without_the_dead() -> None:
    p = parameters_for(4, 9)
    x = batch_for(5, 4)
    plain = run(p, x, 2).loss
    assert plain == run(p, x, 2, torch.zeros(9, dtype=torch.bool), 0.5).loss
    assert plain == run(p, x, 2, torch.ones(9, dtype=torch.bool), 0.0).loss


def test_auxk_of_very_many_dead_latents_takes_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameters_for(4, 30)
    x = batch_for(40, 4)
    dead = torch.arange(30) < 20
    monkeypatch.setattr(auxiliary_loss, "_AUX_ELEMENTS", 20 * 14)
    total = run(p, x, 2, dead, 0.5).loss
    # Rows 0, 3, 6, ... stand for all: 14 rows of 20 pre-activations.
    residual = x - sparse_decode(
        *encode_topk(x, p["W_enc_rows"], p["b_enc"], 2), p["W_dec"], p["b_dec"]
    )
    part, x_part = residual.detach()[::3], x[::3]
    assert len(part) == 14
    acts = torch.relu(x_part @ p["W_enc_rows"][:20].T + p["b_enc"][:20])  # all 20 are within k_aux
    expected = (acts @ p["W_dec"][:20] - part).pow(2).sum() / (part - part.mean(0)).pow(2).sum()
    torch.testing.assert_close(total, residual.pow(2).mean() + 0.5 * expected)


def test_filling_among_the_dead_takes_no_part() -> None:
    """A list whose length the host chose gives what the list of the dead alone gives."""
    p, x = parameters_for(6, 20), batch_for(12, 6)
    exact = TopK(3, 0.5).loss(p, x, x, DeadList(torch.tensor([3, 8, 11])))
    ids = torch.tensor([8, 0, 3, 19, 11])
    padded = TopK(3, 0.5).loss(p, x, x, DeadList(ids, (ids == 0) | (ids == 19)))
    torch.testing.assert_close(padded.loss, exact.loss)
    ours, wanted = own_gradients(p, padded), own_gradients(p, exact)
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name])


def test_nothing_of_batch_times_d_sae_is_made() -> None:
    """Neither dense activations nor their gradients, beyond a chunk of rows in the encoder."""
    rows, d_model, d_sae, k = 256, 8, 1024, 4
    p = parameters_for(d_model, d_sae)
    p = in_float32(p)
    x = batch_for(rows, d_model).float()
    dead = torch.arange(d_sae) < 16
    dense = 4 * rows * d_sae

    def largest(work: object) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            work()  # type: ignore[operator]
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest(lambda: torch.empty(rows, d_sae)) >= dense
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_encode, "CPU_CHUNK_BYTES", 0)
        patch.setattr(topk_encode, "CPU_CHUNK_ROWS", 16)
        patch.setattr(native, "_kept", threading.local())
        done = run(p, x, k, dead, auxk=0.5)
        assert largest(lambda: run(p, x, k, dead, auxk=0.5)) <= dense / 8
    assert largest(lambda: pass_gradients(done, d_sae)) <= 4 * 2 * d_sae * d_model


# --- start and scale


def test_initialisation_is_tied_normalised_and_seeded() -> None:
    cpu = torch.device("cpu")
    p = TopK(4).initialise(7, 7, 30, 3, cpu)
    assert torch.equal(p["W_enc_rows"], p["W_dec"])
    assert p["W_enc_rows"].data_ptr() != p["W_dec"].data_ptr(), "tied at the start only"
    torch.testing.assert_close(p["W_dec"].norm(dim=1), torch.ones(30))
    assert not p["b_enc"].any() and not p["b_dec"].any()
    assert all(q.dtype == torch.float32 for q in p.values())
    state = torch.get_rng_state()
    assert torch.equal(TopK(4).initialise(7, 7, 30, 3, cpu)["W_dec"], p["W_dec"])
    assert not torch.equal(TopK(4).initialise(7, 7, 30, 4, cpu)["W_dec"], p["W_dec"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaled_inputs_are_centred_and_of_unit_size(dtype: torch.dtype) -> None:
    rows = (batch_for(4000, 16) * torch.linspace(1, 9, 16) + 50).to(dtype)
    scale = InputScale.of(rows)
    x = scale.apply(rows)
    assert x.dtype == torch.float32
    # Rounding of the float32 mean of 50, in units of a.
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-5)
    assert float(x.norm(dim=1).mean()) == pytest.approx(4.0, rel=1e-5)  # sqrt(d_model)
    torch.testing.assert_close(scale.mean, rows.double().mean(dim=0))


def test_a_constant_input_has_a_scale() -> None:
    scale = InputScale.of(torch.ones(5, 3))
    assert torch.isfinite(scale.apply(torch.ones(2, 3))).all()


# --- the canonical form


def trained(d_model: int = 24, d_sae: int = 60) -> tuple[Parameters, InputScale, Tensor]:
    """Parameters as training leaves them (unit decoder rows), a scale, and raw activations."""
    p = parameters_for(d_model, d_sae)
    # Far from the origin and far from unit size, as residual streams are.
    raw = (batch_for(500, d_model) * 3 + 40 * torch.randn(d_model).double()).float()
    with torch.no_grad():
        p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
        p = in_float32(p, requires_grad=True)
    return p, InputScale.of(raw), raw


def in_training_units(p: Parameters, scale: InputScale, raw: Tensor) -> tuple[Tensor, Tensor]:
    acts, indices = encode_topk(scale.apply(raw), p["W_enc_rows"], p["b_enc"], 8)
    dense = torch.zeros(len(raw), len(p["b_enc"])).scatter(1, indices, acts)
    return dense.detach(), sparse_decode(acts, indices, p["W_dec"], p["b_dec"]).detach()


def test_the_fold_gives_the_same_latents_and_reconstruction_on_raw_activations() -> None:
    torch.manual_seed(0)
    p, scale, raw = trained()
    latents, reconstruction = in_training_units(p, scale, raw)
    tensors = TopK(8).canonical(p, [scale], [scale])
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())
    spec = SAESpec(architecture="topk", d_model=24, d_sae=60, k=8)
    sae = SAE(spec, **tensors).to(dtype=torch.float64)
    f = sae.encode(raw.double())
    # Latents in residual units: those of training divided by a.
    expected = latents.double() / scale.factor
    # Training computed x~ in float32 from inputs of size 200 with 24 bits: about 1e-5 each.
    assert float((f - expected).abs().max()) < 1e-4 * float(expected.max())
    assert ((f > 0) == (expected > 0)).float().mean() > 0.999
    raw_units = reconstruction.double() / scale.factor + scale.mean
    assert float((sae.decode(f) - raw_units).abs().max()) < 1e-4 * float(raw_units.abs().max())
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(60))
    assert torch.equal(tensors["W_enc"], p["W_enc_rows"].detach().T)


def test_sae_lens_reads_the_same_sae(tmp_path: Path) -> None:
    import sae_lens

    torch.manual_seed(0)
    p, scale, raw = trained()
    save_sae(
        tmp_path,
        SAESpec(architecture="topk", d_model=24, d_sae=60, k=8),
        **TopK(8).canonical(p, [scale], [scale]),
    )
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    latents, reconstruction = in_training_units(p, scale, raw)
    expected = latents / scale.factor
    f = theirs.encode(raw).detach()
    # On raw activations pre-acts are differences of numbers near 1,000 in float32: 1e-4 of them.
    assert float((f - expected).abs().max()) < 1e-3 * float(expected.max())
    raw_units = reconstruction / scale.factor + scale.mean.float()
    size = float((raw_units - scale.mean).abs().max())
    assert float((theirs.decode(f).detach() - raw_units).abs().max()) < 1e-3 * size
    torch.testing.assert_close(f, load_sae(tmp_path).encode(raw), rtol=1e-5, atol=1e-5)
