"""The pairs of an example and a latent that take part in a pass, as entries or as a dense matrix.

Latents above a threshold of their own are few once training has settled, and nearly half of all at
the start of a ReLU. Rows gathered by entries are cheap for few pairs, whole products for many: the
density of each batch decides. Both forms have the same methods and give the same numbers, up to the
order of sums, so that an architecture says its mathematics once, by element: its tensors of pairs
have the shape of `Pairs.pre_acts`, `[entries]` or `[batch, d_sae]`.

Only the entries wait for a GPU, which alone knows how many they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.kernels.ops import encode_above, sort_indices, sparse_row_grads
from saesteer.sae.training.architecture import EntrySum, Parameters, Pass
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.mesh.decoding import decode, decode_levels

DENSE_FROM = {"cpu": 1 / 4, "cuda": 1 / 128}
"""Share of all pairs from which whole products are faster, by kind of device. On a CPU measured
(d_model 576, d_sae 9216, one thread: entries take 2.7 s where products take 3.5 s at 1/5, and 3.4 s
against 2.5 s at 1/3); on a GPU from the bytes that gathered rows move and the rate of products."""

_SAMPLE_ROWS = 64
"""Rows on which the share is estimated before the batch is encoded."""


@dataclass(frozen=True)
class Decoded:
    """What activations add up to, level by level (one level, or one for each prefix)."""

    squares: Float[Tensor, " levels"]
    """Sum over the batch of |reconstruction - target|^2."""
    last: Float[Tensor, "batch d_out"]
    """The error of the whole SAE."""
    suffix: Float[Tensor, "batch levels d_out"]
    """The sum of the errors of a level and of those after it."""
    act_grads: Tensor
    """By pair: <suffix error at the latent's level, its decoder row>."""
    ends: Sequence[int] = ()
    """Where the prefixes end; empty of one level."""
    row_starts: Tensor | None = None
    """Of entries: where each example's begin, or each level's of each example; None of a matrix."""

    @property
    def levels(self) -> int:
        """How many there are."""
        return len(self.squares)


class Pairs(ABC):
    """See the module's text; legend: B batch, F d_sae, E entries."""

    def __init__(self, x: Float[Tensor, "batch d_in"], d_sae: int, across: Across = ALONE) -> None:
        self.x = x
        self.d_sae = d_sae
        self.across = across
        """The processes that have other rows and latents."""

    pre_acts: Tensor
    """By pair."""

    @abstractmethod
    def of_latents(self, values: Float[Tensor, " d_sae"]) -> Tensor:
        """The value of each pair's latent, in a shape that combines with `pre_acts`."""

    @abstractmethod
    def of_examples(self, values: Float[Tensor, " batch"]) -> Tensor:
        """The value of each pair's example, in a shape that combines with `pre_acts`."""

    @abstractmethod
    def by_latent(self, weights: Tensor) -> Float[Tensor, " d_sae"]:
        """The sum over each latent's pairs in the rows of this process."""

    @abstractmethod
    def by_example(self, weights: Tensor) -> Float[Tensor, " batch"]:
        """The sum over each example's pairs with the latents of this process."""

    @abstractmethod
    def decode(
        self,
        acts: Tensor,
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "batch d_out"],
        ends: Sequence[int] = (),
    ) -> Decoded:
        """Reconstruct `target`, with the latents of all processes; with `ends`, at the end of each
        prefix of the latents as well."""

    @abstractmethod
    def as_pass(
        self,
        acts: Tensor,
        decoded: Decoded,
        derivatives: Tensor,
        **rest: object,
    ) -> Pass:
        """The pass of these activations.

        `derivatives` of the loss by the pre-activations, as `decoded.act_grads` times
        2 / (B O levels) in it. `rest` are the other fields of `Pass`, of which `dense` may hold
        further terms of any gradient.
        """

    def _factor(self, decoded: Decoded) -> float:
        """Of the derivative of mean over levels of |error|^2 / O by an error."""
        return 2 / max(1, decoded.last.numel() * self.across.row_parts * decoded.levels)


class Entries(Pairs):
    """Pairs as ragged entries."""

    def __init__(
        self,
        x: Float[Tensor, "batch d_in"],
        d_sae: int,
        found: tuple[Tensor, Tensor, Tensor],
        across: Across = ALONE,
    ) -> None:
        super().__init__(x, d_sae, across)
        self.pre_acts, self.indices, self.row_starts = found
        self._order = sort_indices(self.indices, d_sae, self.row_starts)
        examples = torch.arange(len(x), device=x.device)
        self.examples: Int[Tensor, " entries"] = examples.repeat_interleave(
            self.row_starts.diff(), output_size=len(self.indices)
        )

    def of_latents(self, values: Float[Tensor, " d_sae"]) -> Tensor:
        return values[self.indices]

    def of_examples(self, values: Float[Tensor, " batch"]) -> Tensor:
        return values[self.examples]

    def by_latent(self, weights: Tensor) -> Float[Tensor, " d_sae"]:
        ones = weights.new_ones((len(self.x), 1))
        sums, _ = sparse_row_grads(
            weights, self.indices, ones, self.d_sae, self._order, self.row_starts
        )
        return sums[:, 0]

    def by_example(self, weights: Tensor) -> Float[Tensor, " batch"]:
        # A difference of running sums has a fixed order on every device.
        sums = torch.nn.functional.pad(weights.double().cumsum(0), (1, 0))
        return sums[self.row_starts].diff().to(weights.dtype)

    def decode(
        self,
        acts: Tensor,
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "batch d_out"],
        ends: Sequence[int] = (),
    ) -> Decoded:
        if len(ends) <= 1:
            squared, error, act_grads = decode(
                acts, self.indices, W_dec, b_dec, target, self.row_starts, self.across
            )
            return Decoded(
                squared.sum()[None], error, error[:, None], act_grads, ends, self.row_starts
            )
        pieces = cut_at(self.indices, self.row_starts, ends)
        squared, last, suffix, act_grads = decode_levels(
            acts, self.indices, W_dec, b_dec, target, pieces, len(ends), self.across
        )
        return Decoded(squared.sum(dim=0), last, suffix, act_grads, ends, pieces)

    def as_pass(
        self,
        acts: Tensor,
        decoded: Decoded,
        derivatives: Tensor,
        **rest: object,
    ) -> Pass:
        factor, starts, order = self._factor(decoded), decoded.row_starts, self._order
        if decoded.levels > 1:
            # Each piece counts as an example of its own, with its suffix error; the pieces of an
            # example share its input.
            order = sort_indices(self.indices, self.d_sae, starts)
        dense = dict(rest.pop("dense"))  # type: ignore[call-overload]
        dense["b_dec"] = decoded.suffix[:, 0].sum(dim=0) * factor
        return Pass(
            latent_acts=acts,
            latent_indices=self.indices,
            order=order,
            decoder=EntrySum(acts, decoded.suffix.flatten(0, 1)),
            encoder=EntrySum(derivatives / factor, self.x),
            factor=factor,
            row_starts=starts,
            dense=dense,
            **rest,  # type: ignore[arg-type]
        )


class Matrix(Pairs):
    """All pairs of the batch, those that take no part too: these have weight 0 in every sum."""

    def __init__(
        self,
        x: Float[Tensor, "batch d_in"],
        pre_acts: Float[Tensor, "batch d_sae"],
        across: Across = ALONE,
    ) -> None:
        super().__init__(x, pre_acts.shape[1], across)
        self.pre_acts = pre_acts

    def of_latents(self, values: Float[Tensor, " d_sae"]) -> Tensor:
        return values[None]

    def of_examples(self, values: Float[Tensor, " batch"]) -> Tensor:
        return values[:, None]

    def by_latent(self, weights: Tensor) -> Float[Tensor, " d_sae"]:
        return weights.sum(dim=0)

    def by_example(self, weights: Tensor) -> Float[Tensor, " batch"]:
        return weights.sum(dim=1)

    def decode(
        self,
        acts: Tensor,
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "batch d_out"],
        ends: Sequence[int] = (),
    ) -> Decoded:
        blocks = _blocks(ends, self.d_sae)
        W_dec, acts = W_dec.to(acts.dtype), acts.contiguous()
        error = (b_dec.to(acts.dtype) - target).contiguous()
        errors = []
        if self.across.latent_parts == 1:
            for block in blocks:
                error = torch.addmm(error, acts[:, block], W_dec[block])
                errors.append(error)
        else:
            own = torch.stack([acts[:, block] @ W_dec[block] for block in blocks], dim=1)
            own = own if len(blocks) > 1 else own[:, 0]  # as entries do, in one exchange
            total = self.across.latents(own).view(len(acts), len(blocks), -1).cumsum(dim=1)
            errors = [one.contiguous() for one in (total + error[:, None]).unbind(dim=1)]
        squares = torch.stack([one.square().sum() for one in errors])
        suffix = list(errors)
        for level in range(len(errors) - 2, -1, -1):
            suffix[level] = errors[level] + suffix[level + 1]
        parts = [total @ W_dec[at].t() for at, total in zip(blocks, suffix, strict=True)]
        act_grads = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return Decoded(squares, errors[-1], torch.stack(suffix, dim=1), act_grads, ends)

    def as_pass(
        self,
        acts: Tensor,
        decoded: Decoded,
        derivatives: Tensor,
        **rest: object,
    ) -> Pass:
        factor = self._factor(decoded)
        W_dec = torch.cat(
            [
                acts[:, block].t() @ decoded.suffix[:, level]
                for level, block in enumerate(_blocks(decoded.ends, self.d_sae))
            ]
        ).mul_(factor)
        grads = {
            "W_dec": W_dec,
            "W_enc_rows": derivatives.t() @ self.x.to(derivatives.dtype),
            "b_enc": derivatives.sum(dim=0),
            "b_dec": decoded.suffix[:, 0].sum(dim=0) * factor,
        }
        for name, part in dict(rest.pop("dense")).items():  # type: ignore[call-overload]
            grads[name] = grads[name] + part if name in grads else part
        nothing = acts.new_empty(0)
        nowhere = torch.empty(0, dtype=torch.int64, device=acts.device)
        starts = torch.zeros(len(acts) + 1, dtype=torch.int64, device=acts.device)
        return Pass(
            latent_acts=nothing,
            latent_indices=nowhere,
            order=sort_indices(nowhere, self.d_sae, starts),
            decoder=EntrySum(nothing, decoded.last),
            encoder=EntrySum(nothing, self.x),
            factor=factor,
            row_starts=starts,
            dense=grads,
            fired=(acts != 0).sum(dim=0),
            **rest,  # type: ignore[arg-type]
        )


def find_pairs(
    x: Float[Tensor, "batch d_in"],
    parameters: Parameters,
    floors: Float[Tensor, " d_sae"],
    dense_from: float | None = None,
    across: Across = ALONE,
) -> Pairs:
    """The pairs whose pre-activation is above the floor of their latent, in the faster form.

    As a matrix it has the other pairs too. `dense_from` replaces `DENSE_FROM`: 0 always gives the
    matrix, more than 1 never.
    """
    W, b = parameters["W_enc_rows"], parameters["b_enc"]
    usual = DENSE_FROM.get(x.device.type, DENSE_FROM["cpu"])
    share = usual if dense_from is None else dense_from
    if share <= 1 and len(x):
        some = x[:: max(1, len(x) // _SAMPLE_ROWS)]
        if float((_products(some, W, b) > floors).float().mean()) >= share:
            return Matrix(x, _products(x, W, b), across)
    return Entries(x, len(W), encode_above(x, W, b, floors), across)


def _products(x: Tensor, W: Tensor, b: Tensor) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations, in float32 at least; bfloat16 operands are multiplied as they are on a
    GPU."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, W.dtype), torch.float32)
    if x.is_cuda and x.dtype == W.dtype == torch.bfloat16:
        return torch.mm(x, W.t(), out_dtype=torch.float32).add_(b)
    return torch.addmm(b.to(dtype), x.to(dtype), W.to(dtype).t())


def _blocks(ends: Sequence[int], d_sae: int) -> list[slice]:
    """The latents of each level."""
    ends = ends or (d_sae,)
    return [slice(a, b) for a, b in zip((0, *ends[:-1]), ends, strict=True)]


def cut_at(
    indices: Int[Tensor, " entries"], row_starts: Int[Tensor, " starts"], ends: Sequence[int]
) -> Int[Tensor, " pieces"]:
    """Row starts of the entries cut further, into a piece for each prefix of each example.

    Piece g of an example holds its latents from ends[g - 1] up to ends[g]. Latents ascend within an
    example.
    """
    d_sae, batch = ends[-1], len(row_starts) - 1
    examples = torch.arange(batch, device=indices.device)
    of_entry = examples.repeat_interleave(row_starts.diff(), output_size=len(indices))
    # Numbers, not a tensor: one made here would have to be copied to the device.
    bounds = torch.stack([examples * d_sae + start for start in (0, *ends[:-1])], dim=1).flatten()
    pieces = torch.searchsorted(of_entry * d_sae + indices, bounds)
    return torch.cat([pieces, row_starts[-1:]])
