"""Transcoders and crosscoders: gradients, what is saved, and shards of several folders."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_json, write_json
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.training.architecture import gradients as pass_gradients
from saesteer.sae.training.architectures.crosscoder import Crosscoder
from saesteer.sae.training.architectures.transcoder import SkipTranscoder
from saesteer.sae.verbs.reproduce import reproduce
from saesteer.sae.verbs.train import train

from ...training_runs import CONFIG, D_MODEL, sparse_data, weights, write_shards
from .test_batchtopk import keep_batch

CPU = torch.device("cpu")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(2, 9),
    d_in=st.integers(1, 11),
    d_out=st.integers(1, 11),
    d_sae=st.integers(1, 17),
    share=st.floats(0.0, 1.0),
)
def test_loss_and_every_gradient_of_a_skip_transcoder(
    rows: int, d_in: int, d_out: int, d_sae: int, share: float
) -> None:
    """Input and target of different widths."""
    rng = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    k = 1 + round(share * (d_sae - 1))
    kind = SkipTranscoder(k)
    p = {
        name: draw(*shape).requires_grad_()
        for name, shape in kind.shapes(d_in, d_out, d_sae).items()
    }
    x, target = draw(rows, d_in), draw(rows, d_out)
    done = kind.loss(p, x, target, None)
    acts = keep_batch(x @ p["W_enc_rows"].T + p["b_enc"], rows * k)
    residual = target - acts @ p["W_dec"] - p["b_dec"] - x @ p["W_skip"].T
    loss = residual.square().mean()
    torch.testing.assert_close(done.loss, loss.detach())
    deviation = (target - target.mean(dim=0)).square().sum()
    torch.testing.assert_close(done.squared_deviation, deviation)
    wanted = dict(
        zip(p, torch.autograd.grad(loss, list(p.values()), allow_unused=True), strict=True)
    )
    found, _ = pass_gradients(done, d_sae)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        grad = torch.zeros_like(p[name]) if grad is None else grad
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10, msg=name)


def linear_pair(tokens: int, layer: int) -> Tensor:
    """Layer 5 is what layer 1 holds, turned and shifted, and sparse features of its own."""
    rows = sparse_data(tokens, 1)
    if layer == 1:
        return rows
    rng = torch.Generator().manual_seed(9)
    turned = rows @ torch.randn(D_MODEL, D_MODEL, generator=rng) / D_MODEL**0.5
    return 0.1 * turned + 7


def test_a_linear_path_takes_what_is_linear(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "acts", make_rows=linear_pair)
    config = replace(CONFIG, layers=(1,), to_layer=5, tokens=9600, lr=5e-3)
    runs = {}
    for arch in ("transcoder", "skip-transcoder"):
        (runs[arch],) = train(
            tmp_path / arch, replace(config, arch=arch), activations=shards, device="cpu"
        )
    assert runs["skip-transcoder"]["sae"]["fvu_heldout"] < 0.1
    assert runs["skip-transcoder"]["sae"]["fvu_heldout"] < runs["transcoder"]["sae"]["fvu_heldout"]
    sae = load_sae(tmp_path / "skip-transcoder")
    assert sae.W_skip is not None and sae.spec.architecture == "jumprelu" and sae.spec.is_transcoder
    assert sae.spec.metadata["hook_name_out"] == "blocks.5.hook_resid_post"
    assert read_json(tmp_path / "skip-transcoder" / "cfg.json")["architecture"] == (
        "jumprelu_skip_transcoder"
    )
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    reader = ShardReader(shards)
    x, y = (reader.shard(0, layer, "resid_post")[0].float() for layer in (1, 5))
    error = (y - sae.reconstruct(x)).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert float(error) == pytest.approx(runs["skip-transcoder"]["final"]["fvu"], rel=0.3)
    # The state opens as what was written.
    state = load_sae(tmp_path / "skip-transcoder" / "state").tensors()
    assert all(torch.equal(state[name], tensor) for name, tensor in sae.tensors().items())


def test_parts_of_a_crosscoder_start_alike() -> None:
    kind = Crosscoder(4).at_places((6, 6, 6), (6, 6, 6))
    made = kind.initialise(18, 18, 20, 3, CPU)
    one, two, three = made["W_dec"].split(6, dim=1)
    assert torch.equal(one, two) and torch.equal(two, three)
    torch.testing.assert_close(made["W_dec"].norm(dim=1), torch.ones(20))
    # Of models of different widths there is no such start.
    kind = Crosscoder(4).at_places((6, 9), (6, 9))
    made = kind.initialise(15, 15, 20, 3, CPU)
    torch.testing.assert_close(made["W_dec"].norm(dim=1), torch.ones(20))


def of_another_model(
    folder: Path, make_rows: Callable[[int, int], Tensor], name: str, shard_tokens: int = 1000
) -> Path:
    shards = write_shards(folder, (5,), shard_tokens=shard_tokens, make_rows=make_rows)
    manifest = read_json(shards / "manifest.json")
    manifest["model"] = {"name": name, "hash": f"hash of {name}"}
    write_json(shards / "manifest.json", manifest)
    return shards


def test_a_crosscoder_over_two_models(tmp_path: Path) -> None:
    """Trained, killed and gone on with is covered for all; here: what is written."""
    import sae_lens

    a = of_another_model(tmp_path / "a", lambda n, layer: sparse_data(n, 1), "base")
    b = of_another_model(tmp_path / "b", lambda n, layer: 3 * sparse_data(n, 1).flip(1), "tuned")
    config = replace(CONFIG, arch="crosscoder", tokens=4096, lr=5e-3)
    (run,) = train(tmp_path / "out", config, activations=[a, b], device="cpu")
    assert run["sae"]["places"] == [[5, "resid_post"], [5, "resid_post@2"]]
    assert run["recipe"]["activations"] == [str(a), str(b)]
    sae = load_sae(tmp_path / "out")
    parts = sae.spec.metadata["saesteer"]["crosscoder"]
    assert [part["model"]["hash"] for part in parts] == ["hash of base", "hash of tuned"]
    assert [part["hook_name"] for part in parts] == ["blocks.5.hook_resid_post"] * 2
    assert sae.spec.hook_name == "" and sae.spec.d_model == 2 * D_MODEL
    rows = torch.cat([ShardReader(place).shard(0)[0] for place in (a, b)], dim=1).float()
    assert run["sae"]["fvu_heldout"] < 0.7
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "out"))
    latents = sae.encode(rows)
    torch.testing.assert_close(
        theirs.encode(rows), latents, rtol=1e-4, atol=1e-5 * float(latents.abs().max())
    )


def test_a_transcoder_from_two_folders_is_the_one_from_one(shards: Path, tmp_path: Path) -> None:
    """Another folder for each place: the same bits. Repeated from its record, too."""
    one, two = (write_shards(tmp_path / str(layer), (layer,)) for layer in (1, 5))
    config = replace(CONFIG, arch="transcoder", layers=(1,), to_layer=5)
    train(tmp_path / "together", config, activations=shards, device="cpu")
    (run,) = train(tmp_path / "apart", config, activations=[one, two], device="cpu")
    assert (run["sae"]["layer"], run["sae"]["to_layer"]) == (1, 5)
    assert weights(tmp_path / "apart") == weights(tmp_path / "together")
    assert reproduce(tmp_path / "apart")["equal"]


def test_what_is_written_and_missing_is_named_as_asked(shards: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, arch="transcoder", layers=(1,), to_layer=4)
    with pytest.raises(UserError, match="asked: `to_layer` 4 .*: give `to_layer` and `site` from"):
        train(tmp_path / "out", config, activations=shards, device="cpu")
    with pytest.raises(UserError, match="`layer` 1 and `to_site` mlp_out.*: give `layer` and `to_"):
        there = replace(config, to_layer=None, to_site="mlp_out")
        train(tmp_path / "out", there, activations=shards, device="cpu")
    assert not (tmp_path / "out" / "run.json").exists()


def test_shards_of_other_tokens_are_refused(tmp_path: Path) -> None:
    a = of_another_model(tmp_path / "a", sparse_data, "base")
    b = of_another_model(tmp_path / "b", sparse_data, "tuned")
    config = replace(CONFIG, arch="crosscoder")
    with pytest.raises(UserError, match="both hold layer 5 resid_post of one model"):
        train(tmp_path / "out", config, activations=[a, a], device="cpu")
    from safetensors.torch import load_file, save_file

    path = b / "layer-5" / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["token_ids"][7] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"differ in their token_ids, first in row 7 of shard 1"):
        train(tmp_path / "out", config, activations=[a, b], device="cpu")
    shutil.rmtree(b)
    b = of_another_model(tmp_path / "b", sparse_data, "tuned", shard_tokens=700)
    with pytest.raises(UserError, match="must hold the same tokens"):
        train(tmp_path / "out", config, activations=[a, b], device="cpu")
    assert not (tmp_path / "out" / "run.json").exists()
