"""Adding decoder rows at chosen positions, against the dense reference."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels.steer_add import steer_add_inplace_op, steer_add_op, steer_add_reference
from saesteer.kernels.steering_ops import steer_add, steer_add_

# tokens, spots, sets, latents per set, d_model, d_sae.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (9, 4, 3, 5, 41, 20),
    (5, 5, 1, 12, 1000, 7),
    (4, 0, 2, 3, 8, 9),
    (0, 0, 1, 1, 8, 9),
    (3, 2, 2, 0, 8, 9),
]


def problem(
    tokens: int, spots: int, sets: int, m: int, d_model: int, d_sae: int, seed: int = 0
) -> list[Tensor]:
    """h, positions, set_ids, latent_ids (some slots empty), alphas, W_dec; float64."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    latent_ids = torch.randint(-1, d_sae, (sets, m), generator=random)
    return [
        normal(tokens, d_model),
        torch.randperm(tokens, generator=random)[:spots],
        torch.randint(0, sets, (spots,), generator=random),
        latent_ids,
        normal(sets, m),
        normal(d_sae, d_model),
    ]


def as_dtype(args: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in args]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = as_dtype(problem(*shape), dtype)
    before = args[0].clone()
    out = steer_add(*args)
    assert out.dtype == dtype and torch.equal(args[0], before)
    expected = steer_add_reference(*as_dtype(args, torch.float64))
    # float32: sums of up to 13 products of size 1.
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    steer_add_(*args)
    assert torch.equal(args[0], out)


def test_other_positions_keep_their_bits() -> None:
    args = problem(9, 3, 2, 4, 16, 30)
    args[0] = args[0].bfloat16()
    out = steer_add(*args)
    others = torch.ones(9, dtype=torch.bool)
    others[args[1]] = False
    assert torch.equal(out[others], args[0][others])
    assert out.dtype == torch.bfloat16 and not torch.equal(out, args[0])


def test_one_call_serves_different_requests() -> None:
    W_dec = torch.eye(5)
    out = steer_add(
        torch.zeros(4, 5),
        torch.tensor([3, 0, 1]),
        torch.tensor([1, 0, 1]),
        torch.tensor([[2, -1], [0, 4]]),
        torch.tensor([[10.0, 99.0], [1.0, 2.0]]),
        W_dec,
    )
    assert out.tolist() == [[0, 0, 10, 0, 0], [1, 0, 0, 0, 2], [0] * 5, [1, 0, 0, 0, 2]]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_dense_reference(shape: tuple[int, ...]) -> None:
    args = problem(*shape)
    results = []
    for run in (steer_add, steer_add_reference):
        inputs = [args[i].clone().requires_grad_() for i in (0, 4, 5)]
        out = run(inputs[0], *args[1:4], *inputs[1:])
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append(torch.autograd.grad((out * weight).sum(), inputs))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)


def test_gradcheck() -> None:
    h, positions, set_ids, latent_ids, alphas, W_dec = problem(4, 3, 2, 3, 5, 6)
    inputs = [t.requires_grad_() for t in (h, alphas, W_dec)]

    def run(h: Tensor, alphas: Tensor, W_dec: Tensor) -> Tensor:
        return steer_add(h, positions, set_ids, latent_ids, alphas, W_dec)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("needed", [0, 4, 5])
def test_each_gradient_alone(needed: int) -> None:
    args = problem(5, 3, 2, 4, 6, 9)
    args[needed].requires_grad_()
    steer_add(*args).sum().backward()  # the sum's gradient has stride 0
    assert [i for i, t in enumerate(args) if t.grad is not None] == [needed]


def test_strided_inputs_and_int32() -> None:
    args = problem(6, 4, 3, 4, 10, 9)
    views = [t.repeat(*[2] * t.dim())[tuple(slice(n) for n in t.shape)] for t in args]
    views[5] = args[5].t().contiguous().t()
    views[3] = args[3].int()
    torch.testing.assert_close(steer_add(*views), steer_add(*args))
    for h in (args[0].t().contiguous().t(), args[0].repeat(2, 2)[:6, :10]):
        moved = h.clone(memory_format=torch.preserve_format)
        wanted = steer_add(h, *args[1:])
        steer_add_(moved, *args[1:])
        torch.testing.assert_close(moved, wanted)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (1, [0, 9], IndexError, r"positions must be in 0\.\.8, got 9"),
        (1, [-1, 0], IndexError, r"positions must be in 0\.\.8, got -1"),
        (1, [2, 2], ValueError, "positions must not repeat"),
        (2, [0, 3], IndexError, r"set_ids must be in 0\.\.2, got 3"),
        (3, [[-2] * 2] * 3, IndexError, r"latent_ids must be in -1\.\.6, got -2"),
    ],
)
def test_wrong_indices_are_errors(
    place: int, value: list[int], error: type[Exception], message: str
) -> None:
    args = problem(9, 2, 3, 2, 4, 7)
    args[place] = torch.tensor(value)
    with pytest.raises(error, match=message):
        steer_add(*args)


def test_wrong_shapes_are_named() -> None:
    h, positions, set_ids, latent_ids, alphas, W_dec = problem(9, 2, 3, 2, 4, 7)
    function = getattr(steer_add, "__wrapped__", steer_add)
    with pytest.raises(ValueError, match=r"alphas must be \[sets, latents\] = \[3, 2\]"):
        function(h, positions, set_ids, latent_ids, alphas[:1], W_dec)
    with pytest.raises(ValueError, match=r"W_dec must be \[d_sae, d_model\] = \[7, 4\]"):
        function(h, positions, set_ids, latent_ids, alphas, W_dec[:, :3])
    with pytest.raises(ValueError, match=r"set_ids must be \[spots\] = \[2\], got \[1\]"):
        function(h, positions, set_ids[:1], latent_ids, alphas, W_dec)


def test_in_place_refuses_to_lose_a_gradient() -> None:
    args = problem(9, 2, 3, 2, 4, 7)
    args[4].requires_grad_()
    with pytest.raises(ValueError, match="steer_add_ records no gradient: use steer_add"):
        steer_add_(*args)
    with torch.no_grad():
        steer_add_(*args)


def test_opcheck() -> None:
    args = problem(5, 3, 2, 4, 6, 9)
    torch.library.opcheck(steer_add_inplace_op, tuple(args))
    for i in (0, 4, 5):
        args[i].requires_grad_()
    torch.library.opcheck(steer_add_op, tuple(args))
