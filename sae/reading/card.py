"""What is known of one latent, in plain values: a card, which a notebook and a page show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saesteer.sae.reading.pieces import visible

QUOTES = "“{}”"


@dataclass(frozen=True)
class Context:
    """A window of text in which a latent fires."""

    tokens: tuple[str, ...]
    acts: tuple[float, ...]
    """The latent's activation on each token; 0 on tokens that are left out, such as special
    ones."""
    index: int
    """The token that the window is shown for."""
    number: int
    """Number of the context in the text."""
    position: int
    """Place of that token in the context."""

    @property
    def act(self) -> float:
        """The activation that the window is shown for."""
        return self.acts[self.index]


@dataclass(frozen=True)
class QuantileContexts:
    """A part of the firings drawn at random, from weak to strong in parts of equal size."""

    low: float
    high: float
    """The weakest and the strongest firing of the part, in size."""
    firings: int
    """How many were drawn."""
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class LensToken:
    """A token whose logit the latent's direction raises, or lowers."""

    token: str
    logit: float


@dataclass(frozen=True)
class NearLatent:
    """Another latent that is near."""

    id: int
    value: float
    """A cosine, or a Jaccard index."""
    together: int | None = None
    """Rows on which both fire, by co-firing."""


@dataclass(frozen=True)
class Telling:
    """A token on which the latent fires far more often than text has it."""

    token: str
    z: float
    fired: int
    rows: int


@dataclass(frozen=True)
class TaskMark:
    """A ranking that holds the latent."""

    task: str
    rank: int
    score: float | None
    by: str
    """The score ranked by; empty for a plan without a ranking."""
    folder: str


@dataclass(frozen=True)
class Detection:
    """How well a description says in which windows the latent fires, on windows held out.

    The detection score of delphi (Paulo et al., arXiv 2410.13928).
    """

    positives: int
    """Windows in which it fires."""
    found: int
    """Those that the description was taken to fit."""
    negatives: int
    """Windows in which it does not."""
    refused: int
    """Those that it was taken not to fit."""
    unanswered: int = 0
    """Windows for which the judge gave no answer; they count as wrong."""

    @property
    def score(self) -> float | None:
        """Balanced accuracy: 0.5 is chance. None without windows of both kinds."""
        if not self.positives or not self.negatives:
            return None
        return (self.found / self.positives + self.refused / self.negatives) / 2


@dataclass(frozen=True)
class Description:
    """What a latent is about, in words."""

    text: str
    by: str
    """Who says so: `log-odds`, which is no model, or the name of a model."""
    detection: Detection | None = None


@dataclass(frozen=True)
class Raised:
    """A token that steering makes likelier after the prompt."""

    token: str
    before: float
    after: float
    """Its probability without steering, and with it."""


@dataclass(frozen=True)
class Steered:
    """What a neutral prompt becomes when the latent's direction is added."""

    prompt: str
    dose: float
    """Length of what is added, over that of the activation there."""
    completion: str
    baseline: str
    """The completion without steering."""
    kl: float
    """KL(steered || plain) of the next token, in nats."""
    raised: tuple[Raised, ...]


@dataclass(frozen=True)
class LatentCard:
    """One latent."""

    id: int
    rows: int
    """Rows measured."""
    fired: int
    """Rows on which it fires."""
    density: float
    max: float
    """The activation of largest size."""
    mean: float
    """Mean activation where it fires."""
    std: float
    histogram: tuple[tuple[float, float, int], ...]
    """Firings by size: lower and upper border of each bin, and how many; empty bins at both ends
    are left out."""
    top: tuple[Context, ...]
    """The strongest contexts, at most one window of each."""
    quantiles: tuple[QuantileContexts, ...]
    """Weakest first."""
    lens_up: tuple[LensToken, ...]
    lens_down: tuple[LensToken, ...]
    near: tuple[NearLatent, ...]
    """By the cosine of the decoder rows."""
    cofires: tuple[NearLatent, ...]
    """By the Jaccard index of where they fire."""
    telling: tuple[Telling, ...]
    descriptions: tuple[Description, ...]
    """The best first: a model's, where one was asked, then the one by log-odds."""
    tasks: tuple[TaskMark, ...] = ()
    steered: Steered | None = None

    @property
    def description(self) -> Description:
        """The first description."""
        return self.descriptions[0]

    def row(self) -> dict[str, Any]:
        """The card as a line of `latents.jsonl`, JSON-ready; activations in four digits."""
        return {
            "id": self.id,
            "density": self.density,
            "fired": self.fired,
            "rows": self.rows,
            "max": short(self.max),
            "mean": short(self.mean),
            "std": short(self.std),
            "histogram": [[short(low), short(high), n] for low, high, n in self.histogram],
            "top": [_context_row(context) for context in self.top],
            "quantiles": [
                {
                    "low": short(part.low),
                    "high": short(part.high),
                    "firings": part.firings,
                    "contexts": [_context_row(context) for context in part.contexts],
                }
                for part in self.quantiles
            ],
            "lens_up": [one.token for one in self.lens_up],
            "lens_up_logits": [short(one.logit) for one in self.lens_up],
            "lens_down": [one.token for one in self.lens_down],
            "lens_down_logits": [short(one.logit) for one in self.lens_down],
            "near": [{"id": one.id, "cosine": short(one.value)} for one in self.near],
            "cofires": [
                {"id": one.id, "jaccard": short(one.value), "rows": one.together}
                for one in self.cofires
            ],
            "telling": [
                {"token": one.token, "z": short(one.z), "fired": one.fired, "rows": one.rows}
                for one in self.telling
            ],
            "descriptions": [
                {
                    "text": one.text,
                    "by": one.by,
                    "detection": one.detection
                    and {
                        **{name: getattr(one.detection, name) for name in _DETECTION},
                        "score": one.detection.score,
                    },
                }
                for one in self.descriptions
            ],
            "tasks": [asdict(one) for one in self.tasks],
            "steered": self.steered and asdict(self.steered),
        }

    def _repr_html_(self) -> str:
        from saesteer.sae.reports.latent_card import card_html

        return card_html(self)

    def __repr__(self) -> str:
        return (
            f"LatentCard(id={self.id}, density={self.density:.3g}, max={self.max:.3g}, "
            f"description={self.description.text!r})"
        )


_DETECTION = ("positives", "found", "negatives", "refused", "unanswered")


def quoted(tokens: Sequence[str]) -> str:
    """Tokens in quotation marks, with line breaks and tabs shown."""
    return ", ".join(QUOTES.format(visible(token)) for token in tokens)


def short(value: float) -> float:
    """A number in four digits."""
    return float(f"{value:.4g}") if value else 0.0


def _context_row(context: Context) -> dict[str, Any]:
    return {
        "tokens": list(context.tokens),
        "acts": [short(act) for act in context.acts],
        "index": context.index,
        "context": context.number,
        "position": context.position,
    }
