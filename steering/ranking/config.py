"""What a ranking is asked to do. No torch here: the command line reads these names for its help."""

from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError

READS = ("last", "template", "span", "reply")
"""last token of the user's text; last prompt token; instruction tokens; the model's own reply."""

DETECTION = (
    "saif", "rate", "logodds", "mcnemar", "meandiff", "cohen", "welch", "paired-t", "auroc", "mi",
    "corr",
)  # fmt: skip
"""Scores that say how well a latent tells instructed texts from plain ones."""

OUTPUT = ("lens", "effect", "atp", "output")
"""Scores that say what writing a latent's direction does to what the model says."""

SCORES = (*DETECTION, *OUTPUT, "fused", "causal")
"""Everything a ranking can go by."""

FILTERS = ("dense", "template", "duplicate", "fdr")
"""What may be dropped: on almost everywhere; on at the template and attention sinks; nearly the
same direction as a better latent; not told from chance."""


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
    """Filters that take latents out of the ranking: some of `FILTERS`. What the others would take
    out is reported all the same."""
    max_fdr: float = 0.05
    """Largest false discovery rate (Benjamini-Hochberg) that the filter `fdr` lets pass."""
    shuffles: int = 20
    """Times that the texts are scored with shuffled labels, to show what chance finds."""
    contents: int = 48
    """Contents of the train split to use."""
    reply_variants: int = 2
    """Wordings that the model answers when replies are read; every selection wording otherwise."""
    all_replies: bool = False
    """Count instructed replies that fail the task's check too."""
    effect_contents: int = 16
    """Contents whose answers the gradients of `effect` and `atp` are taken on."""
    candidates: int = 100
    """Latents that `output` tries, the best by the scores before it."""
    shortlist: int = 20
    """Latents that `causal` steers with, the best by `fused`."""
    causal_contents: int = 8
    """Train contents that `causal` steers."""
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
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
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
        return self.by or self.base

    @property
    def base(self) -> str:
        """The detection score of this way of reading, where another score needs one as its base."""
        return "rate" if self.read == "reply" else "saif"

    @property
    def detection(self) -> str:
        """The detection score that stability is measured on: `by` itself where it is one.

        A reply of forty tokens fires almost any latent once, so the mean difference of replies
        stands for the firing rate there.
        """
        found = self.resolved_by if self.resolved_by in DETECTION else self.base
        return "meandiff" if self.read == "reply" and found == "rate" else found
