"""Matryoshka BatchTopK against dense float64 mathematics; a short run with its figures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import read_json
from saesteer.checkpoints.sae_file import load_sae
from saesteer.sae.training import architecture
from saesteer.sae.training.architecture import DeadList, Parameters
from saesteer.sae.training.architectures.batchtopk import BatchTopK
from saesteer.sae.training.architectures.matryoshka import Matryoshka
from saesteer.sae.training.pairs import cut_at
from saesteer.sae.verbs.train import train

from ...training_runs import CONFIG
from ..dense_twins import batch_for, gradients, parameters_for, with_dense_auxk
from .test_batchtopk import keep_batch


def dense_loss(
    p: Parameters, x: Tensor, k: int, ends: tuple[int, ...], dead: Tensor, auxk: float
) -> tuple[Tensor, Tensor]:
    """The loss, and the squared error of the last level."""
    pre_acts = x @ p["W_enc_rows"].T + p["b_enc"]
    acts = keep_batch(pre_acts, len(x) * k)
    total = torch.zeros((), dtype=x.dtype)
    for end in ends:
        residual = x - acts[:, :end] @ p["W_dec"][:end] - p["b_dec"]
        total = total + residual.square().mean() / len(ends)
    squared = residual.square().sum()
    return with_dense_auxk(total, p, pre_acts, residual, dead, auxk), squared


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_model=st.integers(1, 11),
    inner=st.sets(st.integers(1, 16), max_size=5),
    share=st.floats(0.0, 1.0),
    dead_share=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.sampled_from([0.0, -3.0]),
)
def test_loss_and_every_gradient(
    rows: int, d_model: int, inner: set[int], share: float, dead_share: float, bias: float
) -> None:
    """Odd shapes and prefixes, empty ones among them; k from 1 to d_sae."""
    ends = (*sorted(inner), 17)
    k = 1 + round(share * 16)
    p = parameters_for(d_model, 17)
    p["b_enc"].data += bias
    x = batch_for(rows, d_model)
    dead = torch.rand(17, generator=torch.Generator().manual_seed(2)) < dead_share
    done = Matryoshka(k, 0.25, ends).loss(p, x, x, DeadList(dead.nonzero()[:, 0]))
    expected, squared = dense_loss(p, x, k, ends, dead, 0.25)
    # float64: only the order of additions differs.
    torch.testing.assert_close(done.loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(done.squared_error, squared)
    (found, counts), wanted = architecture.gradients(done, 17), gradients(p, expected)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-10, msg=name)
    acts = keep_batch(x @ p["W_enc_rows"].T + p["b_enc"], rows * k)
    assert torch.equal(counts, (acts > 0).sum(dim=0)) and done.examples == rows


def test_one_prefix_is_batchtopk() -> None:
    p, x = parameters_for(5, 12), batch_for(9, 5)
    one, plain = Matryoshka(3, 0.0, (12,)).loss(p, x, x, None), BatchTopK(3).loss(p, x, x, None)
    torch.testing.assert_close(one.loss, plain.loss)
    mine, theirs = architecture.gradients(one, 12)[0], architecture.gradients(plain, 12)[0]
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, msg=name)


def test_pieces_of_examples() -> None:
    indices = torch.tensor([0, 3, 4, 9, 2, 3, 5])
    starts = torch.tensor([0, 4, 4, 7])
    pieces = cut_at(indices, starts, (3, 4, 10))
    assert pieces.tolist() == [0, 1, 2, 4, 4, 4, 4, 5, 6, 7]
    assert cut_at(indices[:0], torch.tensor([0]), (3, 10)).tolist() == [0]


def test_prefixes_by_default_and_wrong_ones() -> None:
    (kind,) = Matryoshka.from_config(replace(CONFIG, arch="matryoshka"))
    assert kind.at_width(4608).settings["prefixes"] == [144, 432, 1008, 2160, 4608]
    assert kind.at_width(4).settings["prefixes"] == [1, 2, 4]
    with pytest.raises(UsageError, match=r"`prefixes` must end at `d_sae` \(48\), got 8,40"):
        Matryoshka(3, 0.0, (8, 40)).check(48)


def test_a_short_run_and_what_it_writes(shards: Path, tmp_path: Path) -> None:
    config = replace(
        CONFIG, arch="matryoshka", layers=(1,), tokens=3072, lr=5e-3, prefixes=(12, 24, 48)
    )
    (run,) = train(tmp_path / "one", config, activations=shards, device="cpu")
    final = run["final"]
    # Measured .356; other sums of float32 move the third digit.
    assert final["fvu"] == pytest.approx(0.356, rel=0.1)
    assert final["l0"] == pytest.approx(4, rel=1e-3) and final["held_out_l0"] == 4
    assert load_sae(tmp_path / "one").spec.architecture == "jumprelu"
    metadata = read_json(tmp_path / "one" / "cfg.json")["metadata"]
    assert metadata["training_architecture"] == "matryoshka_batchtopk"
    details = metadata["training_architecture_details"]
    assert details == {"k": 4, "matryoshka_widths": [12, 24, 48]}
    assert run["sae"]["prefixes"] == [12, 24, 48] and metadata["k"] == 4
