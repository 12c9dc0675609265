"""The public ops together: one forward and backward pass, memory, compilation, error messages."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from saesteer.kernels import native, ops, topk_encode
from saesteer.kernels.sparse_decode import sparse_decode_reference
from saesteer.kernels.topk_encode import topk_encode_reference

SHAPES = [(1, 1, 1, 1), (5, 41, 60, 7), (3, 1000, 17, 17), (0, 8, 20, 4), (9, 6, 450, 5)]
"""batch, d_model, d_sae, k."""


def parameters(d_model: int, d_sae: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(d_sae, d_model), (d_sae,), (d_sae, d_model), (d_model,)]
    return [
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def autoencode(x: Tensor, params: list[Tensor], k: int) -> Tensor:
    W_enc_rows, b_enc, W_dec, b_dec = params
    acts, indices = ops.encode_topk(x - b_dec, W_enc_rows, b_enc, k)
    return ops.sparse_decode(acts, indices, W_dec, b_dec)


def autoencode_reference(x: Tensor, params: list[Tensor], k: int) -> Tensor:
    W_enc_rows, b_enc, W_dec, b_dec = params
    acts, indices = topk_encode_reference(x - b_dec, W_enc_rows, b_enc, k)
    return sparse_decode_reference(acts, indices, W_dec, b_dec)


@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES)
def test_loss_and_all_gradients_equal_the_dense_autoencoder(
    batch: int, d_model: int, d_sae: int, k: int
) -> None:
    params = parameters(d_model, d_sae)
    x = torch.randn(batch, d_model, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (autoencode, autoencode_reference):
        loss = (run(x, params, k) - x.detach()).square().sum()
        results.append((loss, *torch.autograd.grad(loss, (x, *params))))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)


def test_one_latent_in_every_row() -> None:
    params = parameters(6, 40)
    with torch.no_grad():
        params[1][13] += 100
    x = torch.randn(200, 6, dtype=torch.float64)
    for k in (1, 3):
        ours = torch.autograd.grad(autoencode(x, params, k).square().sum(), params)
        dense = torch.autograd.grad(autoencode_reference(x, params, k).square().sum(), params)
        for mine, reference in zip(ours, dense, strict=True):
            torch.testing.assert_close(mine, reference)


def allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes of every allocation PyTorch made."""
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def test_the_encoder_holds_one_chunk_of_pre_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_encode, "CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(topk_encode, "CPU_CHUNK_ROWS", 8)
    monkeypatch.setattr(native, "_kept", threading.local())
    W, b = parameters(4, 1024, torch.float32)[:2]
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.encode_topk(torch.randn(128, 4), W, b, 16)
    assert max(allocations(profile)) == 8 * 1024 * 4


def test_no_dense_tensor_is_saved_and_none_is_made_for_the_gradient() -> None:
    batch, d_model, d_sae, k = 128, 64, 1024, 16
    # [d_sae, d_model] gradients are wanted; [batch, d_sae] and [batch, k, d_model] are not.
    wanted, dense = d_sae * d_model, batch * d_sae
    assert dense >= 2 * wanted and batch * k * d_model >= 2 * wanted
    params = parameters(d_model, d_sae, torch.float32)
    x = torch.randn(batch, d_model, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = autoencode(x, params, k).square().mean()
    assert saved and max(t.numel() for t in saved) <= wanted
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    assert max(allocations(profile)) == 4 * wanted  # the weight gradients themselves, in float32


COMPILED = """
import torch
from saesteer.kernels import ops

torch.manual_seed(0)
params = [torch.randn(s).requires_grad_() for s in ((50, 12), (50,), (50, 12), (12,))]

def run(x, W_enc_rows, b_enc, W_dec, b_dec):
    acts, indices = ops.encode_topk(x - b_dec, W_enc_rows, b_enc, 5)
    return ops.sparse_decode(acts, indices, W_dec, b_dec)

compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
for batch in (6, 9, 17):  # the second size makes the batch axis symbolic
    x = torch.randn(batch, 12)
    results = []
    for f in (run, compiled):
        out = f(x, *params)
        results.append((out, *torch.autograd.grad(out.square().sum(), params)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)
print("one graph")
"""


def test_compiles_into_one_graph() -> None:
    # In a child: here the ops are wrapped in shape checks that the compiler cannot follow.
    child = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "one graph"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type) -> None:
    params = parameters(6, 20)
    x = torch.randn(4, 6, dtype=torch.float64)
    with mode():
        out = autoencode(x, params, 3)
    assert not out.requires_grad
    torch.testing.assert_close(out, autoencode(x, params, 3).detach())


X, W, B, IDS = torch.ones(3, 4), torch.ones(6, 4), torch.ones(6), torch.zeros(3, 2).long()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.encode_topk(X, W, B, 0), ValueError, r"k must be in 1\.\.6 \(d_sae\), got 0"),
        (lambda: ops.encode_topk(X, W, B, 7), ValueError, "got 7"),
    ],
)
def test_wrong_k_is_named(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("encode_topk", (X, W.t(), B, 2), r"W_enc_rows must be \[d_sae, d_model\] = \[4, 4\]"),
        ("encode_topk", (X, W, X, 2), r"b_enc must be \[d_sae\] = \[6\], got \[3, 4\]"),
        ("encode_topk", (X[0], W, B, 2), r"x must have two axes \[batch, d_model\], got \[4\]"),
        ("sparse_decode", (X, IDS, W, X[0]), r"latent_acts must be \[batch, k\] = \[3, 2\]"),
        ("sparse_decode", (X[:, :2], IDS, W, B), r"b_dec must be \[d_model\] = \[4\]"),
        ("sparse_decode", (X[0, :2], IDS[0], W, B), r"one axis \[entries\] need `row_starts`"),
        ("sparse_decode", (X[:, :2], IDS[None], W, B), "latent_indices must have two axes"),
        ("sparse_decode", (X[0, :2], IDS, W, None, IDS[0]), "must have one axis .* got .3, 2."),
        ("gather_dot", (X, W, IDS[0], IDS), r"`row_starts` must have one axis \[batch \+ 1\]"),
        ("gather_dot", (X, W, IDS[0], IDS[0]), r"vectors must be \[batch, d_model\] = \[1, 4\]"),
        ("gather_dot", (X.t(), W, IDS), r"vectors must be \[batch, d_model\] = \[3, 4\]"),
        ("sparse_row_grads", (X[:, :2], IDS, W, 6), r"rows must be \[batch, d_model\] = \[3, 4\]"),
    ],
)
def test_wrong_shapes_are_named(name: str, args: tuple[object, ...], message: str) -> None:
    function = getattr(ops, name)
    # In the test suite jaxtyping would object first; outside of it, this is what a user sees.
    with pytest.raises(ValueError, match=message):
        getattr(function, "__wrapped__", function)(*args)


def test_indices_must_be_integers() -> None:
    function = getattr(ops.sparse_decode, "__wrapped__", ops.sparse_decode)
    with pytest.raises(TypeError, match="must be int64 or int32, got torch.float32"):
        function(X[:, :2], IDS.float(), W, None)
