"""The form of Gemma Scope 2 (report of December 2025): JumpReLU with prefixes that stand alone.

Three things on top of JumpReLU: the quadratic penalty of L0 is per token, a penalty on how often a
latent is active leaves few that are active nearly always, and prefixes of the latents reconstruct
by themselves, as in Matryoshka. The weight of the second is not published: here it costs a
twentieth of the reconstruction loss at the target.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import JumpReLUConfig, TrainConfig
from saesteer.sae.training.architecture import Architecture
from saesteer.sae.training.architectures.jumprelu import JumpReLU
from saesteer.sae.training.architectures.matryoshka import check_prefixes, prefix_ends

_FREQUENCY_SHARE = 0.05


@dataclass(frozen=True)
class GemmaScope2(JumpReLU):
    """JumpReLU with a quadratic penalty per token, one on frequent latents, and prefixes."""

    name: ClassVar[str] = "gemma-scope-2"
    own_config: ClassVar[tuple[str, ...]] = ("jumprelu", "prefixes")

    prefixes: tuple[int, ...] = ()
    """Numbers of latents; empty means the default shares of d_sae."""

    @classmethod
    def own_settings(cls, config: TrainConfig) -> dict[str, Any]:
        options, usual = config.jumprelu, JumpReLUConfig()
        if options.log_threshold:
            raise UsageError("`log_threshold` is no setting of `arch` gemma-scope-2: leave it out")
        if options.penalty == usual.penalty:
            options = replace(options, penalty="quadratic-per-token")
        return {"options": options, "prefixes": config.prefixes}

    def at_width(self, d_sae: int) -> Architecture:
        options = self.options
        if not options.frequency:
            options = replace(options, frequency=_FREQUENCY_SHARE / self.l0)
        return replace(self, prefixes=self.ends(d_sae), options=options)

    @property
    def start(self) -> float:
        # Over tokens L0 varies by about half of itself, which alone may cost a tenth.
        return 0.4 if self.coefficient is None else self.coefficient

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "prefixes": list(self.prefixes)}

    def ends(self, d_sae: int) -> tuple[int, ...]:
        return prefix_ends(self.prefixes, d_sae)

    def check(self, d_sae: int) -> None:
        super().check(d_sae)
        check_prefixes(self.prefixes, d_sae)

    def metadata(self) -> dict[str, Any]:
        return {**super().metadata(), "prefixes": list(self.prefixes)}
