"""Settings of a ranking. Imports no torch, because the command line's help reads these names."""

from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError, none_of
from saesteer.sae.config import check_sampling

READS = ("last", "template", "span", "reply")
"""Where samples are read: at the last token of the user's text, at the last prompt token, at the
instruction's tokens, or in the model's own reply."""

DETECTION = (
    "saif",
    "rate",
    "logodds",
    "mcnemar",
    "meandiff",
    "cohen",
    "welch",
    "paired-t",
    "auroc",
    "mi",
    "corr",
)
"""Scores of how well a latent distinguishes instructed texts from plain ones."""

OUTPUT = ("lens", "effect", "atp", "output")
"""Scores of what adding a latent's direction does to the model's output."""

SCORES = (*DETECTION, *OUTPUT, "fused", "causal")
"""All scores that latents can be ranked by."""

FILTERS = ("dense", "template", "duplicate", "fdr")
"""Filters on latents: active almost everywhere; active at the template and attention sinks; nearly
the direction of a better latent; not distinguishable from chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankConfig:
    """How samples are made, where they are read, and what ranks the latents."""

    by: str | None = None
    """One of `SCORES`; by default saif, or rate when replies are read."""
    read: str = "last"
    """Where a sample is read: one of `READS`."""
    position: str = "post"
    """The instruction after the content (`post`, the paper's better choice) or before (`pre`)."""
    pool: str = "max"
    """`max` or `mean` over the tokens of a span."""
    drop: tuple[str, ...] = ()
    """Filters that remove latents from the ranking: some of `FILTERS`. What the others would remove
    is reported."""
    max_fdr: float = 0.05
    """Largest false discovery rate (Benjamini-Hochberg) that the filter `fdr` keeps."""
    shuffles: int = 20
    """How often the texts are scored with shuffled labels, as a chance baseline."""
    contents: int = 48
    """Contents of the train split to use."""
    reply_variants: int = 2
    """Wordings that the model answers when replies are read; other reads use all of them."""
    all_replies: bool = False
    """Also use instructed replies that fail the task's check."""
    effect_contents: int = 16
    """Contents on whose answers the gradients of `effect` and `atp` are taken."""
    candidates: int = 100
    """Latents that `output` is measured for: the best by the scores computed before."""
    shortlist: int = 20
    """Latents that `causal` steers with, the best by `fused`."""
    causal_contents: int = 8
    """Train contents that are answered for `causal`."""
    doses: tuple[float, ...] = (0.3, 0.6)
    """Relative doses ||delta|| / ||h|| that `causal` tries, the same for every latent."""
    max_new_tokens: int = 40
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 32
    max_norm_ratio: float = 10.0
    chat: bool | None = None
    """Send samples through the chat template; by default when there is one."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("`read`", self.read, READS),
            ("`by`", self.resolved_by, SCORES),
            ("`position`", self.position, ("post", "pre")),
            ("`pool`", self.pool, ("max", "mean")),
            *(("`drop`", one, FILTERS) for one in self.drop),
        ):
            if value not in allowed:
                raise none_of(name, allowed, value)
        if self.read == "reply" and self.resolved_by == "saif":
            raise UsageError(
                "`by` saif compares single positions and `read` reply reads many: "
                "use `by` rate or meandiff"
            )
        for name, count in (
            ("`contents`", self.contents),
            ("`reply_variants`", self.reply_variants),
            ("`effect_contents`", self.effect_contents),
            ("`candidates`", self.candidates),
            ("`shortlist`", self.shortlist),
            ("`causal_contents`", self.causal_contents),
            ("`max_new_tokens`", self.max_new_tokens),
            ("`batch_size`", self.batch_size),
        ):
            if count < 1:
                raise UsageError(f"{name} must be at least 1, got {count}")
        check_sampling(self.temperature, self.top_p, self.batch_size)
        if self.shuffles < 0:
            raise UsageError(f"`shuffles` must be at least 0, got {self.shuffles}")
        if not self.max_norm_ratio > 1:
            raise UsageError(f"`max_norm_ratio` must be above 1, got {self.max_norm_ratio}")
        if not 0 < self.max_fdr <= 1:
            raise UsageError(f"`max_fdr` must be above 0 and at most 1, got {self.max_fdr}")
        if not self.doses or not all(0 < dose < float("inf") for dose in self.doses):
            raise UsageError(f"`doses` must be positive numbers, got {self.doses}")

    @property
    def resolved_by(self) -> str:
        """The score that latents are ranked by: `by`, or its default."""
        return self.by or self.base

    @property
    def base(self) -> str:
        """The default detection score for this `read`; other scores build on it."""
        return "rate" if self.read == "reply" else "saif"

    @property
    def detection(self) -> str:
        """The detection score that stability and chance are measured with: `by` where it is one.

        In a reply of forty tokens almost every latent is active once, so the mean difference of
        replies replaces the firing rate there.
        """
        found = self.resolved_by if self.resolved_by in DETECTION else self.base
        return "meandiff" if self.read == "reply" and found == "rate" else found
