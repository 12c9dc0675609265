"""The frozen blocks taken apart, so that vectors can be sent back through each part alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.patching.sites import Edit
from saesteer.mechanisms.routes.frozen import FrozenNetwork
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel


class Piece:
    """One frozen block: its attention's reading and writing, and its MLP.

    The parts act on each token by itself, so vectors of different tokens share a backward.
    """

    def __init__(self) -> None:
        self.ends: dict[str, Tensor] = {}
        """What a part gave, with its graph."""
        self.starts: dict[str, Tensor] = {}
        """What a part was given: where its graph begins."""
        self.sequential = True

    @property
    def stream(self) -> Tensor:
        """The residual stream before the block, `[T, d_model]`."""
        return self.starts["resid_pre"].detach()[0]

    @property
    def v(self) -> Tensor:
        """`[H, T, d_head]`, of query heads."""
        return self.starts["v"].detach()[0]

    @property
    def pattern(self) -> Tensor:
        """`[H, T, T]`."""
        return self.ends["pattern"].detach()[0]

    def back(self, vectors: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors `[k, d_model]` on the block's output at `tokens`: on its input there by the
        stream and the MLP, and on the heads' outputs `[k, H, d_head]`."""
        entry = "resid_mid" if self.sequential else "resid_pre"
        on = vectors + self._back("mlp_out", entry, vectors, tokens)
        written = on if self.sequential else vectors
        return on, self._back("attn_out", "z", written, tokens)

    def back_through_v(self, vectors: Tensor, heads: Tensor, tokens: Tensor) -> Tensor:
        """Vectors `[k, d_head]` on v of heads at tokens: on the block's input there."""
        full = self.ends["v"].new_zeros(len(vectors), *self.v.shape[:1], self.v.shape[2])
        full[torch.arange(len(vectors)), heads] = vectors
        return self._back("v", "resid_pre", full, tokens.to(full.device))

    def _back(self, end: str, start: str, vectors: Tensor, tokens: Tensor) -> Tensor:
        """Rows of different tokens go back together: round r takes the r-th row of each token."""
        last, first = self.ends[end], self.starts[start]
        rank = torch.zeros_like(tokens)
        for token in tokens.unique():
            own = (tokens == token).nonzero()[:, 0]
            rank[own] = torch.arange(len(own), device=tokens.device)
        found = first.new_empty(len(vectors), *first.shape[2:])
        for turn in range(int(rank.max()) + 1):
            own = (rank == turn).nonzero()[:, 0]
            given = torch.zeros_like(last)
            if end == "v":  # [1, H, T, d_head]
                given[0, :, tokens[own]] = vectors[own].transpose(0, 1)
            else:
                given[0, tokens[own]] = vectors[own]
            (grad,) = torch.autograd.grad(last, first, given, retain_graph=True)
            found[own] = grad[0, tokens[own]]
        return found


class Pieces:
    """Every block of a frozen network, taken apart in one pass."""

    def __init__(self, net: FrozenNetwork) -> None:
        lm = net.lm
        self._pieces = [Piece() for _ in range(lm.n_layers)]
        edits: dict[tuple[int, str], Edit] = {}
        for layer, piece in enumerate(self._pieces):
            piece.sequential = _has_middle(lm, layer)
            sites = ["resid_pre", "v", "z", "attn_out", "mlp_out"]
            for site in [*sites, *(["resid_mid"] if piece.sequential else [])]:
                edits[layer, site] = _apart(piece, site)
            edits[layer, "pattern"] = _kept(piece)
        with torch.enable_grad():
            net.run(net.embeddings, edits)

    def __getitem__(self, layer: int) -> Piece:
        return self._pieces[layer]


def _apart(piece: Piece, site: str) -> Callable[[Tensor], Tensor]:
    """Keep what came, and let a copy pass at which a new graph begins."""

    def edit(values: Tensor) -> Tensor:
        piece.ends[site] = values
        piece.starts[site] = values.detach().clone().requires_grad_(True)
        return piece.starts[site]

    return edit


def _kept(piece: Piece) -> Callable[[Tensor], None]:
    return lambda values: piece.ends.update(pattern=values)


def _has_middle(lm: LanguageModel, layer: int) -> bool:
    """Whether the MLP reads what attention has written, rather than running beside it."""
    try:
        resolve_site(lm, layer, "resid_mid")
    except UsageError:
        return False
    return True
