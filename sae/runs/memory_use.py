"""How much memory a job will need, computed before it starts."""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.model.language_model import LanguageModel, text_config
from saesteer.sae.runs.processes import ALONE, Processes

# Latents of one chunk of a batch that a step holds densely (float32), and what it keeps of them.
_DENSE_ROWS = 1024
# A batch of more tokens than this runs no faster: the products are large enough.
_MOST_BATCH_TOKENS = 16_384
# Share of the free memory that one batch may use; the rest is for shards, buffers, other programs.
_BATCH_SHARE = 0.25
# From <malloc.h>. Larger blocks are mapped separately; free memory beyond _KEPT_FREE is given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BLOCK = 256 * 2**20
_KEPT_FREE = 2**30


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return min(int(line.split()[1]) * 1024, _cgroup_room())
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peak_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes() -> int:
    """The memory that this process holds now; its peak where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return peak_bytes()


@functools.cache
def keep_pages() -> None:
    """Have the C library keep freed memory up to some size for the next tensor.

    By default glibc gives large blocks, and a large free end of its heap, back to the system. The
    next layer then faults the same pages in again, zeroed: a pass of SmolLM2-135M over 4,096 tokens
    took 140,000 faults up to half depth, a fifth to a third of its time. Threads share one heap, so
    that a shard's writer takes what the model's pass freed: heaps of other threads end at 64 MiB
    and are given back all the same.

    This holds for the whole process and cannot be undone, because glibc does not tell the values it
    had; the cost is up to 1 GiB that the process keeps. PyTorch has no setting for it, and the
    environment variables of glibc would have to be set before Python starts. Where one of those
    (`MALLOC_...`) is set, or without glibc, nothing is changed.
    """
    import ctypes

    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)
    mallopt(_M_ARENA_MAX, 1)


def _cgroup_room() -> int:
    """Bytes that the container's memory limit leaves; very many without a limit."""
    try:
        with (
            open("/sys/fs/cgroup/memory.max") as limit,
            open("/sys/fs/cgroup/memory.current") as used,
        ):
            return int(limit.read()) - int(used.read())
    except (OSError, ValueError):  # no container, or "max"
        return 1 << 62


def model_bytes(lm: LanguageModel, last: int | None = None) -> int:
    """Bytes of the weights; with `last` only of those that a pass up to that block needs."""
    held = {id(p): p for p in lm.model.parameters()}
    if last is not None:
        later = {id(p) for block in lm.blocks[last + 1 :] for p in block.parameters()}
        used = {id(p) for p in lm.text_model.parameters()}
        held = {key: p for key, p in held.items() if key in used and key not in later}
    return sum(p.numel() * p.element_size() for p in held.values() if not p.is_meta)


def forward_bytes(lm: LanguageModel, tokens: int, context: int, isolated: bool = False) -> int:
    """About what one pass over `tokens` tokens holds at once, besides the weights.

    The widest moment of a block: the residual stream and its norm, queries, keys, values and the
    attention's output, and the gate, the up-projection and their product.
    """
    config = text_config(lm.model)
    inner = getattr(config, "intermediate_size", None) or 4 * lm.d_model
    heads = getattr(config, "num_attention_heads", 1)
    wide = lm.dtype.itemsize * (8 * lm.d_model + 3 * int(inner))
    # Norms are computed in float32; a mask is stored for every head where one is needed.
    row = wide + 4 * 2 * lm.d_model + (heads * context * 4 if isolated else 0)
    return tokens * row


def automatic_batch_size(lm: LanguageModel, text: TextConfig) -> int:
    """Sequences that fit into a quarter of the free memory, at most 16,384 tokens of them."""
    most = max(1, _MOST_BATCH_TOKENS // text.context)
    free = free_bytes(lm.device)
    if free is None:
        return min(most, 16)
    one = forward_bytes(lm, text.context, text.context, text.isolate_documents)
    return max(1, min(most, int(_BATCH_SHARE * free / one)))


def resolved_text(
    lm: LanguageModel, text: TextConfig, before: int | None = None, processes: Processes = ALONE
) -> TextConfig:
    """The text with a batch size: the one asked for, the one of the run to resume, or what fits."""
    if text.batch_size:
        return text
    fitting = before or automatic_batch_size(lm, text)
    return replace(text, batch_size=int(min(processes.gather(torch.tensor([fitting])))))


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that training needs besides the language model."""

    saes: int
    """Weights and moments of every SAE."""
    step: int
    """What one step of the widest SAE needs besides, with its gradient where one is made."""
    buffer: int
    """The shuffle buffer and the batches that wait."""

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.saes + self.step + self.buffer


def training_memory(
    parameters: Sequence[int],
    widest: int,
    d_model: int,
    config: TrainConfig,
    device: torch.device,
    *,
    buffer_tokens: int,
    row_bytes: int,
    batches_ahead: int,
) -> TrainingMemory:
    """Predict the memory of training SAEs with these numbers of parameters (one entry an SAE).

    `widest` is the largest number of latents, and `row_bytes` one row of the buffer, which holds
    all hook points side by side.
    """
    # float32 weights and their two moments.
    each = 4 + 2 * (2 if config.moments == "bfloat16" else 4)
    if config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda"):
        each += 2  # the copies that products use
    # On a CPU a plain step sums each row's gradient and uses it at once.
    plain = config.clip_norm is None and config.micro_batch_tokens is None
    gradient = 0 if device.type == "cpu" and plain else 4 * max(parameters)
    rows = min(config.batch_tokens, _DENSE_ROWS)
    step = 4 * (2 * rows * widest + 6 * config.batch_tokens * d_model) + gradient
    batches = (batches_ahead + 2) * config.batch_tokens
    return TrainingMemory(
        saes=sum(parameters) * each,
        step=step,
        buffer=(buffer_tokens + batches) * row_bytes,
    )


def refuse_what_cannot_fit(need: TrainingMemory, saes: int, device: torch.device) -> None:
    """Raise UserError with advice when training would run out of memory."""
    on_device = need.saes + need.step
    wanted = [("memory", need.buffer + on_device, device)]
    if device.type != "cpu":
        wanted = [("memory", need.buffer, torch.device("cpu")), ("GPU memory", on_device, device)]
    for what, size, place in wanted:
        free = free_bytes(place)
        if free is not None and size > free:
            raise UserError(
                f"{saes} SAEs and the shuffle buffer need {gigabytes(size)} of {what} "
                f"({gigabytes(need.saes)} for the SAEs, {gigabytes(need.buffer)} for the buffer), "
                f"{gigabytes(free)} are free: give fewer `layer`, `k`, `d_sae` or `init_seed` at "
                "once, or a smaller `buffer_tokens`"
            )


def gigabytes(number: int) -> str:
    """Bytes in a readable unit: "1.5 GB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
