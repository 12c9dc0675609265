"""The formula of memory and bytes; real processes are in `test_several_processes.py`."""

from dataclasses import replace

import pytest

from saesteer.sae.config import TrainConfig
from saesteer.sae.runs.mesh_cost import MeshCost, h100_step_seconds, mesh_cost
from saesteer.sae.training.architectures import architecture_named

CONFIG = TrainConfig(k=(32,), tokens=1_000_000, batch_tokens=8192)


def cost(world: int, shards: int = 1, arch: str = "topk", product_bytes: int = 4) -> MeshCost:
    config = replace(CONFIG, arch=arch, latent_shards=shards)
    architecture = architecture_named(arch).from_config(config)[0].at_width(16384)
    return mesh_cost(
        architecture, 512, 512, 16384, config,
        world=world, product_bytes=product_bytes, row_bytes=1024,
    )  # fmt: skip


def test_one_process_sends_nothing() -> None:
    alone = cost(1)
    assert alone.sent == 0
    # Both matrices and b_enc, and their moments.
    rows = 16384 * (512 + 512 + 1)
    assert alone.weights == 4 * rows + 4 * 512
    assert alone.moments == 2 * alone.weights


def test_rows_shared_out() -> None:
    """Half of the gradients, and half of the rows that were moved, go to the other one."""
    two = cost(2)
    parameters = 4 * 16384 * (512 + 512 + 1)
    assert two.sent_gradients == parameters // 2 + 4 * 512
    assert two.sent_weights == parameters // 2
    assert cost(2, product_bytes=2).sent_weights < two.sent_weights
    assert two.moments == pytest.approx(cost(1).moments / 2, rel=1e-3)
    assert two.sent_reconstructions == two.sent_choices == 0
    # Each row moves twice, half of the times to the other process.
    assert two.sent_rows == 8192 * 1024 // 2


def test_latents_shared_out() -> None:
    """No weight travels: partial reconstructions do, and the offers of k entries an example."""
    two = cost(2, 2)
    assert two.sent_gradients == two.sent_weights == 0
    assert two.sent_reconstructions == 8192 * 512 * 4
    assert two.sent_choices == 8192 * 32 * 4
    assert two.memory < cost(2).memory
    levels = len(architecture_named("matryoshka").from_config(CONFIG)[0].at_width(16384).prefixes)  # type: ignore[attr-defined]
    assert cost(2, 2, "matryoshka").sent_reconstructions == levels * two.sent_reconstructions


def test_a_slower_link_takes_longer() -> None:
    four = cost(4, product_bytes=2)
    assert h100_step_seconds(four, 4e10) > h100_step_seconds(four, 4e11)
    assert h100_step_seconds(four, 4e10) > four.sent_step / 4e10
