"""New values for chosen latents, against a dense encode, edit and decode."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.kernels.ops import encode_topk, sparse_decode
from saesteer.kernels.steer_clamp import MODES, steer_clamp_op, steer_clamp_reference
from saesteer.kernels.steering_ops import steer_clamp

# tokens, latents, d_model, d_sae.
SHAPES = [(1, 1, 1, 1), (7, 5, 41, 20), (3, 12, 1000, 12), (0, 2, 8, 9), (4, 0, 8, 9)]


def problem(tokens: int, m: int, d_model: int, d_sae: int, seed: int = 0) -> list[Tensor]:
    """h, W_enc_rows, b_enc, W_dec, latent_ids, values; float64."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    return [
        normal(tokens, d_model),
        normal(d_sae, d_model),
        normal(d_sae),
        normal(d_sae, d_model),
        torch.randperm(d_sae, generator=random)[:m],
        normal(m).abs(),
    ]


def as_dtype(args: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in args]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    args = as_dtype(problem(*shape), dtype)
    thresholds = torch.linspace(-1, 2, shape[3], dtype=dtype)
    for activation, threshold, limits in (
        ("relu", None, torch.zeros_like(thresholds)),
        ("jumprelu", thresholds, thresholds),
        ("batchtopk", 0.7, torch.full_like(thresholds, 0.7)),
    ):
        before = args[0].clone()
        out = steer_clamp(*args, mode, activation=activation, threshold=threshold)
        assert out.dtype == dtype and torch.equal(args[0], before)
        wide = as_dtype(args, torch.float64)
        expected = steer_clamp_reference(*wide, limits.double()[args[4]], mode)
        # float32: sums of up to 1000 products of size 1, times up to 12 rows of size 1.
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-3)


def test_clamp_means_set_and_the_modes_mean_what_they_say() -> None:
    eye, zeros, ids = torch.eye(3), torch.zeros(3), torch.tensor([1])
    h = torch.tensor([[5.0, 2.0, 7.0], [5.0, -2.0, 7.0]])

    def run(mode: str, value: float) -> list[float]:
        out = steer_clamp(h, eye, zeros, eye, ids, torch.tensor([value]), mode)
        assert torch.equal(out[:, [0, 2]], h[:, [0, 2]])
        return (out - h)[:, 1].tolist()

    # The latent holds 2 in the first row and 0 in the second.
    assert run("clamp", 3.0) == run("set", 3.0) == [1.0, 3.0]
    assert run("min", 1.0) == [0.0, 1.0] and run("max", 1.0) == [-1.0, 0.0]
    assert run("scale", 3.0) == [4.0, 0.0] and run("add", 0.5) == [0.5, 0.5]


def test_what_the_autoencoder_misses_is_kept() -> None:
    h, W_enc, b_enc, W_dec, ids, _ = problem(6, 3, 12, 30)
    zeros = torch.zeros(3, dtype=torch.float64)
    out = steer_clamp(h, W_enc, b_enc, W_dec, ids, zeros, "set")
    acts = (h @ W_enc.t() + b_enc).relu()
    kept = acts.clone()
    kept[:, ids] = 0
    # h minus its reconstruction, before and after.
    torch.testing.assert_close(h - acts @ W_dec, out - kept @ W_dec)


def test_a_topk_is_refused_unless_it_is_read_by_threshold() -> None:
    args = problem(6, 3, 12, 30)
    with pytest.raises(ValueError, match="encode with encode_topk, or give membership='threshold'"):
        steer_clamp(*args, "set", activation="topk")
    by_threshold = steer_clamp(
        *args, "set", activation="topk", membership="threshold", threshold=1.5
    )
    assert torch.equal(
        by_threshold, steer_clamp(*args, "set", activation="batchtopk", threshold=1.5)
    )
    # Where the threshold is what the TopK of a row really cut at, the two agree.
    h, W_enc, b_enc, W_dec, ids, values = args
    acts, indices = encode_topk(h[:1], W_enc, b_enc, 5)
    ordered = (h[:1] @ W_enc.t() + b_enc).sort(descending=True).values[0]
    cut = float(ordered[4] + ordered[5]) / 2
    dense = torch.zeros(1, 30, dtype=torch.float64).scatter(1, indices, acts)
    edited = dense.index_copy(1, ids, values[None])
    expected = h[:1] + sparse_decode(edited - dense, torch.arange(30)[None], W_dec)
    out = steer_clamp(
        h[:1], *args[1:], "set", activation="topk", membership="threshold", threshold=cut
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode: str) -> None:
    args = problem(5, 3, 6, 9)
    limits = torch.full((3,), 0.3, dtype=torch.float64)
    floats = [0, 1, 2, 3, 5]
    results = []
    for reference in (False, True):
        inputs = [t.clone().requires_grad_() if i in floats else t for i, t in enumerate(args)]
        if reference:
            out = steer_clamp_reference(*inputs, limits, mode)
        else:
            out = steer_clamp(*inputs, mode, activation="batchtopk", threshold=0.3)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append(torch.autograd.grad((out * weight).sum(), [inputs[i] for i in floats]))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    args = problem(3, 2, 4, 5)
    ids = args.pop(4)
    inputs = [t.requires_grad_() for t in args]

    def run(h: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, values: Tensor) -> Tensor:
        return steer_clamp(h, W_enc, b_enc, W_dec, ids, values, mode)

    assert torch.autograd.gradcheck(run, inputs)


def test_an_id_given_twice_is_edited_twice() -> None:
    args = problem(4, 2, 6, 9)
    once = [*args[:4], args[4][:1], args[5][:1]]
    twice = [*args[:4], args[4][:1].repeat(2), args[5][:1].repeat(2)]
    torch.testing.assert_close(steer_clamp(*twice) - args[0], 2 * (steer_clamp(*once) - args[0]))


def test_strided_half_and_int32_inputs() -> None:
    args = problem(6, 3, 10, 9)
    views = [t.repeat(*[2] * t.dim())[tuple(slice(n) for n in t.shape)] for t in args]
    views[1] = args[1].t().contiguous().t()
    views[4] = args[4].int()
    torch.testing.assert_close(steer_clamp(*views), steer_clamp(*args))
    half = as_dtype(args, torch.bfloat16)
    out = steer_clamp(*half)
    assert out.dtype == torch.bfloat16
    # Sums in float32, one rounding to bfloat16 (2**-8 of the value).
    expected = steer_clamp(*as_dtype(half, torch.float32))
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ablate"}, "mode must be one of clamp, set, min, max, scale, add, got 'ablate'"),
        ({"activation": "gelu"}, "activation must be relu, jumprelu, batchtopk or topk"),
        ({"membership": "rank"}, "membership must be None or 'threshold'"),
        ({"activation": "jumprelu"}, "none was given for threshold"),
        ({"threshold": 1.0}, "one was given for threshold; relu takes none"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steer_clamp(*problem(2, 2, 3, 4), **options)


def test_wrong_tensors_are_named() -> None:
    h, W_enc, b_enc, W_dec, ids, values = problem(2, 2, 3, 4)
    function = getattr(steer_clamp, "__wrapped__", steer_clamp)
    with pytest.raises(ValueError, match=r"values must be \[latents\] = \[2\], got \[1\]"):
        function(h, W_enc, b_enc, W_dec, ids, values[:1])
    with pytest.raises(ValueError, match=r"W_enc_rows must be \[d_sae, d_model\] = \[4, 3\]"):
        function(h, W_enc[:3], b_enc, W_dec, ids, values)
    with pytest.raises(IndexError, match="got 4"):
        function(h, W_enc, b_enc, W_dec, torch.tensor([0, 4]), values)


def test_opcheck() -> None:
    args = problem(5, 3, 6, 9)
    for i in (0, 1, 2, 3, 5):
        args[i].requires_grad_()
    torch.library.opcheck(steer_clamp_op, (*args, torch.zeros(3, dtype=torch.float64), "min"))


COMPILED = """
import torch
from saesteer.kernels import ops, steering_ops

torch.manual_seed(0)
W_enc, b_enc, W_dec = torch.randn(300, 12), torch.randn(300), torch.randn(300, 12)
ids, values = torch.tensor([3, 250]), torch.tensor([1.0, 2.0])
sets, alphas = torch.tensor([[3, 9], [7, -1]]), torch.randn(2, 2).requires_grad_()

def run(h, positions, set_ids):
    h = steering_ops.steer_clamp(h, W_enc, b_enc, W_dec, ids, values, "min")
    h = steering_ops.steer_add(h, positions, set_ids, sets, alphas, W_dec)
    acts, indices = ops.encode_topk_fused(h, W_enc, b_enc, 5)
    return ops.sparse_decode(acts, indices, W_dec)

def write(h, positions, set_ids):
    with torch.no_grad():
        steering_ops.steer_add_(h, positions, set_ids, sets, alphas, W_dec)
    return h + 1

for f, takes_gradient in ((run, True), (write, False)):
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9, 17):  # the second size makes the axis symbolic
        h = torch.randn(tokens, 12, requires_grad=takes_gradient)
        spots = torch.arange(0, tokens, 2), torch.arange(tokens)[::2] % 2
        results = []
        for g in (f, compiled):
            here = h if takes_gradient else h.clone()
            out = g(here, *spots)
            grads = torch.autograd.grad(out.square().sum(), (h, alphas)) if takes_gradient else ()
            results.append((out, here, *grads))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(eager, graph)
print("one graph")
"""


def test_the_steering_ops_and_the_fused_encoder_compile_into_one_graph() -> None:
    # In a child: here the ops are wrapped in shape checks that the compiler cannot follow.
    child = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "one graph"
