"""The prediction is an upper bound, and a close one."""

import contextlib
from pathlib import Path

import torch

from saesteer.checkpoints.disk import folder_bytes
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.config import TrainConfig
from saesteer.sae.runs.disk_use import train_footprint
from saesteer.sae.training.architectures.topk import TopK
from saesteer.sae.verbs.train import train


def test_a_run_writes_what_was_predicted(tmp_path: Path) -> None:
    d_model, tokens = 64, 4096
    writer = ShardWriter(
        tmp_path / "acts", layers=[0, 1], sites=["resid_post"], d_model=d_model,
        dtype=torch.bfloat16, facts={"model": "made-up"},
    )  # fmt: skip
    rows = torch.randn(tokens, d_model)
    writer.add({(0, "resid_post"): rows, (1, "resid_post"): rows}, torch.arange(tokens))
    writer.close()
    config = TrainConfig(
        d_sae=(256, 512), k=(4,), tokens=8192, batch_tokens=64, buffer_tokens=4096,
        checkpoint_every=1024, keep_states=3,
    )  # fmt: skip
    sizes: list[int] = []

    def look(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train":
            for path in (tmp_path / "sae/state").glob("*.safe*"):
                with contextlib.suppress(FileNotFoundError):  # a draft that has its name by now
                    sizes.append(path.stat().st_size)

    train(tmp_path / "sae", config, activations=tmp_path / "acts", device="cpu", progress=look)
    footprint = train_footprint(
        [TopK(4).parameter_count(d_model, d_model, d_sae) for d_sae in (256, 512)] * 2,
        [256, 512, 256, 512], d_model, buffer_tokens=4096, batch_tokens=64, width=2 * d_model,
        element_bytes=2, keep=3,
    )  # fmt: skip
    # At most: the chunk of rows on its way in is seldom whole.
    assert 0.5 * footprint.state_bytes < max(sizes) <= footprint.state_bytes
    weights = sum(path.stat().st_size for path in tmp_path.rglob("sae_weights.safetensors"))
    assert 0.6 * footprint.sae_bytes < weights <= footprint.sae_bytes
    assert folder_bytes(tmp_path / "sae") <= footprint.total_bytes
