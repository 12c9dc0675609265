"""The settings of synthetic activations. Imports no torch."""

from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Features with a hierarchy, correlations and Zipf's frequencies, superposed in few dimensions.

    Of the kind of SynthSAEBench (arXiv 2602.14687), which has d_model 768 and 16,384 features. The
    features' numbers are their ranks: 0 fires most often.
    """

    d_model: int = 256
    """Width of an activation."""
    features: int = 2048
    """True features; more than d_model of them are superposed."""
    highest_rate: float = 0.4
    """Share of samples in which feature 0 would fire."""
    lowest_rate: float = 5e-4
    """The same of the last feature."""
    zipf: float = 0.5
    """Exponent of the fall between both: the rate at rank r goes with r^-zipf."""
    roots: int = 16
    """Trees of features; 0 for none. A feature of a tree fires only where its parent does."""
    branching: int = 4
    """Children of each feature above the last level."""
    depth: int = 3
    """Levels below the roots."""
    exclusive: bool = True
    """Whether of the children of a feature only one fires at a time."""
    correlation_rank: int = 16
    """Hidden causes that features share; 0: features fire independently of each other."""
    correlation: float = 0.1
    """How strongly a feature follows each cause (standard deviation; 0.1 of 16 causes: 16 %)."""
    magnitude_spread: float = 0.15
    """Standard deviation of a firing feature's magnitude, over its mean; drawn per feature."""
    bias_length: float = 2.0
    """Length of a vector that is added to every activation; magnitudes are about 1."""
    seed: int = 0
    """Of features and samples."""

    def __post_init__(self) -> None:
        for name in ("d_model", "features"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("roots", "depth", "correlation_rank", "correlation", "magnitude_spread"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        if not 0 < self.lowest_rate <= self.highest_rate < 1:
            raise UsageError(
                "`lowest_rate` and `highest_rate` must rise between 0 and 1 exclusive, got "
                f"{self.lowest_rate:g} and {self.highest_rate:g}"
            )
        if self.zipf <= 0 or self.bias_length < 0:
            raise UsageError(
                f"`zipf` must be above 0 and `bias_length` at least 0, got {self.zipf:g} and "
                f"{self.bias_length:g}"
            )
        if self.roots and (self.branching < 1 or self.in_trees > self.features):
            raise UsageError(
                f"`roots` {self.roots} with `branching` {self.branching} and `depth` {self.depth} "
                f"need {self.in_trees} features, `features` is {self.features}: make the trees "
                "smaller"
            )
        if self.correlation_rank * self.correlation**2 >= 1:
            raise UsageError(
                f"`correlation_rank` times `correlation` squared must be below 1, got "
                f"{self.correlation_rank * self.correlation**2:g}"
            )

    @property
    def in_trees(self) -> int:
        """Features that belong to a tree."""
        total, level = 0, self.roots
        for _ in range(self.depth + 1):
            total += level
            level *= self.branching
        return total
