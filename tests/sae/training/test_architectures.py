"""What every architecture owes the trainer; one made up here and one that reads two places."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import read_json
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.shards import ShardReader
from saesteer.kernels.ops import decode_mse, sort_indices
from saesteer.sae.config import TrainConfig
from saesteer.sae.training import architectures
from saesteer.sae.training.architecture import DeadList, EntrySum, Parameters, Pass, gradients
from saesteer.sae.training.architectures import ARCHITECTURES, architecture_named, check_settings
from saesteer.sae.training.architectures.topk import TopK
from saesteer.sae.training.input_scale import InputScale, PlacedRows
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.sae_trainer import SAETrainer, Variant
from saesteer.sae.verbs.reproduce import reproduce
from saesteer.sae.verbs.train import train

from ..training_runs import CONFIG, D_MODEL, all_metrics, dies_at, sparse_data, weights

CPU = torch.device("cpu")

NAMES = sorted(ARCHITECTURES)


OF_L0 = ("jumprelu", "gemma-scope-2", "standard", "gated")


def settings_for(name: str, *values: int) -> TrainConfig:
    """Small settings with these numbers of active latents, for the shards of two layers."""
    config = replace(CONFIG, arch=name, layers=(1, 5) if name == "crosscoder" else (1,))
    if name.endswith("transcoder"):
        config = replace(config, to_layer=5)
    if name in OF_L0:
        return replace(config, k=(), l0=tuple(map(float, values)))
    return replace(config, k=values)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_with_the_shapes_that_it_names(name: str) -> None:
    for architecture in architecture_named(name).from_config(settings_for(name, 4)):
        assert architecture.name == name
        for d_in, d_out in ((6, 6), (6, 9)):
            shapes = architecture.shapes(d_in, d_out, 20)
            made = architecture.initialise(d_in, d_out, 20, 1, CPU)
            assert {n: tuple(p.shape) for n, p in made.items()} == shapes
            assert architecture.unit_rows | architecture.canonical_names.keys() <= shapes.keys()
            for matrix in architecture.unit_rows:
                torch.testing.assert_close(made[matrix].norm(dim=1), torch.ones(20))
            assert architecture.parameter_count(d_in, d_out, 20) == sum(
                p.numel() for p in made.values()
            )


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_resumes_and_repeats_to_the_bit(name: str, shards: Path, tmp_path: Path) -> None:
    """From shards, two SAEs of two settings in one run; killed halfway and gone on with."""
    config = settings_for(name, 3, 4)
    runs = train(tmp_path / "whole", config, activations=shards, device="cpu")
    assert len(runs) == 2
    for run in runs:
        log = all_metrics(Path(run["folder"]))["."]
        assert log[-1]["fvu"] < log[0]["fvu"], "it learns"
        assert read_json(Path(run["folder"]) / "run.json")["config"]["arch"] == name
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "out", config, activations=shards, device="cpu", progress=dies_at(1024))
    half = load_sae(tmp_path / "out" / "state" / Path(runs[0]["folder"]).name)
    assert half.spec.architecture == load_sae(runs[0]["folder"]).spec.architecture
    train(tmp_path / "out", config, activations=shards, device="cpu", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert all_metrics(tmp_path / "out") == all_metrics(tmp_path / "whole")
    assert reproduce(tmp_path / "whole")["equal"]


@pytest.mark.parametrize("name", NAMES)
def test_sae_lens_opens_it_with_the_same_latents(name: str, shards: Path, tmp_path: Path) -> None:
    import sae_lens

    config = settings_for(name, 4)
    train(tmp_path, config, activations=shards, device="cpu")
    theirs, ours = sae_lens.SAE.load_from_disk(str(tmp_path)), load_sae(tmp_path)
    parts = [ShardReader(shards).shard(0, layer, "resid_post")[0] for layer in config.layers]
    rows = torch.cat(parts, dim=1)[:200].float()
    latents = ours.encode(rows)
    # Pre-activations are differences of numbers near 1,000 in float32: 1e-4 of them.
    size = float(latents.abs().max())
    torch.testing.assert_close(theirs.encode(rows), latents, rtol=1e-4, atol=1e-5 * size)
    # A skip connection is a part of forward, not of decode.
    torch.testing.assert_close(
        theirs(rows), ours.reconstruct(rows), rtol=1e-4, atol=1e-4 * float(rows.abs().max())
    )
    assert (latents < 0).any() == (name == "abstopk")


def test_settings_that_do_not_fit_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = TrainConfig(d_sae=(64, 16), k=(8, 32))
    with pytest.raises(UsageError, match=r"`d_sae` must be at least `k` \(32\), got 16"):
        check_settings(config)
    with pytest.raises(UsageError, match="`d_sae` must be at least `k`"):
        train(tmp_path / "sae", config, activations=tmp_path / "nothing")
    assert not (tmp_path / "sae").exists()
    names = ", ".join(ARCHITECTURES)
    with pytest.raises(UsageError, match=f"`arch` must be one of {names}, got 'softmax'"):
        architecture_named("softmax")
    with pytest.raises(UsageError, match="`arch` relu is called standard here"):
        architecture_named("relu")


@dataclass(frozen=True)
class HalvedTopK(TopK):
    """Made up: activations are halved."""

    name: ClassVar[str] = "halved"

    def encode(self, parameters: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
        halved = {**parameters, "b_enc": 0.5 * parameters["b_enc"]}
        halved["W_enc_rows"] = 0.5 * parameters["W_enc_rows"]
        return super().encode(halved, x)

    def spec(self) -> dict[str, object]:
        return {"architecture": "topk", "k": self.k}


def test_a_new_architecture_is_one_class_and_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "halved", "halved.HalvedTopK")
    monkeypatch.setattr(
        architectures, "import_module", lambda name: __import__("sys").modules[__name__]
    )
    (run,) = train(
        tmp_path, replace(CONFIG, arch="halved", layers=(1,)), activations=shards, device="cpu"
    )
    assert run["final"]["fvu"] < 1 and load_sae(tmp_path).spec.k == 4


@dataclass(frozen=True)
class AboveZero(TopK):
    """Made up: every positive pre-activation counts, more for one example than for another."""

    name: ClassVar[str] = "above-zero"

    @torch.no_grad()
    def loss(
        self,
        parameters: Parameters,
        x: Tensor,
        target: Tensor,
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        pre_acts = x @ parameters["W_enc_rows"].T + parameters["b_enc"]
        examples, indices = (pre_acts > 0).nonzero(as_tuple=True)
        starts = torch.searchsorted(examples, torch.arange(len(x) + 1))
        acts = pre_acts[examples, indices]
        W_dec, b_dec = parameters["W_dec"], parameters["b_dec"]
        squared, error, act_grads = decode_mse(acts, indices, W_dec, b_dec, target, starts)
        factor = 2 / target.numel()
        return Pass(
            loss=squared.sum() / target.numel(),
            squared_error=squared.sum(),
            squared_deviation=target.square().sum(),
            examples=len(x),
            latent_acts=acts,
            latent_indices=indices,
            order=sort_indices(indices, len(W_dec), starts),
            decoder=EntrySum(acts, error),
            encoder=EntrySum(act_grads, x),
            factor=factor,
            row_starts=starts,
            dense={"b_dec": error.sum(dim=0) * factor},
        )


def test_examples_may_have_different_numbers_of_latents() -> None:
    """Ragged entries: gradients against autograd, and the same steps on both paths."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(12, 6, generator=rng, dtype=torch.float64)
    p = {
        name: torch.randn(*shape, generator=rng, dtype=torch.float64)
        for name, shape in AboveZero(1).shapes(6, 6, 20).items()
    }
    done = AboveZero(1).loss(p, x, x, None)
    assert len(set(done.row_starts.diff().tolist())) > 3
    own = {name: q.clone().requires_grad_() for name, q in p.items()}
    acts = torch.relu(x @ own["W_enc_rows"].T + own["b_enc"])
    loss = (x - acts @ own["W_dec"] - own["b_dec"]).square().mean()
    torch.testing.assert_close(done.loss, loss.detach())
    found, counts = gradients(done, 20)
    wanted = torch.autograd.grad(loss, list(own.values()))
    for name, grad in zip(own, wanted, strict=True):
        torch.testing.assert_close(found[name], grad, msg=name)
    assert torch.equal(counts, (acts > 0).sum(dim=0))

    place, rows = (1, "resid_post"), sparse_data(640, 1)
    ends = []
    for clip_norm in (None, 1e9):
        variant = Variant((place,), (place,), 48, AboveZero(1), 0)
        config = replace(CONFIG, clip_norm=clip_norm, auxk=0.0)
        trainer = SAETrainer(variant, config, {place: InputScale.of(rows)}, CPU)
        for batch in rows.split(64):
            passes = trainer.forward(PlacedRows(batch, {place: slice(0, D_MODEL)}))
            trainer.step(passes)
        ends.append((trainer.parameters, trainer.take_log()))
    assert ends[0][1]["l0"] == pytest.approx(ends[1][1]["l0"], rel=1e-3) and ends[0][1]["l0"] > 5
    for name, parameter in ends[0][0].items():
        torch.testing.assert_close(parameter, ends[1][0][name], rtol=1e-3, atol=1e-4)


# --- several places


def test_input_and_target_may_differ_in_place_and_width() -> None:
    """Every gradient against autograd, in float64, where 5 columns are read and 8 are written."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x, target = draw(12, 5), draw(12, 8)
    p = {"W_enc_rows": draw(20, 5), "W_dec": draw(20, 8), "b_enc": draw(20), "b_dec": draw(8)}
    done = TopK(3).loss(p, x, target, None)
    own = {name: q.clone().requires_grad_() for name, q in p.items()}
    pre_acts = x @ own["W_enc_rows"].T + own["b_enc"]
    best, chosen = pre_acts.topk(3, dim=1)
    acts = torch.zeros_like(pre_acts).scatter(1, chosen, best.relu())
    loss = (target - acts @ own["W_dec"] - own["b_dec"]).square().mean()
    torch.testing.assert_close(done.loss, loss.detach())
    wanted = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    found, _ = gradients(done, 20)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=name)
    deviation = (target - target.mean(dim=0)).square().sum()
    torch.testing.assert_close(done.squared_deviation, deviation)


@pytest.mark.parametrize("clip_norm", [None, 1e9], ids=["from entries", "from gradients"])
def test_an_sae_of_two_places_on_raw_activations(clip_norm: float | None) -> None:
    """It reads two places and writes one of them and a third; the fold gives the same function."""
    a, b, c = (1, "resid_post"), (5, "resid_post"), (6, "mlp_out")
    data = {a: sparse_data(640, 1), b: 0.1 * sparse_data(640, 5), c: 3 * sparse_data(640, 6)}
    scales = {place: InputScale.of(rows) for place, rows in data.items()}
    variant = Variant((a, b), (b, c), 48, TopK(4), 0)
    name = "layer-1+layer-5-to-layer-5+layer-6-mlp_out_dsae-48_k-4_seed-0"
    assert variant.folder == name
    config = replace(CONFIG, clip_norm=clip_norm, tokens=640 * 4, lr=0.01)
    trainer = SAETrainer(variant, config, scales, CPU)
    columns = PlacedRows.columns_of([a, b, c], D_MODEL)
    rows = torch.cat(list(data.values()), dim=1)
    losses = []
    for _ in range(4):
        for at in range(0, 640, 64):
            passes = trainer.forward(PlacedRows(rows[at : at + 64], columns))
            trainer.step(passes)
            losses.append(float(passes[0].loss))
    assert losses[-1] < 0.7 * losses[0]
    x, target = trainer._scaled(data, torch.float32)
    acts, indices = trainer.architecture.encode(trainer.parameters, x)
    wide = TopK(4).canonical(trainer.parameters, trainer.read, trainer.write)
    # Rows have length 1 where the first of them is written.
    torch.testing.assert_close(wide["W_dec"][:, :D_MODEL], trainer.parameters["W_dec"][:, :D_MODEL])
    raw = torch.cat([data[a], data[b]], dim=1).double()
    pre_acts = raw @ wide["W_enc"].double() + wide["b_enc"]
    latents = pre_acts.gather(1, indices).relu()
    # Latents are in units of the first place written.
    expected = acts.double() / scales[b].factor
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
    dense = torch.zeros(640, 48, dtype=torch.float64).scatter(1, indices, latents)
    decoded = dense @ wide["W_dec"].double() + wide["b_dec"]
    parts = trainer.parameters["W_dec"][indices] * acts[:, :, None]
    inside = parts.sum(dim=1) + trainer.parameters["b_dec"]
    for place, columns in ((b, slice(0, D_MODEL)), (c, slice(D_MODEL, 2 * D_MODEL))):
        back = inside[:, columns].double() / scales[place].factor + scales[place].mean
        torch.testing.assert_close(
            decoded[:, columns], back, rtol=1e-3, atol=1e-3 * float(back.abs().max())
        )
    assert target.shape == (640, 2 * D_MODEL)
