"""An SAE as the start of a training: the same function in new units, or a refusal."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import read_json
from saesteer.checkpoints.folds import fold_centred_scale, unfold_centred_scale
from saesteer.checkpoints.sae_file import load_sae, save_sae
from saesteer.sae.config import TrainConfig
from saesteer.sae.verbs.reproduce import reproduce
from saesteer.sae.verbs.train import train

from ..training_runs import CONFIG, D_MODEL, TOKENS, dies_at, sparse_data, weights

LONG = replace(CONFIG, layers=(1,), tokens=16_384)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "sae"
    train(folder, LONG, activations=shards, device="cpu")
    return folder


def test_the_units_of_training_and_back() -> None:
    rng = torch.Generator().manual_seed(0)
    raw = {
        "W_enc": torch.randn(5, 7, generator=rng), "b_enc": torch.randn(7, generator=rng),
        "W_dec": torch.randn(7, 5, generator=rng), "b_dec": torch.randn(5, generator=rng),
        "threshold": torch.rand(7, generator=rng),
    }  # fmt: skip
    mean, factor = 30 * torch.randn(5, generator=rng).double(), 0.3
    inner = unfold_centred_scale(raw, mean, factor)
    assert torch.allclose(inner.pop("log_threshold").exp(), inner["threshold"])
    back = fold_centred_scale(inner, [(mean, factor)], [(mean, factor)])
    for name, values in raw.items():
        # Float32 on both ways, with a shift of 30 in between.
        torch.testing.assert_close(back[name], values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_training_goes_on_where_the_sae_is(arch: str, shards: Path, tmp_path: Path) -> None:
    own = {"l0": (4.0,), "k": TrainConfig().k} if arch == "jumprelu" else {}
    config = replace(LONG, arch=arch, **own)
    train(tmp_path / "sae", config, activations=shards, device="cpu")
    still = replace(config, tokens=128, lr=1e-12, init_from=str(tmp_path / "sae"))
    train(tmp_path / "on", still, activations=shards, device="cpu")
    before, after = load_sae(tmp_path / "sae"), load_sae(tmp_path / "on")
    x = sparse_data(TOKENS, 1)[:500]
    size = float(before.reconstruct(x).abs().max())
    # Rows are 1,000 long; a step of 1e-12 moves nothing. (BatchTopK's threshold is set anew.)
    torch.testing.assert_close(after.W_dec, before.W_dec, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.pre_acts(x), before.pre_acts(x), rtol=1e-4, atol=1e-5 * size)


def test_it_is_recorded_resumed_and_repeated(trained: Path, shards: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, layers=(1,), d_sae=(), init_from=str(trained))
    (run,) = train(tmp_path / "on", config, activations=shards, device="cpu")
    before = read_json(trained / "run.json")
    assert run["recipe"]["init_from"] == {
        "source": str(trained), "sha256": before["sae"]["sha256"],
    }  # fmt: skip
    (scratch,) = train(tmp_path / "new", replace(config, init_from=None, d_sae=(48,)),
                       activations=shards, device="cpu")  # fmt: skip
    assert run["final"]["fvu"] < scratch["final"]["fvu"], "it did not begin again"
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "cut", config, activations=shards, device="cpu", progress=dies_at(1024))
    train(tmp_path / "cut", config, activations=shards, device="cpu", resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "on")
    assert reproduce(tmp_path / "on")["equal"]


def test_what_cannot_be_the_start(trained: Path, shards: Path, tmp_path: Path) -> None:
    def start(**changes: object) -> None:
        config = replace(CONFIG, **{"layers": (1,), "init_from": str(trained), **changes})
        train(tmp_path / "x", config, activations=shards, device="cpu")

    with pytest.raises(UsageError, match="has 48 latents, and `d_sae` is 64"):
        start(d_sae=(64,))
    with pytest.raises(UsageError, match="trained with `arch` topk, and `arch` is batchtopk"):
        start(arch="batchtopk")
    with pytest.raises(UsageError, match="starts one SAE, and these settings make 2"):
        start(init_seed=(0, 1))
    with pytest.raises(UserError, match=r"does not reconstruct .* layer 5 resid_post \(FVU"):
        start(layers=(5,))
    narrow = replace(load_sae(trained).spec, d_model=D_MODEL // 2)
    half = {"W_enc": torch.ones(8, 48), "W_dec": torch.eye(8).repeat(6, 1)}
    save_sae(tmp_path / "half", narrow, b_enc=torch.zeros(48), b_dec=torch.zeros(8), **half)
    with pytest.raises(UserError, match="reads 8 numbers, the activations have 16"):
        start(init_from=str(tmp_path / "half"))
    with pytest.raises(UserError, match="does not exist"):
        start(init_from=str(tmp_path / "nothing"))


def test_other_settings_are_said(trained: Path, shards: Path, tmp_path: Path) -> None:
    warned: list[str] = []
    config = replace(CONFIG, layers=(1,), k=(8,), init_from=str(trained))
    train(tmp_path / "x", config, activations=shards, device="cpu", warn=warned.append)
    assert f"`init_from` {trained} goes on with other settings: k 4 before, 8 now" in warned
