"""Settings of the calls in this package. No torch here, so that a command line loads fast."""

from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError

RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_SITES = ("q", "k", "v", "pattern", "z")
METRICS = ("logit-diff", "logprob", "prob", "prob-ratio", "logit", "rr", "accuracy", "kl")
FAST = ("atp", "atp*", "ig")
NO_GRADIENT = ("rr", "accuracy")
"""Metrics that jump: a gradient says nothing of them."""


@dataclass(frozen=True)
class PatchConfig:
    """A grid of patches, and what is measured."""

    sites: tuple[str, ...] = ("resid_post",)
    """What is patched: some of `RESIDUAL_SITES` and `HEAD_SITES`."""
    at: tuple[str, ...] = ("last",)
    """Position names, or `all` for every token of runs of equal length."""
    layers: tuple[int, ...] | None = None
    """Blocks; None for all."""
    heads: tuple[int, ...] | None = None
    """Query heads, where the site is one of heads; None for all."""
    direction: str = "noise"
    """`noise` puts values of the corrupt run into the clean one, `denoise` the other way."""
    metric: str | None = None
    """One of `METRICS`; None is `logit-diff` where every pair has a wrong answer, else
    `logprob`."""
    fast: str | None = None
    """A gradient shortcut, one of `FAST`; None patches exactly."""
    verify: int = 50
    """With a shortcut: how many of its largest nodes are patched exactly."""
    checks: int = 150
    """With a shortcut: how many more nodes, drawn over quantiles of its values."""
    ig_steps: int = 10
    """Points of the straight line of embeddings, for `ig`."""
    chat: bool = False
    """Whether texts go through the chat template."""
    allow_copies: bool = False
    """Whether an answer may begin with the query's own token, so that copying scores."""
    check_chance: bool = True
    """Refuse a model that does the task no better than chance: there is nothing to explain."""
    budget_minutes: float = 20.0
    """A longer grid, as predicted from its first batches, is refused."""
    seed: int = 0

    def __post_init__(self) -> None:
        _known("sites", self.sites, (*RESIDUAL_SITES, *HEAD_SITES))
        if not self.at:
            raise UsageError("`at` names no position: give last, first, a name of the pairs or all")
        _known("direction", (self.direction,), ("noise", "denoise"))
        if self.metric is not None:
            _known("metric", (self.metric,), METRICS)
        if self.fast is not None:
            _known("fast", (self.fast,), FAST)
            if self.metric in NO_GRADIENT:
                raise UsageError(
                    f"`fast` {self.fast} needs a metric with a gradient, got {self.metric}: use "
                    f"{', '.join(m for m in METRICS if m not in NO_GRADIENT)}"
                )
        for name in ("verify", "checks", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must be 0 or more, got {getattr(self, name)}")
        if self.fast is not None and self.verify + self.checks < 3:
            raise UsageError(
                f"`verify` {self.verify} and `checks` {self.checks} leave under 3 nodes to compare "
                "a shortcut with exact patches: it is never shown alone"
            )
        if self.ig_steps < 1:
            raise UsageError(f"`ig_steps` must be at least 1, got {self.ig_steps}")
        if not self.budget_minutes > 0:
            raise UsageError(f"`budget_minutes` must be above 0, got {self.budget_minutes}")


TAKEN = ("alone", "full")
VECTOR_METRICS = ("logit-diff", "logprob", "logit", "rr", "accuracy")


@dataclass(frozen=True)
class VectorConfig:
    """Which states of an instruction are put into which layers of a prompt without it."""

    sets: int = 1
    """Layers patched at once: 1 every single one, 2 all pairs as well, 3 triples of the eight best
    as well."""
    at: str = "query-first"
    """Token of the prompt without the instruction that gets the states."""
    taken: str = "alone"
    """Where the state of the instruction's last token is taken: from a run of the instruction
    `alone`, or of the `full` prompt."""
    doses: tuple[float, ...] = ()
    """None puts the instruction's state in the place of the prompt's. Numbers *add* so much of
    the difference of the two instead, all of them in turn."""
    layers: tuple[int, ...] | None = None
    metric: str | None = None
    """One of `VECTOR_METRICS`; None is as in `PatchConfig`."""
    chat: bool = False
    allow_copies: bool = False
    controls: bool = True
    """Also put in the other instruction, its words shuffled, a random direction of equal length,
    and the state of another query."""
    budget_minutes: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.sets <= 3:
            raise UsageError(f"`sets` must be 1, 2 or 3 layers at once, got {self.sets}")
        _known("taken", (self.taken,), TAKEN)
        if self.metric is not None:
            _known("metric", (self.metric,), VECTOR_METRICS)
            if self.sets > 1 and self.metric == "logit":
                raise UsageError(
                    "`metric` logit moves with all logits, so that sums of layers mean nothing: "
                    "use logit-diff or logprob with `sets` 2 and 3"
                )
        if self.sets > 1 and self.at == "last":
            raise UsageError(
                "`sets` 2 and 3 say nothing at the last token: the later layer overwrites the "
                "earlier one, which reaches no other token; use `at` query-first"
            )
        if len(set(self.doses)) != len(self.doses) or not all(dose > 0 for dose in self.doses):
            raise UsageError(f"`doses` must be different numbers above 0, got {self.doses}")
        if not self.budget_minutes > 0:
            raise UsageError(f"`budget_minutes` must be above 0, got {self.budget_minutes}")
        if self.seed < 0:
            raise UsageError(f"`seed` must be 0 or more, got {self.seed}")


@dataclass(frozen=True)
class LatentConfig:
    """Which latents are patched, and what counts as most of an effect."""

    verify: int = 50
    """Latents patched one by one: those of the largest first-order effects."""
    share: float = 0.8
    """Share of the site's effect that the fewest latents have to bring."""
    most: int = 128
    """Most latents together."""
    random: int = 3
    """Orders of random latents to compare with."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("verify", "most"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("random", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must be 0 or more, got {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise UsageError(f"`share` must be above 0 and at most 1, got {self.share}")


ABLATIONS = ("mean-position", "resample")
SCORES = ("logit-diff", "prob")
"""What a head can be scored by: it lowers one of these."""


@dataclass(frozen=True)
class CircuitConfig:
    """How a circuit is found, made smaller and tested."""

    top: tuple[int, ...] | None = None
    """Heads to take for each group; None takes every head that passes `fdr` and `least`."""
    fdr: float = 0.05
    """False discovery rate (Benjamini and Hochberg over all senders) of the one-sided sign test
    that a head lowers `score` in a group of pairs."""
    score: str = "logit-diff"
    """What a head is scored by: answer minus wrong logit, or `prob`, the answer's probability. The
    score is a ratio of means, the mean change over the mean in the clean run."""
    least: float = 0.01
    """Smallest loss, as a share, of a head that is taken: a sign test alone finds any effect that
    is always negative, however small. The 95 % interval of the loss must lie below 0 as well."""
    keep: float = 0.95
    """Heads are dropped while the circuit keeps this share of the model's logit difference; 1
    drops none."""
    ablate: str = "mean-position"
    """What heads outside of the circuit give: `mean-position`, their mean over prompts at the same
    token, or `resample`, what they give in the pair's corrupt run."""
    draws: int = 20
    """Random subsets of the circuit, for completeness."""
    random: int = 10
    """Random circuits of equal size at each position."""
    held_out: float = 0.5
    """Share of the pairs that no head is found on: the circuit is pruned and tested on these."""
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _known("ablate", (self.ablate,), ABLATIONS)
        _known("score", (self.score,), SCORES)
        for name in ("fdr", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.keep <= 1:
            raise UsageError(f"`keep` must be above 0 and at most 1, got {self.keep}")
        for name in ("least", "draws", "random", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"`{name}` must be 0 or more, got {getattr(self, name)}")
        if self.top is not None and min(self.top, default=0) < 1:
            raise UsageError(f"`top` must be counts of at least 1, got {self.top}")


@dataclass(frozen=True)
class MaskConfig:
    """How a mask over heads is learned."""

    lam: float = 0.01
    """Price of a head: the loss is the target's logit, negated, plus this times heads chosen."""
    lr: float = 0.1
    epochs: int = 20
    """Passes over the prompts; the one that does best on others is kept. A mask moves by at most
    `lr` a step, so that few prompts need many passes."""
    batch: int = 32
    seeds: int = 5

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch", "seeds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"`{name}` must be above 0, got {getattr(self, name)}")
        if self.lam < 0:
            raise UsageError(f"`lam` must be 0 or more, got {self.lam}")


@dataclass(frozen=True)
class ToyConfig:
    """How the two models are trained."""

    blocks: int = 2
    d_model: int = 64
    heads: int = 4
    steps: int = 400
    """Of the base model."""
    tuning_steps: int = 300
    lr: float = 3e-3
    batch: int = 96
    queries: int = 6
    """Boxes asked for in each row."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blocks", "d_model", "heads", "steps", "tuning_steps", "batch", "queries"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise UsageError(f"`lr` must be above 0, got {self.lr}")
        if self.d_model % self.heads or self.heads % 2:
            raise UsageError(
                f"`heads` must be even and divide `d_model` {self.d_model}, got {self.heads}"
            )


def _known(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Raise UsageError for a value that is none of `allowed`, for none at all, and for repeats."""
    wrong = [value for value in values if value not in allowed]
    if wrong or not values:
        came = repr(wrong[0]) if wrong else "none"
        raise UsageError(f"`{name}` must be of {', '.join(allowed)}, got {came}")
    if len(set(values)) != len(values):
        raise UsageError(f"`{name}` names one of {', '.join(values)} twice")
