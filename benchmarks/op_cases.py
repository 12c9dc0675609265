"""One case for each op: its operands, the same in plain PyTorch, and its minimal work.

Bytes are counted as if nothing stayed in a cache: every operand once, and a matrix row each time
an example names it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from saesteer.kernels import ops

_NOISE = 2**26
"""Most random numbers held at once to draw latents."""
_LR, _BETAS = 1e-4, (0.9, 0.999)


@dataclass(frozen=True)
class Case:
    """One op on given operands."""

    op: str
    latents: str
    """How they were drawn, or `any` where the time does not depend on it."""
    ours: Callable[[], object]
    torch: Callable[[], object]
    counterpart: str
    """The operations of `torch`, for the table."""
    flops: float
    bytes: float


@dataclass(frozen=True)
class Operands:
    """Random operands of one size, on one device."""

    x: Tensor
    """`[batch, d_model]`"""
    W: Tensor
    """`[d_sae, d_model]`, of x's dtype."""
    acts: Tensor
    """`[batch, k]`, float32."""
    indices: Tensor
    """`[batch, k]`, int64."""
    latents: str

    @property
    def slots(self) -> int:
        """Entries of the batch: batch times k."""
        return self.indices.numel()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of W."""
        return self.W.shape[1] * self.W.element_size()

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, device=self.W.device, dtype=dtype)


def draw_latents(
    batch: int, d_sae: int, k: int, *, zipf: bool, generator: torch.Generator
) -> Tensor:
    """`[batch, k]` latents, distinct in a row and ascending, by Gumbel's trick."""
    weight = torch.zeros(d_sae)
    if zipf:
        weight = -torch.log(torch.randperm(d_sae, generator=generator) + 1.0)
    rows = max(1, _NOISE // d_sae)
    parts = []
    for start in range(0, batch, rows):
        noise = torch.rand(min(rows, batch - start), d_sae, generator=generator)
        gumbel = -(-noise.clamp_min(1e-12).log()).clamp_min(1e-12).log()
        parts.append((gumbel + weight).topk(k, dim=1).indices.sort(dim=1).values)
    return torch.cat(parts)


def make_operands(
    size: tuple[int, int, int, int], latents: str, dtype: torch.dtype, device: torch.device
) -> Operands:
    """Random operands of a size (d_model, d_sae, k, batch)."""
    d_model, d_sae, k, batch = size
    generator = torch.Generator().manual_seed(0)
    indices = draw_latents(batch, d_sae, k, zipf=latents == "zipf", generator=generator)
    x, W = (torch.randn(rows, d_model, generator=generator) for rows in (batch, d_sae))
    return Operands(
        x=x.to(device, dtype),
        W=F.normalize(W, dim=1).to(device, dtype),
        acts=torch.rand(batch, k, generator=generator).to(device),
        indices=indices.to(device),
        latents=latents,
    )


def encode_topk(o: Operands) -> Iterator[Case]:
    (batch, d_model), d_sae, k = o.x.shape, len(o.W), o.indices.shape[1]
    b, own = o.zeros(d_sae), o.zeros(d_sae, dtype=o.W.dtype)
    yield Case(
        "encode_topk",
        "any",
        lambda: ops.encode_topk(o.x, o.W, b, k),
        lambda: torch.addmm(own, o.x, o.W.T).relu().topk(k, dim=1, sorted=False),
        "addmm, relu, topk",
        flops=2 * batch * d_model * d_sae,
        bytes=(batch + d_sae) * o.row_bytes + 12 * o.slots,
    )


def encode_batchtopk(o: Operands) -> Iterator[Case]:
    (batch, d_model), d_sae, k = o.x.shape, len(o.W), o.indices.shape[1]
    b, own = o.zeros(d_sae), o.zeros(d_sae, dtype=o.W.dtype)
    yield Case(
        "encode_batchtopk",
        "any",
        lambda: ops.encode_batchtopk(o.x, o.W, b, k),
        lambda: torch.addmm(own, o.x, o.W.T).relu().flatten().topk(batch * k, sorted=False),
        "addmm, relu, topk of all",
        flops=2 * batch * d_model * d_sae,
        bytes=(batch + d_sae) * o.row_bytes + 12 * o.slots,
    )


def encode_above(o: Operands) -> Iterator[Case]:
    (batch, d_model), d_sae, k = o.x.shape, len(o.W), o.indices.shape[1]
    b, own = o.zeros(d_sae), o.zeros(d_sae, dtype=o.W.dtype)
    # Random rows of unit length: pre-activations are normal, and k of them are above this.
    floors = b + float(torch.special.ndtri(torch.tensor(1 - k / d_sae, dtype=torch.float64)))

    def plain() -> tuple[Tensor, Tensor]:
        pre_acts = torch.addmm(own, o.x, o.W.T)
        above = pre_acts > floors
        return pre_acts[above], above.nonzero()

    for name, capacity in (("", None), (", capacity 1.25 k", min(d_sae, 5 * k // 4) * batch)):
        yield Case(
            f"encode_above{name}",
            "any",
            lambda capacity=capacity: ops.encode_above(o.x, o.W, b, floors, capacity),
            plain,
            "addmm, compare, nonzero",
            flops=2 * batch * d_model * d_sae,
            bytes=(batch + d_sae) * o.row_bytes + 12 * o.slots,
        )


def sparse_decode(o: Operands) -> Iterator[Case]:
    acts, b_dec = o.acts.to(o.W.dtype), o.zeros(o.W.shape[1], dtype=o.W.dtype)
    dense = o.zeros(len(o.x), len(o.W), dtype=o.W.dtype)
    plain = {
        "embedding_bag": lambda: (
            F.embedding_bag(o.indices, o.W, per_sample_weights=acts, mode="sum") + b_dec
        ),
        "scatter, dense addmm": lambda: torch.addmm(
            b_dec, dense.zero_().scatter_(1, o.indices, acts), o.W
        ),
    }
    for name, theirs in plain.items():
        yield Case(
            "sparse_decode",
            o.latents,
            lambda: ops.sparse_decode(acts, o.indices, o.W, b_dec),
            theirs,
            name,
            flops=2 * o.slots * o.W.shape[1],
            bytes=(o.slots + len(o.x)) * o.row_bytes + 12 * o.slots,
        )


def decode_mse(o: Operands) -> Iterator[Case]:
    acts, b_dec = o.acts.to(o.W.dtype), o.zeros(o.W.shape[1], dtype=o.W.dtype)

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        decoded = F.embedding_bag(o.indices, o.W, per_sample_weights=acts, mode="sum")
        error = decoded + b_dec - o.x
        return error.square().sum(dim=1), error, torch.bmm(o.W[o.indices], error[:, :, None])

    yield Case(
        "decode_mse",
        o.latents,
        lambda: ops.decode_mse(acts, o.indices, o.W, b_dec, o.x),
        plain,
        "embedding_bag, index, bmm",
        flops=4 * o.slots * o.W.shape[1],
        # The rows of an example are read once; the second use finds them in the cache.
        bytes=(o.slots + 2 * len(o.x)) * o.row_bytes + 16 * o.slots,
    )


def decode_prefixes(o: Operands) -> Iterator[Case]:
    levels, b_dec = 4, o.zeros(o.W.shape[1])
    acts, indices = o.acts.flatten(), o.indices.flatten()
    cuts = torch.tensor([len(o.W) * level // levels for level in range(levels)], device=acts.device)
    counts = torch.searchsorted(o.indices, cuts.repeat(len(o.x), 1))
    rows = torch.arange(len(o.x), device=acts.device)[:, None] * o.indices.shape[1]
    starts = torch.cat([(rows + counts).flatten(), rows.new_tensor([len(indices)])])

    def plain() -> tuple[Tensor, ...]:
        dense = o.zeros(len(o.x), len(o.W), dtype=o.W.dtype)
        dense.scatter_(1, o.indices, o.acts.to(o.W.dtype))
        ends = [len(o.W) * level // levels for level in range(1, levels + 1)]
        errors = torch.stack(
            [(dense[:, :end] @ o.W[:end] - o.x).float() + b_dec for end in ends], dim=1
        )
        return errors.square().sum(dim=2), errors[:, -1], errors.flip(1).cumsum(1).flip(1)

    yield Case(
        f"decode_prefixes, {levels} levels",
        o.latents,
        lambda: ops.decode_prefixes(acts, indices, o.W, b_dec, o.x, starts, levels),
        plain,
        "scatter, dense products, cumsum",
        flops=4 * o.slots * o.W.shape[1],
        bytes=(o.slots + 2 * levels * len(o.x)) * o.row_bytes + 16 * o.slots,
    )


def gather_dot(o: Operands) -> Iterator[Case]:
    yield Case(
        "gather_dot",
        o.latents,
        lambda: ops.gather_dot(o.x, o.W, o.indices),
        lambda: torch.bmm(o.W[o.indices], o.x[:, :, None]),
        "index, bmm",
        flops=2 * o.slots * o.W.shape[1],
        bytes=(o.slots + len(o.x)) * o.row_bytes + 12 * o.slots,
    )


def sort_indices(o: Operands) -> Iterator[Case]:
    bounds = torch.arange(len(o.W) + 1, device=o.W.device)

    def plain() -> tuple[Tensor, Tensor]:
        keys, order = o.indices.flatten().sort(stable=True)
        return order, torch.searchsorted(keys, bounds)

    yield Case(
        "sort_indices",
        o.latents,
        lambda: ops.sort_indices(o.indices, len(o.W)),
        plain,
        "stable sort, searchsorted",
        flops=0,
        bytes=16 * o.slots + 8 * len(o.W),
    )


def _index_add(o: Operands) -> Tensor:
    """Gradient of one matrix as plain PyTorch has it: `[batch, k, d_model]` products, added up."""
    products = (o.acts[:, :, None] * o.x[:, None, :].float()).reshape(-1, o.x.shape[1])
    return o.zeros(*o.W.shape).index_add_(0, o.indices.flatten(), products)


def sparse_row_grads(o: Operands) -> Iterator[Case]:
    order = ops.sort_indices(o.indices, len(o.W))
    yield Case(
        "sparse_row_grads",
        o.latents,
        lambda: ops.sparse_row_grads(o.acts, o.indices, o.x, len(o.W), order),
        lambda: _index_add(o),
        "products, index_add_",
        flops=2 * o.slots * o.W.shape[1],
        bytes=o.slots * o.row_bytes + 4 * o.W.numel() + 20 * o.slots,
    )


def sparse_pair_grads(o: Operands) -> Iterator[Case]:
    order = ops.sort_indices(o.indices, len(o.W))
    yield Case(
        "sparse_pair_grads",
        o.latents,
        lambda: ops.sparse_pair_grads(o.acts, o.x, o.acts, o.x, o.indices, len(o.W), order),
        lambda: (_index_add(o), _index_add(o)),
        "twice products, index_add_",
        flops=4 * o.slots * o.W.shape[1],
        bytes=2 * o.slots * o.row_bytes + 8 * o.W.numel() + 24 * o.slots,
    )


def threshold_grads(o: Operands) -> Iterator[Case]:
    # A fifth of the pairs lie in the window; order and rows as a step has them.
    indices, thresholds = o.indices.flatten(), o.zeros(len(o.W)) + 0.4
    pre_acts, grads = o.acts.flatten(), o.acts.flatten().neg()
    starts = torch.arange(len(o.x) + 1, device=indices.device) * o.indices.shape[1]
    order = ops.sort_indices(indices, len(o.W), starts)
    price, width = grads.new_tensor(0.1), 0.2

    def plain() -> tuple[Tensor, Tensor]:
        own = thresholds[indices]
        distance = pre_acts - own
        pull = torch.where(distance.abs() < width / 2, (own * grads + price) / width, 0)
        return torch.where(distance > 0, grads, 0), o.zeros(len(o.W)).index_add_(0, indices, -pull)

    yield Case(
        "threshold_grads",
        o.latents,
        lambda: ops.threshold_grads(
            pre_acts, indices, thresholds, grads, price, width, order, starts
        ),
        plain,
        "index, compare, index_add_",
        flops=0,
        bytes=20 * o.slots + 8 * len(o.W),
    )


class _Adam:
    """torch.optim.Adam on one matrix, with the projection and normalisation of unit rows."""

    def __init__(self, W: Tensor, unit_rows: bool) -> None:
        self.param = F.normalize(W.float(), dim=1).requires_grad_()
        self.adam = torch.optim.Adam([self.param], lr=_LR, betas=_BETAS, fused=True)
        self.unit_rows = unit_rows
        self.name = "project, fused Adam, normalise" if unit_rows else "fused torch.optim.Adam"

    @torch.no_grad()
    def step(self, grad: Tensor) -> None:
        if self.unit_rows:
            grad = grad - (grad * self.param).sum(dim=1, keepdim=True) * self.param
        self.param.grad = grad
        self.adam.step()
        if self.unit_rows:
            self.param /= self.param.norm(dim=1, keepdim=True)


def _state(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    param = F.normalize(o.W.float(), dim=1)
    return param, torch.zeros_like(param), torch.zeros_like(param)


def _hyper(o: Operands) -> dict[str, object]:
    values = ops.adam_schedule(1, _LR, *_BETAS)
    return {"schedule": torch.tensor(values, dtype=torch.float64, device=o.W.device)}


def adam_rows_(o: Operands) -> Iterator[Case]:
    yield _adam(o, unit_rows=False)
    yield _adam(o, unit_rows=True)


def _adam(o: Operands, *, unit_rows: bool) -> Case:
    (param, first, second), theirs, hyper = _state(o), _Adam(o.W, unit_rows), _hyper(o)
    grad = 1e-3 * o.x.float().mean(dim=0) * torch.rand_like(param)
    return Case(
        f"adam_rows_{', unit_rows' if unit_rows else ''}",
        "any",
        lambda: ops.adam_rows_(param, grad, first, second, unit_rows=unit_rows, **hyper),
        lambda: theirs.step(grad),
        theirs.name,
        flops=0,
        bytes=7 * 4 * grad.numel(),  # param, gradient and moments read; all but it written
    )


def adam_sparse_rows_(o: Operands) -> Iterator[Case]:
    yield _adam_sparse(o, unit_rows=False)
    yield _adam_sparse(o, unit_rows=True)


def _adam_sparse(o: Operands, *, unit_rows: bool) -> Case:
    state, theirs, hyper = _state(o), _Adam(o.W, unit_rows), _hyper(o)
    order = ops.sort_indices(o.indices, len(o.W))
    scale = 1e-3
    return Case(
        f"adam_sparse_rows_{', unit_rows' if unit_rows else ''}",
        o.latents,
        lambda: ops.adam_sparse_rows_(
            *state, o.acts, o.indices, o.x, order, factor=scale, unit_rows=unit_rows, **hyper
        ),
        lambda: theirs.step(_index_add(o).mul_(scale)),
        f"products, index_add_, {theirs.name}",
        flops=2 * o.slots * o.W.shape[1],
        bytes=o.slots * o.row_bytes + 6 * 4 * o.W.numel() + 20 * o.slots,
    )


def auxk(o: Operands) -> Iterator[Case]:
    (batch, d_model), d_sae = o.x.shape, len(o.W)
    ids = torch.arange(0, d_sae, 10, device=o.W.device)
    k_aux = min(512, len(ids))
    residual, b_enc = 0.1 * o.x, o.zeros(d_sae)
    parameters = [t.clone().requires_grad_() for t in (o.W, b_enc.to(o.W.dtype), o.W)]

    def plain() -> tuple[Tensor, ...]:
        W_enc, b, W_dec = parameters
        pre_acts = o.x @ W_enc[ids].T + b[ids]
        best, chosen = pre_acts.topk(k_aux, dim=1, sorted=False)
        acts = torch.zeros_like(pre_acts).scatter(1, chosen, best.relu())
        variance = (residual - residual.mean(dim=0)).square().sum()
        loss = (acts @ W_dec[ids] - residual).square().sum() / variance
        return torch.autograd.grad(loss, parameters)

    yield Case(
        f"auxk, {len(ids)} dead",
        "any",
        lambda: ops.auxk(o.x, residual, o.W, b_enc, o.W, ids, k_aux),
        plain,
        "index, addmm, topk, autograd",
        flops=5 * 2 * batch * d_model * len(ids),  # encode, decode and three gradients
        bytes=(2 * batch + 4 * len(ids)) * o.row_bytes,
    )


MAKERS: dict[str, Callable[[Operands], Iterator[Case]]] = {
    make.__name__: make
    for make in (
        encode_topk,
        encode_batchtopk,
        encode_above,
        sparse_decode,
        decode_mse,
        decode_prefixes,
        gather_dot,
        sort_indices,
        sparse_row_grads,
        sparse_pair_grads,
        threshold_grads,
        adam_rows_,
        adam_sparse_rows_,
        auxk,
    )
}
"""By the name of the op. `kernels.py` leaves out names that `ops` does not have."""
