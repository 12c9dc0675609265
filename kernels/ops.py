"""The op layer: sparse autoencoder arithmetic on the active latents of each example.

Active latents come as a rectangle ``[batch, k]``, or where examples have different numbers of them
as one list ``[entries]`` with ``row_starts`` ``[batch + 1]`` (int64): the entries of example b are
``row_starts[b]:row_starts[b + 1]``. "slots" in a shape stands for either.

Every op takes CPU and CUDA tensors, checks their shapes and picks the Triton kernel, a compiled CPU
loop or the PyTorch twin by device and dtype (`saesteer.kernels.dispatch`). Both weight matrices are
held latent-major, ``[d_sae, d_model]``. Sums are accumulated in float32, or in float64 where an
operand is float64. All are registered with PyTorch (``torch.ops.saesteer.*``) and compile; those
that do not work in place differentiate.
"""

import torch
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor

from saesteer.kernels.adam_rows import adam_rows_op, adam_schedule
from saesteer.kernels.adam_sparse_rows import adam_sparse_rows_op
from saesteer.kernels.auxk import auxk_op
from saesteer.kernels.batchtopk_encode import batchtopk_encode_op
from saesteer.kernels.decode_mse import decode_mse_op
from saesteer.kernels.decode_prefixes import decode_prefixes_op
from saesteer.kernels.derivatives import gather_dot_op, sparse_decode_op, sparse_row_grads_op
from saesteer.kernels.operands import check, check_like_slots, check_matrix, check_rows, check_slots
from saesteer.kernels.sparse_pair_grads import sparse_pair_grads_op
from saesteer.kernels.sparse_row_grads import LatentOrder, sort_indices
from saesteer.kernels.threshold_encode import threshold_encode_op
from saesteer.kernels.threshold_grads import threshold_grads_op
from saesteer.kernels.topk_encode import topk_encode_op

__all__ = [
    "LatentOrder",
    "adam_rows_",
    "adam_schedule",
    "adam_sparse_rows_",
    "auxk",
    "decode_mse",
    "decode_prefixes",
    "encode_above",
    "encode_batchtopk",
    "encode_topk",
    "gather_dot",
    "sort_indices",
    "sparse_decode",
    "sparse_pair_grads",
    "sparse_row_grads",
    "threshold_grads",
]


def encode_topk(
    x: Float[Tensor, "batch d_model"],
    W_enc_rows: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """``relu`` of the k largest pre-activations ``x @ W_enc_rows.T + b_enc``, and their latents.

    Exact. Equal pre-activations are taken in order of latent index; NaN counts as 0. Latents are
    listed by ascending index and never twice. A row with fewer than k positive pre-activations has
    empty slots: value 0, the index of the next-best latent, and no gradient.

    Differentiable in x, W_enc_rows and b_enc through the activations. The dense pre-activations
    exist for a chunk of rows at a time, and are never kept for the backward pass.

    Returns:
        latent activations (float32, or float64 for float64 inputs) and latent indices (int64).

    Raises:
        ValueError: shapes disagree, or k is not in 1..d_sae.
    """
    _check_encoder(x, W_enc_rows, b_enc, k)
    acts, indices = topk_encode_op(x, W_enc_rows, b_enc, k)
    return acts, indices


def encode_batchtopk(
    x: Float[Tensor, "batch d_model"],
    W_enc_rows: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, " entries"], Int[Tensor, " entries"], Int[Tensor, " starts"]]:
    """The ``batch * k`` largest positive pre-activations of the whole batch, as ragged entries.

    Exact. Equal pre-activations are taken in order of example and latent. Latents are listed by
    ascending index within an example and never twice. There are always ``batch * k`` entries: where
    fewer pre-activations are positive (NaN is not) the rest hold 0, and have no gradient.

    Differentiable in x, W_enc_rows and b_enc through the activations. The dense pre-activations
    exist for a chunk of rows at a time, and are never kept for the backward pass.

    Returns:
        latent activations (float32, or float64 for float64 inputs), latent indices (int64), and
        row starts ``[batch + 1]`` (int64).

    Raises:
        ValueError: shapes disagree, or k is not in 1..d_sae.
    """
    _check_encoder(x, W_enc_rows, b_enc, k)
    acts, indices, row_starts = batchtopk_encode_op(x, W_enc_rows, b_enc, k)
    return acts, indices, row_starts


def encode_above(
    x: Float[Tensor, "batch d_model"],
    W_enc_rows: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    floors: Float[Tensor, " d_sae"],
    capacity: int | None = None,
) -> tuple[Float[Tensor, " entries"], Int[Tensor, " entries"], Int[Tensor, " starts"]]:
    """The pre-activations above the floor of their latent, as ragged entries.

    Latents are listed by ascending index within an example and never twice. NaN is above nothing.
    Without ``capacity`` the host waits for the device, which alone knows how many they are. With
    it there are always so many entries: those furthest above their floors where more are above
    (exact; of equal ones the earlier), and fillers where fewer are: latents that are not above,
    spread over the examples, with the value -inf. No filler means that some may have been left
    out. Not differentiable.

    Returns:
        pre-activations (float32, or float64 for float64 inputs), latent indices (int64), and row
        starts ``[batch + 1]`` (int64).

    Raises:
        ValueError: shapes disagree, or capacity is not in 0..batch * d_sae.
    """
    _check_encoder(x, W_enc_rows, b_enc, 1)
    d_sae = W_enc_rows.shape[0]
    check("floors", floors, (d_sae,), "d_sae")
    if capacity is not None and not 0 <= capacity <= len(x) * d_sae:
        raise ValueError(f"capacity must be in 0..{len(x) * d_sae} (batch * d_sae), got {capacity}")
    with torch.no_grad():
        values, indices, row_starts = threshold_encode_op(x, W_enc_rows, b_enc, floors, capacity)
    return values, indices, row_starts


def _check_encoder(x: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> None:
    check_matrix("x", x, "batch, d_model")
    check_matrix("W_enc_rows", W_enc_rows, "d_sae, d_model")
    d_sae = W_enc_rows.shape[0]
    check("W_enc_rows", W_enc_rows, (d_sae, x.shape[1]), "d_sae, d_model")
    check("b_enc", b_enc, (d_sae,), "d_sae")
    if not 0 < k <= d_sae:
        raise ValueError(f"k must be in 1..{d_sae} (d_sae), got {k}")


def sparse_decode(
    latent_acts: Float[Tensor, "*slots"],
    latent_indices: Int[Tensor, "*slots"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"] | None = None,
    row_starts: Int[Tensor, " starts"] | None = None,
) -> Float[Tensor, "batch d_model"]:
    """Add up the chosen decoder rows of each example, weighted by their activations, and b_dec.

    Indices may repeat; repeated rows are added twice. The result has the promoted dtype of
    latent_acts and W_dec. Differentiable in latent_acts, W_dec and b_dec, deterministically and
    with no tensor of [batch, d_sae] or [batch, k, d_model].

    Raises:
        ValueError: shapes disagree, or row_starts do not cut the entries into rows (their values
            are checked on the CPU only).
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    check_matrix("W_dec", W_dec, "d_sae, d_model")
    check_slots(latent_indices, row_starts)
    check_like_slots("latent_acts", latent_acts, latent_indices)
    if b_dec is not None:
        check("b_dec", b_dec, (W_dec.shape[1],), "d_model")
    out: Tensor = sparse_decode_op(latent_acts, latent_indices, W_dec, b_dec, row_starts)
    return out


def decode_prefixes(
    latent_acts: Float[Tensor, " entries"],
    latent_indices: Int[Tensor, " entries"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
    target: Float[Tensor, "batch d_model"],
    piece_starts: Int[Tensor, " starts"],
    levels: int,
) -> tuple[
    Float[Tensor, "batch levels"],
    Float[Tensor, "batch d_model"],
    Float[Tensor, "batch levels d_model"],
    Float[Tensor, " entries"],
]:
    """`decode_mse` of nested prefixes of the latents, in one pass.

    ``piece_starts`` ``[batch * levels + 1]`` are row starts of the entries cut into ``levels``
    pieces an example: level g adds the pieces up to g. Not differentiable: it gives gradients.

    Returns:
        squared error of every level; error of the last; sums of the errors of level g and those
        after it; and per entry the product of that sum, at the entry's level, with its decoder row.

    Raises:
        ValueError: shapes or piece_starts are wrong.
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    check_matrix("W_dec", W_dec, "d_sae, d_model")
    pieces = check_slots(latent_indices, piece_starts)
    check_like_slots("latent_acts", latent_acts, latent_indices)
    check("b_dec", b_dec, (W_dec.shape[1],), "d_model")
    check("target", target, (pieces // levels, W_dec.shape[1]), "batch, d_model")
    check("piece_starts", piece_starts, (len(target) * levels + 1,), "batch * levels + 1")
    with torch.no_grad():
        squared, last, suffix, act_grads = decode_prefixes_op(
            latent_acts, latent_indices, W_dec, b_dec, target, piece_starts, levels
        )
    return squared, last, suffix, act_grads


def gather_dot(
    vectors: Float[Tensor, "batch d_model"],
    matrix: Float[Tensor, "d_sae d_model"],
    latent_indices: Int[Tensor, "*slots"],
    row_starts: Int[Tensor, " starts"] | None = None,
) -> Float[Tensor, "*slots"]:
    """Dot product of each vector with the matrix rows that its example names.

    Accumulated and returned in float32 (float64 if an operand is). Differentiable in vectors and
    matrix.

    Raises:
        ValueError: shapes or row_starts are wrong.
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    check_matrix("matrix", matrix, "d_sae, d_model")
    batch = check_slots(latent_indices, row_starts)
    check("vectors", vectors, (batch, matrix.shape[1]), "batch, d_model")
    out: Tensor = gather_dot_op(vectors, matrix, latent_indices, row_starts)
    return out


def _check_order(order: LatentOrder | None, latent_indices: Tensor, d_sae: int) -> None:
    if order is None:
        return
    check("order.order", order.order, (latent_indices.numel(),), "entries")
    check("order.starts", order.starts, (d_sae + 1,), "d_sae + 1")
    if latent_indices.dim() == 2 and order.examples is not None:
        raise ValueError("`order` was sorted with `row_starts`, `latent_indices` are [batch, k]")
    if latent_indices.dim() == 1 and order.examples is None:
        raise ValueError("`order` was sorted without `row_starts`, `latent_indices` are [entries]")
    if order.examples is not None:
        check("order.examples", order.examples, (latent_indices.numel(),), "entries")


def sparse_row_grads(
    weights: Float[Tensor, "*slots"],
    latent_indices: Int[Tensor, "*slots"],
    rows: Float[Tensor, "batch d_model"],
    d_sae: int,
    order: LatentOrder | None = None,
    row_starts: Int[Tensor, " starts"] | None = None,
) -> tuple[Float[Tensor, "d_sae d_model"], Int[Tensor, " d_sae"]]:
    """Per latent, the weighted sum of the rows of the examples that name it.

    With ``order = sort_indices(latent_indices, d_sae, row_starts)`` several calls share one sort.
    Every sum is taken in batch order, so results repeat bit for bit. Latents that nothing names get
    zeros. Differentiable in weights and rows.

    Returns:
        the sums (float32, or float64 if an operand is), and per latent the number of weights other
        than 0 (int64): with latent activations as weights, how often it fired.

    Raises:
        ValueError: shapes or row_starts are wrong.
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    check_matrix("rows", rows, "batch, d_model")
    batch = check_slots(latent_indices, row_starts)
    check_like_slots("weights", weights, latent_indices)
    check("rows", rows, (batch, rows.shape[1]), "batch, d_model")
    _check_order(order, latent_indices, d_sae)
    grads, _, counts = sparse_row_grads_op(
        weights, latent_indices, rows, d_sae, row_starts, *(order or ())
    )
    return grads, counts


def sparse_pair_grads(
    weights_a: Float[Tensor, "*slots"],
    rows_a: Float[Tensor, "rows_a width_a"],
    weights_b: Float[Tensor, "*slots"],
    rows_b: Float[Tensor, "rows_b width_b"],
    latent_indices: Int[Tensor, "*slots"],
    d_sae: int,
    order: LatentOrder | None = None,
    row_starts: Int[Tensor, " starts"] | None = None,
) -> tuple[
    Float[Tensor, "d_sae width_a"],
    Float[Tensor, "d_sae width_b"],
    Float[Tensor, " d_sae"],
    Int[Tensor, " d_sae"],
]:
    """`sparse_row_grads` for two pairs of weights and rows that share their latents.

    For an SAE: (latent activations, errors) and (gradients of the pre-activations, inputs). Errors
    and inputs may differ in width. There is a row for each example, or one for every so many
    examples in a row: with ``row_starts`` that cut examples into pieces, the inputs need not be
    repeated for the pieces.

    Returns:
        the sums of a and of b, the sums of the weights b, and the nonzero weights a per latent.

    Raises:
        ValueError: shapes or row_starts are wrong.
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    batch = check_slots(latent_indices, row_starts)
    for name, weights, rows in (("a", weights_a, rows_a), ("b", weights_b, rows_b)):
        check_like_slots(f"weights_{name}", weights, latent_indices)
        check_rows(f"rows_{name}", rows, batch)
    _check_order(order, latent_indices, d_sae)
    grads_a, grads_b, sums_b, counts = sparse_pair_grads_op(
        weights_a, rows_a, weights_b, rows_b, latent_indices, d_sae, row_starts, *(order or ())
    )
    return grads_a, grads_b, sums_b, counts


def decode_mse(
    latent_acts: Float[Tensor, "*slots"],
    latent_indices: Int[Tensor, "*slots"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
    target: Float[Tensor, "batch d_model"],
    row_starts: Int[Tensor, " starts"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_model"], Float[Tensor, "*slots"]]:
    """Squared error of the decoded vectors, the error itself, and the slots' part of its gradient.

    In one pass. Apart, where something has to come in between (partial reconstructions of several
    devices to add up, say), it is ``error = sparse_decode(latent_acts, latent_indices, W_dec,
    b_dec) - target``, ``error.square().sum(1)`` and ``gather_dot(error, W_dec, latent_indices)``.

    Returns:
        ``|error|^2`` of each example; ``error = decoded - target``; and ``<error, W_dec[index]>``
        for every slot, half the derivative of the squared error by that activation. The first two
        are differentiable in latent_acts, W_dec, b_dec and target; the third is given for callers
        that take the gradient themselves, and carries none. Accumulated and returned in float32
        (float64 if an operand is).

    Raises:
        ValueError: shapes or row_starts are wrong.
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    check_matrix("W_dec", W_dec, "d_sae, d_model")
    batch = check_slots(latent_indices, row_starts)
    check_like_slots("latent_acts", latent_acts, latent_indices)
    check("b_dec", b_dec, (W_dec.shape[1],), "d_model")
    check("target", target, (batch, W_dec.shape[1]), "batch, d_model")
    squared_error, error, act_grads = decode_mse_op(
        latent_acts, latent_indices, W_dec, b_dec, target, row_starts
    )
    return squared_error, error, act_grads


def auxk(
    x: Float[Tensor, "batch d_model"],
    residual: Float[Tensor, "batch d_model"],
    W_enc_rows: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    ids: Int[Tensor, " dead"],
    k_aux: int,
    is_filler: Bool[Tensor, " dead"] | None = None,
) -> tuple[
    Float[Tensor, ""],
    Float[Tensor, "dead d_model"],
    Float[Tensor, " dead"],
    Float[Tensor, "dead d_model"],
]:
    """Auxiliary loss of the latents ``ids`` on ``residual``, and its gradients for those latents.

    ``is_filler`` marks entries of ``ids`` that only fill the list: they take no part. x and
    residual are data and get no gradient. See `saesteer.kernels.auxk` for the formula.

    Returns:
        the loss, and its gradients by ``W_enc_rows[ids]``, ``b_enc[ids]`` and ``W_dec[ids]``. The
        loss is differentiable in the three parameters.

    Raises:
        ValueError: shapes disagree, or k_aux < 1.
    """
    check_matrix("W_enc_rows", W_enc_rows, "d_sae, d_model")
    d_sae, d_model = W_enc_rows.shape
    check("W_dec", W_dec, (d_sae, d_model), "d_sae, d_model")
    check("b_enc", b_enc, (d_sae,), "d_sae")
    check_matrix("x", x, "batch, d_model")
    check("residual", residual, tuple(x.shape), "batch, d_model")
    if is_filler is not None:
        check("is_filler", is_filler, tuple(ids.shape), "dead")
    if k_aux < 1:
        raise ValueError(f"k_aux must be at least 1, got {k_aux}")
    loss, W_enc_grads, b_enc_grads, W_dec_grads = auxk_op(
        x, residual, W_enc_rows, b_enc, W_dec, ids, is_filler, k_aux
    )
    return loss, W_enc_grads, b_enc_grads, W_dec_grads


def threshold_grads(
    pre_acts: Float[Tensor, "*slots"],
    latent_indices: Int[Tensor, "*slots"],
    thresholds: Float[Tensor, " d_sae"],
    act_grads: Float[Tensor, "*slots"],
    price: Float[Tensor, "*priced"],
    bandwidth: float,
    order: LatentOrder | None = None,
    row_starts: Int[Tensor, " starts"] | None = None,
    *,
    to_input: bool = False,
) -> tuple[Float[Tensor, "*slots"], Float[Tensor, " d_sae"]]:
    """Straight-through gradients of JumpReLU, on its active and nearly active pairs alone.

    ``act_grads`` are the derivatives of the loss by the activations, ``price`` those of a penalty
    by one more active pair: one number (no axes), or one for each slot. A pair within half a
    ``bandwidth`` of its latent's threshold is in the window that moves the threshold, and with
    ``to_input`` the pre-activation as well (`saesteer.kernels.threshold_grads` has the formulas).
    The slots have to hold all pairs above the threshold less half a bandwidth; further ones, and
    the fillers of `encode_above`, change nothing. Not differentiable: it gives gradients.

    Returns:
        derivatives by the pre-activations and by the thresholds (float32, or float64 if an operand
        is), each sum in a fixed order.

    Raises:
        ValueError: shapes or row_starts are wrong, or bandwidth is not above 0.
        IndexError: an index is outside 0..d_sae-1 (checked on the CPU only).
    """
    check_slots(latent_indices, row_starts)
    check_like_slots("pre_acts", pre_acts, latent_indices)
    check_like_slots("act_grads", act_grads, latent_indices)
    if price.dim():
        check_like_slots("price", price, latent_indices)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0, got {bandwidth}")
    _check_order(order, latent_indices, len(thresholds))
    with torch.no_grad():
        grads, by_threshold = threshold_grads_op(
            pre_acts, latent_indices, thresholds, act_grads, price, bandwidth, to_input,
            row_starts, *(order or ()),
        )  # fmt: skip
    return grads, by_threshold


def _check_state(
    param: Tensor, moments: tuple[Tensor, Tensor], unit_rows: bool, schedule: Tensor
) -> None:
    if param.dim() not in (1, 2) or (unit_rows and param.dim() != 2):
        wanted = "two axes with unit_rows" if unit_rows else "one or two axes"
        raise ValueError(f"param must have {wanted}, got {list(param.shape)}")
    check("schedule", schedule, (3,), "rate, root, step")
    first, second = moments
    for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
        check(name, moment, tuple(param.shape), "the shape of param")
    half = param.dtype == torch.float32 and first.dtype == second.dtype == torch.bfloat16
    if not half and not first.dtype == second.dtype == param.dtype:
        raise ValueError(
            f"exp_avg and exp_avg_sq must be {param.dtype} like param (or both bfloat16 with a "
            f"float32 param), got {first.dtype} and {second.dtype}"
        )


def adam_rows_(
    param: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    *,
    schedule: Float[Tensor, " 3"],
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    unit_rows: bool = False,
    grad_scale: Float[Tensor, ""] | None = None,
    shadow: BFloat16[Tensor, "*shape"] | None = None,
) -> None:
    """One Adam step in place on param, exp_avg and exp_avg_sq (one or two axes); grad is only read.

    ``schedule`` holds what `adam_schedule` gives for the step, on param's device; float64 keeps all
    its digits. Without ``unit_rows`` this is torch.optim.Adam. With it, param is a matrix of unit
    rows: the part of each row's gradient along the row is removed before the step and the row is
    scaled back to length 1 after it. Rows of zeros stay zero. ``grad_scale`` multiplies the
    gradient; where it is NaN the step is left out. ``shadow`` receives param, rounded to bfloat16.
    bfloat16 moments (with a float32 param) are rounded at random, by bits that the element and the
    step decide.

    Raises:
        ValueError: shapes or dtypes disagree, or unit_rows on a vector.
    """
    _check_state(param, (exp_avg, exp_avg_sq), unit_rows, schedule)
    check("grad", grad, tuple(param.shape), "the shape of param")
    if shadow is not None:
        check("shadow", shadow, tuple(param.shape), "the shape of param")
    with torch.no_grad():
        adam_rows_op(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            shadow,
            schedule,
            grad_scale,
            beta1,
            beta2,
            eps,
            unit_rows,
        )


def adam_sparse_rows_(
    param: Float[Tensor, "d_sae d_model"],
    exp_avg: Float[Tensor, "d_sae d_model"],
    exp_avg_sq: Float[Tensor, "d_sae d_model"],
    weights: Float[Tensor, "*slots"],
    latent_indices: Int[Tensor, "*slots"],
    rows: Float[Tensor, "rows d_model"],
    order: LatentOrder,
    *,
    factor: float,
    schedule: Float[Tensor, " 3"],
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    unit_rows: bool = False,
    extra: Float[Tensor, "some d_model"] | None = None,
    extra_ids: Int[Tensor, " some"] | None = None,
    row_starts: Int[Tensor, " starts"] | None = None,
) -> tuple[Float[Tensor, " d_sae"], Int[Tensor, " d_sae"]]:
    """`sparse_row_grads` times ``factor``, plus ``extra`` at rows ``extra_ids``, then `adam_rows_`.

    ``order`` is `sort_indices(latent_indices, d_sae, row_starts)`; ``extra_ids`` are distinct.
    ``rows`` as in `sparse_pair_grads`. On the CPU no gradient of the size of param is made.

    Returns:
        per latent, ``factor`` times the sum of its weights, and how many of them are not 0.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check_matrix("param", param, "d_sae, d_model")
    _check_state(param, (exp_avg, exp_avg_sq), unit_rows, schedule)
    batch = check_slots(latent_indices, row_starts)
    check_like_slots("weights", weights, latent_indices)
    pieces = check_rows("rows", rows, batch, param.shape[1])
    _check_order(order, latent_indices, param.shape[0])
    if extra is not None and extra_ids is not None:
        check("extra", extra, (len(extra_ids), param.shape[1]), "some, d_model")
    with torch.no_grad():
        sums, counts = adam_sparse_rows_op(
            param,
            exp_avg,
            exp_avg_sq,
            weights,
            rows,
            *order,
            pieces,
            factor,
            schedule,
            beta1,
            beta2,
            eps,
            unit_rows,
            extra,
            extra_ids,
        )
    return sums, counts
