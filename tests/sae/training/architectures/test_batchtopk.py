"""BatchTopK against dense float64 mathematics; its threshold; a short run with its figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.files import read_json
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.batches import BatchStream, ShardSource
from saesteer.sae.training import architecture
from saesteer.sae.training.architecture import DeadList, Parameters
from saesteer.sae.training.architectures.batchtopk import BatchTopK
from saesteer.sae.verbs.train import train

from ...training_runs import CONFIG, weights
from ..dense_twins import batch_for, gradients, parameters_for, with_dense_auxk


def keep_batch(pre_acts: Tensor, count: int) -> Tensor:
    """The `count` largest positive entries of the whole matrix, the first of equals."""
    flat = pre_acts.flatten()
    chosen = flat.sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros_like(flat).scatter(0, chosen, 1.0).view(pre_acts.shape)
    return pre_acts.relu() * mask


def dense_loss(p: Parameters, x: Tensor, k: int, dead: Tensor, auxk: float) -> Tensor:
    pre_acts = x @ p["W_enc_rows"].T + p["b_enc"]
    acts = keep_batch(pre_acts, len(x) * k)
    residual = x - acts @ p["W_dec"] - p["b_dec"]
    total = residual.square().mean()
    return with_dense_auxk(total, p, pre_acts, residual, dead, auxk)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_model=st.integers(1, 11),
    d_sae=st.integers(1, 17),
    share=st.floats(0.0, 1.0),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.sampled_from([0.0, -3.0]),
)
def test_loss_and_every_gradient(
    rows: int, d_model: int, d_sae: int, share: float, dead_share: float, bias: float
) -> None:
    """Odd shapes, k from 1 to d_sae, and (bias -3) batches with fewer than B k positive ones."""
    k = 1 + round(share * (d_sae - 1))
    p = parameters_for(d_model, d_sae)
    p["b_enc"].data += bias
    x = batch_for(rows, d_model)
    dead = torch.rand(d_sae, generator=torch.Generator().manual_seed(2)) < dead_share
    done = BatchTopK(k, 0.25).loss(p, x, x, DeadList(dead.nonzero()[:, 0]))
    expected = dense_loss(p, x, k, dead, 0.25)
    # float64: only the order of additions differs.
    torch.testing.assert_close(done.loss, expected, rtol=1e-10, atol=1e-12)
    (found, counts), wanted = architecture.gradients(done, d_sae), gradients(p, expected)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-10, msg=name)
    acts = keep_batch(x @ p["W_enc_rows"].T + p["b_enc"], rows * k)
    assert torch.equal(counts, (acts > 0).sum(dim=0))
    positive = acts[acts > 0]
    least = positive.min() if len(positive) else torch.tensor(torch.inf).double()
    torch.testing.assert_close(done.measured["least"], least.detach())


def test_the_threshold_is_an_average_without_bias_from_the_first_step() -> None:
    kind, cpu = BatchTopK(2), torch.device("cpu")
    p, x = parameters_for(5, 12), batch_for(9, 5)
    buffers = kind.buffers(12, cpu)
    seen: list[float] = []
    for step in range(5):
        passes = [kind.loss(p, part * (1 + step), part, None) for part in x.split([6, 3])]
        seen.append(sum(float(done.measured["least"]) for done in passes) / 2)
        kind.update_buffers(buffers, passes)
        shares = torch.tensor([0.95 ** (step - i) for i in range(step + 1)], dtype=torch.float64)
        expected = float((shares * torch.tensor(seen).double()).sum() / shares.sum())
        assert buffers["threshold"].tolist() == pytest.approx([expected] * 12)
    before = buffers["threshold"].clone()
    p["b_enc"].data -= 1000  # nothing is positive: nothing to learn
    kind.update_buffers(buffers, [kind.loss(p, x, x, None)])
    assert torch.equal(buffers["threshold"], before)


def test_calibration_gives_k_latents_on_average() -> None:
    kind = BatchTopK(3)
    p = {name: q.detach().float() for name, q in parameters_for(6, 40).items()}
    x = batch_for(70, 6).float()
    buffers = kind.buffers(40, torch.device("cpu"))
    buffers["threshold"].fill_(0.5)
    found = kind.calibrate(p, buffers, x)
    pre_acts = x @ p["W_enc_rows"].T + p["b_enc"]
    assert found["held_out_l0"] == 3 == float((pre_acts > buffers["threshold"]).sum() / 70)
    assert found["held_out_l0_of_average"] == pytest.approx(float((pre_acts > 0.5).sum() / 70))
    assert found["threshold_average"] == 0.5 != found["threshold"]
    p["b_enc"] -= 1000
    before = buffers["threshold"].clone()
    assert kind.calibrate(p, buffers, x)["held_out_l0"] == 0
    assert torch.equal(buffers["threshold"], before)


def test_a_short_run_and_what_it_writes(shards: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, arch="batchtopk", layers=(1,), tokens=3072, lr=5e-3)
    (run,) = train(tmp_path / "one", config, activations=shards, device="cpu")
    final = run["final"]
    # Measured .390 and 4.000; other sums of float32 move the third digit.
    assert final["fvu"] == pytest.approx(0.390, rel=0.1)
    assert final["l0"] == pytest.approx(4, rel=1e-3)
    assert final["held_out_rows"] == 154 and final["held_out_l0"] == 4
    assert final["held_out_l0_of_average"] == pytest.approx(4, rel=0.25)
    sae = load_sae(tmp_path / "one")
    assert sae.spec.architecture == "jumprelu" and sae.spec.k is None
    metadata = read_json(tmp_path / "one" / "cfg.json")["metadata"]
    assert metadata["training_architecture"] == "batchtopk" and metadata["k"] == 4
    assert sae.threshold is not None and float(sae.threshold.min()) > 0
    torch.testing.assert_close(
        sae.threshold * metadata["saesteer"]["input_scale"],
        torch.full((48,), final["threshold"]),
    )
    # On rows of the data, with everything folded, as many latents are active.
    reader = ShardReader(shards)
    rows = torch.cat([reader.shard(i, 1, "resid_post")[0] for i in range(len(reader))]).float()
    # The threshold was set on 154 rows or fewer, whose mean is off by some hundredths.
    assert float((sae.encode(rows) > 0).sum() / len(rows)) == pytest.approx(4, rel=0.2)
    # The last state holds the calibrated threshold; a run gone on with at its end keeps it.
    state = load_sae(tmp_path / "one" / "state").tensors()
    assert all(torch.equal(state[name], tensor) for name, tensor in sae.tensors().items())
    before = weights(tmp_path / "one")
    (again,) = train(tmp_path / "one", config, activations=shards, device="cpu", resume=True)
    assert weights(tmp_path / "one") == before and again["final"] == final


@pytest.mark.parametrize("changes", [{"clip_norm": 1.0}, {"micro_batch_tokens": 20}], ids=str)
def test_whole_gradients_train_it_too(
    changes: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, arch="batchtopk", layers=(1,), lr=5e-3, **changes)
    (run,) = train(tmp_path / "one", config, activations=shards, device="cpu")
    assert run["final"]["fvu"] < 0.5 and run["final"]["held_out_l0"] == 4


def test_without_rows_after_those_of_training_the_average_stays(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardSource, "held_out", lambda self: None)
    monkeypatch.setattr(BatchStream, "rows_after", lambda self, count: self.buffer.rows[:0])
    config = replace(CONFIG, arch="batchtopk", layers=(1,), lr=5e-3)
    (run,) = train(tmp_path / "one", config, activations=shards, device="cpu")
    assert run["final"]["held_out_rows"] == 0 and "held_out_l0" not in run["final"]
    threshold = load_sae(tmp_path / "one").threshold
    assert threshold is not None and float(threshold.min()) > 0
