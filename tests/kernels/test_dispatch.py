"""The choice between Triton and PyTorch, and life without Triton."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from saesteer.kernels import dispatch, ops


@pytest.mark.parametrize(
    ("value", "choice"), [(None, "auto"), ("", "auto"), ("torch", "torch"), (" Triton ", "triton")]
)
def test_the_variable_is_read_at_every_call(
    monkeypatch: pytest.MonkeyPatch, value: str | None, choice: str
) -> None:
    if value is None:
        monkeypatch.delenv("SAESTEER_KERNELS", raising=False)
    else:
        monkeypatch.setenv("SAESTEER_KERNELS", value)
    assert dispatch.kernel_choice() == choice


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", "cuda")
    with pytest.raises(
        ValueError, match="SAESTEER_KERNELS='cuda' is not known.*auto, triton, torch"
    ):
        ops.encode_topk(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3), 1)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_cpu_tensors_use_pytorch(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    assert not dispatch.use_triton(torch.ones(2))


@pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET=1 is set")
def test_forcing_triton_on_cpu_tensors_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="SAESTEER_KERNELS=triton but the tensors are on cpu"):
        ops.encode_topk(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3), 1)


class FakeCuda:
    """Stands in for a CUDA tensor: the choice looks at nothing else."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("installed", "dtype", "expected"),
    [
        (True, torch.float32, True),
        (True, torch.bfloat16, True),
        (True, torch.float64, False),
        (False, torch.float32, False),
    ],
)
def test_cuda_tensors_use_triton_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool, dtype: torch.dtype, expected: bool
) -> None:
    monkeypatch.delenv("SAESTEER_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", installed)
    # __wrapped__: the shape checker of the test suite insists on a real tensor.
    use_triton = getattr(dispatch.use_triton, "__wrapped__", dispatch.use_triton)
    assert use_triton(FakeCuda(dtype)) is expected


@pytest.mark.parametrize(
    ("d_model", "widest", "block"),
    [(1, 512, 16), (41, 512, 64), (100, 512, 128), (576, 512, 128), (1000, 512, 512)]
    + [(1024, 512, 512), (1024, 256, 256), (200, 512, 256), (768, 512, 256), (130, 64, 64)],
)
def test_tiles_pad_little(d_model: int, widest: int, block: int) -> None:
    assert dispatch.column_block(d_model, widest) == block


@pytest.mark.parametrize(
    ("tile", "d_model", "element_bytes", "columns", "warps"),
    [
        (dispatch.Tile(8, 512, 1), 4096, 2, 256, 1),
        (dispatch.Tile(8, 512, 1), 4096, 4, 128, 1),
        (dispatch.Tile(8, 2048, 4), 4096, 2, 1024, 4),
        (dispatch.Tile(8, 2048, 4), 576, 2, 256, 1),  # of 3 x 256 a quarter lies idle
        (dispatch.Tile(8, 2048, 4), 41, 2, 64, 1),
        (dispatch.Tile(8, 512, 1), 1, 8, 16, 1),
    ],
)
def test_a_tile_fits_the_width(
    tile: dispatch.Tile, d_model: int, element_bytes: int, columns: int, warps: int
) -> None:
    assert tile.fit(d_model, element_bytes) == (columns, warps)


WITHOUT_TRITON = """
import os, pkgutil, sys, warnings

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())

import torch
import saesteer.kernels

names = [m.name for m in pkgutil.iter_modules(saesteer.kernels.__path__)]
assert {"adam_rows", "dispatch", "gather_dot", "ops", "sparse_decode"} <= set(names), names
for name in names:
    __import__(f"saesteer.kernels.{name}")
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()

from saesteer.kernels import dispatch, ops

assert not dispatch.TRITON_INSTALLED
W = torch.randn(12, 5, requires_grad=True)
acts, indices = ops.encode_topk(torch.randn(4, 5), W, torch.zeros(12), 3)
with warnings.catch_warnings():  # PyTorch's about sparse tensors come once per process, if at all
    warnings.simplefilter("error")
    ops.sparse_decode(acts, indices, W, torch.zeros(5)).square().sum().backward()
before = W.detach().clone()
moments = torch.zeros_like(before), torch.zeros_like(before)
schedule = torch.tensor(ops.adam_schedule(1, 0.1, 0.9, 0.999), dtype=torch.float64)
ops.adam_rows_(W.detach(), W.grad, *moments, schedule=schedule)
assert W.isfinite().all() and not torch.equal(W.detach(), before)

os.environ["SAESTEER_KERNELS"] = "triton"
try:
    ops.encode_topk(torch.randn(4, 5), W, torch.zeros(12), 3)
except RuntimeError as error:
    assert "Triton is not installed" in str(error)
else:
    raise AssertionError("a forced backend that is missing has to be an error")
print("fine without it")
"""


def test_everything_works_with_triton_hidden() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("SAESTEER_KERNELS", "TRITON_INTERPRET")}
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_TRITON)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "fine without it"
