"""Values that can never work are refused with the flag's name; the defaults work."""

import subprocess
import sys
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import (
    HarvestConfig,
    JumpReLUConfig,
    MetricsConfig,
    TextConfig,
    TrainConfig,
    default_lr,
)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TextConfig, {"data": ()}, "`data` needs at least one corpus"),
        (TextConfig, {"context": 1}, "`context` must be at least 2, got 1"),
        (TextConfig, {"batch_size": -1}, "`batch_size` must be at least 1, or auto"),
        (TextConfig, {"epochs": 0}, "`epochs` must be at least 1"),
        (TextConfig, {"replies_share": 0.0}, "`replies_share` must be between 0 and 1"),
        (TextConfig, {"replies_share": 1.0}, "`replies_share` must be between 0 and 1"),
        (TextConfig, {"max_norm_ratio": 1.0}, "`max_norm_ratio` must be above 1"),
        (TextConfig, {"max_norm_ratio": float("nan")}, "`max_norm_ratio` must be above 1"),
        (HarvestConfig, {"layers": ()}, "`layer` needs at least one"),
        (HarvestConfig, {"layers": (2, 2)}, "`layer` names a block twice: 2,2"),
        (HarvestConfig, {"layers": (2,), "tokens": 0}, "`tokens` must be at least 1"),
        (HarvestConfig, {"layers": (2,), "shard_tokens": 0}, "`shard_tokens` must be"),
        (HarvestConfig, {"layers": (2,), "store_dtype": "int8"}, "`store_dtype` must be bfloat16"),
        (TrainConfig, {"arch": "lista"}, "`arch` must be one of topk, abstopk, batchtopk"),
        (TrainConfig, {"init_seed": ()}, "`init_seed` needs at least one value"),
        (TrainConfig, {"l0": (0.0,)}, "`l0` must be above 0, got 0"),
        (TrainConfig, {"coefficient": 0.0}, "`coefficient` must be above 0, got 0"),
        (TrainConfig, {"sparsity_warmup_steps": -1}, "`sparsity_warmup_steps` must be at least 0"),
        (TrainConfig, {"beta1": 1.0}, "`beta1` must be in 0..1, got 1.0"),
        (JumpReLUConfig, {"penalty": "l2"}, "`penalty` must be one of quadratic, .*, got l2"),
        (JumpReLUConfig, {"units": "cm"}, "`units` must be sqrt_d or unit, got 'cm'"),
        (JumpReLUConfig, {"bandwidth": 0.0}, "`bandwidth` must be above 0, got 0"),
        (JumpReLUConfig, {"frequency_knee": 0.0}, "`frequency_knee` must be above 0, got 0"),
        (JumpReLUConfig, {"threshold": -1.0}, "`threshold` must be above 0, got -1"),
        (JumpReLUConfig, {"pre_act_loss": -1.0}, "`pre_act_loss` must be at least 0"),
        (JumpReLUConfig, {"frequency": -1.0}, "`frequency` must be at least 0"),
        (TrainConfig, {"k": (0,)}, "`k` must be at least 1, got 0"),
        (TrainConfig, {"k": (8, 8)}, "`k` names a value twice: 8,8"),
        (TrainConfig, {"init_seed": (1, 2, 1)}, "`init_seed` names a value twice: 1,2,1"),
        (TrainConfig, {"layers": (1, 1)}, "`layer` names a value twice: 1,1"),
        (TrainConfig, {"d_sae": (64, 64)}, "`d_sae` names a value twice"),
        (TrainConfig, {"tokens": 4095}, r"`tokens` must be at least twice `batch_tokens` \(2048\)"),
        (TrainConfig, {"batch_tokens": 1}, "`batch_tokens` must be at least 2"),
        (TrainConfig, {"buffer_tokens": 2047}, r"at least `batch_tokens` \(2048\), got 2047"),
        (TrainConfig, {"lr": 0.0}, "`lr` must be between 0 and 1"),
        (TrainConfig, {"lr": float("nan")}, "`lr` must be between 0 and 1"),
        (TrainConfig, {"warmup_steps": -1}, "`warmup_steps` must be at least 0"),
        (TrainConfig, {"decay_share": 1.5}, "`decay_share` must be in 0..1"),
        (TrainConfig, {"auxk": -1.0}, "`auxk` must be at least 0"),
        (TrainConfig, {"dead_after_tokens": 0}, "`dead_after_tokens` must be at least 1"),
        (TrainConfig, {"checkpoint_every": 0}, "`checkpoint_every` must be at least 1"),
        (MetricsConfig, {"tokens": 1}, "`tokens` must be at least 2"),
        (MetricsConfig, {"bootstrap": 0}, "`bootstrap` must be at least 1"),
    ],
)
def test_impossible_values(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


def test_derived_numbers() -> None:
    config = TrainConfig(tokens=1_000_000, batch_tokens=2048)
    assert (config.steps, config.resolved_warmup_steps) == (488, 24)
    assert config.resolved_dead_after_tokens == 250_000
    long = TrainConfig(tokens=1_000_000_000)
    assert long.resolved_warmup_steps == 1000
    assert long.resolved_dead_after_tokens == 10_000_000
    own = TrainConfig(warmup_steps=0, dead_after_tokens=7)
    assert (own.resolved_warmup_steps, own.resolved_dead_after_tokens) == (0, 7)


def test_default_learning_rate() -> None:
    # Long runs: the rule of Gao et al., whatever d_model is.
    assert default_lr(2048, 2**14, 10**6) == default_lr(4096, 2**14, 10**7) == 2e-4
    assert default_lr(2048, 2**16, 10**6) == 1e-4
    # Shorter ones: what docs/quality.md measures, whatever d_sae is, and no more below 64 steps.
    assert default_lr(576, 4608, 256) == default_lr(576, 9216, 256) == pytest.approx(6e-3, rel=0.01)
    assert default_lr(576, 4608, 1024) == pytest.approx(3e-3, rel=0.01)
    assert default_lr(64, 64, 2) == default_lr(64, 64, 64) == pytest.approx(2.3 / 64)
    # The two meet, and the rate never rises with the number of steps.
    rates = [default_lr(576, 4608, 2**n) for n in range(24)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == default_lr(576, 4608, 2**30)


def test_configs_and_the_package_load_without_torch() -> None:
    code = (
        "import sys, saesteer.sae, saesteer.sae.config as c; c.TrainConfig(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_public_calls() -> None:
    import saesteer.sae as room

    for name in ("harvest", "train", "metrics", "doctor", "generate", "load_model", "wrap_model"):
        assert callable(getattr(room, name)), name
    with pytest.raises(AttributeError, match="no attribute 'reap'"):
        _ = room.reap
