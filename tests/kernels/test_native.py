"""The compiled CPU loops as such: the same bits in every process, threads, memory, errors."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")

from saesteer.kernels import native
from saesteer.kernels.native import (
    even_bounds,
    parts_of,
    result_memory,
    run_parts,
    scratch,
    use_native,
)

STEP = """
import hashlib, torch
from saesteer.kernels import ops

torch.manual_seed(0)
x, b = torch.randn(200, 96), torch.randn(900)
W = torch.nn.functional.normalize(torch.randn(900, 96))
acts, indices = ops.encode_topk(x, W, b, 8)
squared, error, slots = ops.decode_mse(acts, indices, W, torch.zeros(96), x)
order = ops.sort_indices(indices, 900)
state = [W.clone(), torch.randn(900, 96), torch.rand(900, 96)]
schedule = torch.tensor(ops.adam_schedule(3, 1e-2, 0.9, 0.999), dtype=torch.float64)
for unit_rows in (True, False):
    sums, counts = ops.adam_sparse_rows_(
        *state, acts, indices, error, order, factor=0.1, schedule=schedule, unit_rows=unit_rows
    )
digest = hashlib.sha256()
for tensor in (acts, indices, squared, error, slots, *state, sums, counts):
    digest.update(tensor.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_compiling_and_reading_back_give_the_same_bits(tmp_path: Path) -> None:
    """A run that is killed and resumed compiles in one process and reads back in the next."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "SAESTEER_KERNELS": "auto"}
    digests = []
    for _ in range(2):
        child = subprocess.run(
            [sys.executable, "-P", "-c", STEP], env=env, capture_output=True, text=True, check=False
        )
        assert child.returncode == 0, child.stderr
        digests.append(child.stdout)
        assert list(tmp_path.rglob("*.nbc")), "the code is stored"
    assert digests[0] == digests[1]


@pytest.mark.parametrize("own_threads", [False, True])
def test_every_part_is_done_once(own_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if own_threads:
        monkeypatch.setattr(native, "_openmp_team", lambda: None)
    done: list[tuple[str, int, int]] = []
    for parts in (1, 2, 7, 30):
        done.clear()
        run_parts(lambda *part: done.append(part), even_bounds(20, parts), "x")
        assert sorted(n for _, first, last in done for n in range(first, last)) == list(range(20))
    run_parts(lambda *part: done.append(part), [0], "nothing")


@pytest.mark.parametrize("own_threads", [False, True])
def test_an_error_in_a_part_is_raised_here(
    own_threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own_threads:
        monkeypatch.setattr(native, "_openmp_team", lambda: None)

    def fails(first: int, last: int) -> None:
        raise KeyError(first)

    with pytest.raises(KeyError):
        run_parts(fails, even_bounds(20, 8))


def test_parts_are_several_a_thread_and_not_too_small() -> None:
    assert parts_of(10**6, 8) == (4 * torch.get_num_threads() if torch.get_num_threads() > 1 else 1)
    assert parts_of(7, 8) == parts_of(0, 8) == 1


def test_scratch_is_the_same_memory_again() -> None:
    first = scratch((10, 10), torch.float32)
    again = scratch((4, 5), torch.bfloat16)
    assert again.data_ptr() == first.data_ptr() and again.shape == (4, 5)
    assert scratch((1,), torch.float64).dtype == torch.float64


def test_a_result_is_never_memory_that_somebody_still_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_LEAST_BLOCK_BYTES", 400)
    monkeypatch.setattr(native, "_kept", threading.local())
    first = result_memory((10, 10))
    place, part = first.data_ptr(), first[3:5].t()
    del first
    second = result_memory((100,))
    assert second.data_ptr() != place, "a view of the first is still there"
    del part
    third = result_memory((5, 20))
    assert third.data_ptr() == place and third._base is None
    pointers = {third.data_ptr(), second.data_ptr(), result_memory((200,)).data_ptr()}
    assert len(pointers) == 3
    assert len(native._kept.blocks) == 2, "no more blocks are kept"
    small = result_memory((3, 3))
    assert small.shape == (3, 3) and len(native._kept.blocks) == 2


def test_which_tensors_the_loops_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    assert use_native(x, x) and not use_native(x, x.double()) and not use_native(x.to("meta"))
    for choice in ("torch", "triton"):
        monkeypatch.setenv("SAESTEER_KERNELS", choice)
        assert not use_native(x)
    monkeypatch.setenv("SAESTEER_KERNELS", "auto")
    monkeypatch.setattr(native, "numba_installed", lambda: False)
    assert not use_native(x), "works without numba, more slowly"
