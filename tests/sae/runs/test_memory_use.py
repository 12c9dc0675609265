"""Memory is said before it is taken, and refused with advice."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs import memory_use as memory
from saesteer.sae.runs.memory_use import (
    automatic_batch_size,
    forward_bytes,
    free_bytes,
    model_bytes,
    refuse_what_cannot_fit,
    training_memory,
)
from saesteer.sae.training.architectures.topk import TopK
from saesteer.sae.training.input_scale import InputScale
from saesteer.sae.training.sae_trainer import SAETrainer, Variant

Shared = Callable[..., LanguageModel]
CPU = torch.device("cpu")
GIGABYTE = 10**9


def test_free_memory_is_some() -> None:
    free = free_bytes(CPU)
    assert free is None or 0 < free < 1 << 50


def test_weights_that_are_needed(shared_lm: Shared) -> None:
    lm = shared_lm()
    block = sum(4 * p.numel() for p in lm.blocks[0].parameters())
    head = 4 * lm.unembed.weight.numel()  # type: ignore[union-attr,operator]
    assert model_bytes(lm) - model_bytes(lm, 1) == 2 * block + head
    assert model_bytes(lm, lm.n_layers - 1) == model_bytes(lm) - head


def test_the_batch_size_fits_the_memory(shared_lm: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, text = shared_lm(), TextConfig(context=64)
    one = forward_bytes(lm, 64, 64)
    for free, size in ((4 * one, 1), (40 * one, 10), (10**15, 16_384 // 64), (1, 1)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert automatic_batch_size(lm, text) == size
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40 * one)
    masked = automatic_batch_size(lm, replace(text, isolate_documents=True))
    assert masked < 10, "a mask needs room"
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert automatic_batch_size(lm, text) == 16


SHAPE: dict[str, int] = {"buffer_tokens": 1000, "row_bytes": 40, "batches_ahead": 4}

PARAMETERS = [TopK(4).parameter_count(10, 10, d_sae) for d_sae in (40, 80)]


def test_training_is_counted() -> None:
    config = TrainConfig(tokens=10**6, batch_tokens=100, buffer_tokens=1000)
    need = training_memory(PARAMETERS, 80, 10, config, CPU, **SHAPE)
    parameters = 2 * 10 * 120 + 120 + 2 * 10
    # Weights and two moments of four bytes; on a CPU no gradient is ever whole.
    assert need.saes == 12 * parameters
    assert need.buffer == (1000 + 6 * 100) * 40
    assert need.total == need.saes + need.step + need.buffer
    halves = replace(config, moments="bfloat16")
    assert training_memory(PARAMETERS, 80, 10, halves, CPU, **SHAPE).saes == 8 * parameters
    # Products in bfloat16 need copies, and a clipped gradient is there as a whole.
    gpu = training_memory(PARAMETERS, 80, 10, config, torch.device("cuda"), **SHAPE)
    assert gpu.saes == 14 * parameters and gpu.step > need.step
    clipped = training_memory(PARAMETERS, 80, 10, replace(config, clip_norm=1.0), CPU, **SHAPE)
    assert clipped.step - need.step == 4 * (2 * 10 * 80 + 80 + 10)


def test_a_trainer_takes_what_was_predicted() -> None:
    config = TrainConfig(d_sae=(48,), tokens=10**6, k=(4,))
    scale = InputScale(torch.zeros(16, dtype=torch.float64), 1.0)
    place = (0, "a")
    variant = Variant((place,), (place,), 48, TopK(4), 0)
    trainer = SAETrainer(variant, config, {place: scale}, CPU)
    held = [*trainer.optimiser.state_dict().values(), *trainer.optimiser.copies.values()]
    need = training_memory([TopK(4).parameter_count(16, 16, 48)], 48, 16, config, CPU, **SHAPE)
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == need.saes


def test_what_cannot_fit_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(tokens=10**7, batch_tokens=100)
    parameters = [TopK(4).parameter_count(1000, 1000, 50_000)] * 9
    need = training_memory(
        parameters, 50_000, 1000, config, CPU,
        buffer_tokens=10**6, row_bytes=4000, batches_ahead=4,
    )  # fmt: skip
    monkeypatch.setattr(memory, "free_bytes", lambda device: need.total + 1)
    refuse_what_cannot_fit(need, 9, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need.total - 1)
    with pytest.raises(UserError, match=r"9 SAEs .* need 14\.\d GB of memory .*`buffer_tokens`"):
        refuse_what_cannot_fit(need, 9, CPU)
    # On a GPU the SAEs lie there and the buffer does not.
    gpu = torch.device("cuda")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 13 * GIGABYTE)
    refuse_what_cannot_fit(need, 9, gpu)
    monkeypatch.setattr(
        memory, "free_bytes", lambda device: (2 if device.type == "cuda" else 99) * GIGABYTE
    )
    with pytest.raises(UserError, match="of GPU memory"):
        refuse_what_cannot_fit(need, 9, gpu)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    refuse_what_cannot_fit(need, 9, CPU)


def test_kept_pages_are_used_again() -> None:
    """Forty-megabyte tensors, one after the other, in a process of their own."""
    script = """
import resource, sys, torch
from saesteer.sae.runs.memory_use import keep_pages
if sys.argv[1] == "keep":
    keep_pages()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(10_000_000)
before = faults()
for _ in range(10):
    torch.ones(10_000_000)
print(faults() - before)
"""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("no glibc")
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # Who has set one of glibc's own variables keeps what they chose.
    chosen = {**usual, "MALLOC_TRIM_THRESHOLD_": "131072"}
    kept, left, told = (
        int(subprocess.run([sys.executable, "-P", "-c", script, word], capture_output=True,
                           text=True, check=True, env=environment).stdout)
        for word, environment in (("keep", usual), ("leave", usual), ("keep", chosen))
    )  # fmt: skip
    assert kept < 1000
    assert left > 10 * kept and told > 10 * kept
