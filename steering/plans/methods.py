"""The methods of steering, one row for each, and the units of doses.

A new method is a row in `METHODS`; one that neither adds a vector nor gives latents new values also
needs an edit in `hooking.edits`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

UNITS = ("raw", "sigma", "max", "rel")
"""Units of a dose: the value itself; sigma; the largest activation seen; the ratio
||delta|| / ||h||."""

_LATENT_UNITS = ("raw", "sigma", "max")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Properties of one method: what it does, what it needs, which exports can hold it."""

    adds: bool = False
    """Adds the same vector sum_j alpha_j d_j everywhere (with unit `rel`: per unit of ||h||)."""
    keeps_norm: bool = False
    """After adding, rescales the residual to the length it had before."""
    from_plain: bool = False
    """Adds the vector to what the residual would be without any edit, and puts the residual there;
    for scopes inside the prompt, over which a plain pass is made."""
    new_value: Callable[[Tensor, Tensor], Tensor] | None = None
    """From the latents' present values `[tokens, n]` and the doses `[n]` to new values; None where
    the edit does not depend on present values."""
    takes_dose: bool = True
    is_factor: bool = False
    """The dose is a factor, 1 where none is given, and has no unit."""
    units: tuple[str, ...] = _LATENT_UNITS
    grows: bool = False
    """Does nothing at scale 0 and more at every larger scale."""
    exports: tuple[str, ...] = ()
    """Formats of `exchange` that can hold it; further conditions are checked there."""

    @property
    def sums(self) -> bool:
        """Whether the doses weigh one sum of directions, whatever the latents are at present."""
        return self.adds or self.from_plain

    @property
    def reads_latents(self) -> bool:
        """Whether the edit depends on the present values of the latents."""
        return self.new_value is not None

    @property
    def adds_fixed_vector(self) -> bool:
        """Whether the residual moves by the added vector itself, so that ||delta|| is known."""
        return self.adds and not self.keeps_norm


METHODS: Mapping[str, Method] = MappingProxyType({
    # h + sum_j alpha_j d_j.
    "add": Method(
        adds=True, units=UNITS, grows=True, exports=("gguf", "steering-vectors", "lm-eval")
    ),
    "add-keep-norm": Method(adds=True, keeps_norm=True, units=UNITS, grows=True),
    # plain + sum_j alpha_j d_j, whatever edits before this one have left.
    "set-to": Method(from_plain=True),
    # New value a': v; max(a, v); min(a, v); v a; 0.
    "set": Method(new_value=lambda now, v: v.expand_as(now), exports=("lm-eval", "lm-eval-csv")),
    "min": Method(new_value=torch.maximum, grows=True),
    "max": Method(new_value=torch.minimum),
    "scale": Method(new_value=torch.mul, is_factor=True, units=("raw",)),
    "ablate": Method(
        new_value=lambda now, v: torch.zeros_like(now), takes_dose=False, units=("raw",)
    ),
    # h minus its projection onto the span of the directions.
    "project": Method(takes_dose=False, units=("raw",), exports=("lm-eval",)),
})  # fmt: skip
