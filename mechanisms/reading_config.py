"""Settings of traces, instruction vectors and readings. No torch here, as in `config.py`."""

from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError, none_of


@dataclass(frozen=True)
class TraceConfig:
    """Which routes are followed."""

    beam: int = 64
    """Routes that are followed on in each block, those of the largest mass."""
    tau: float = 0.01
    """Routes below this share of the traced logit are dropped."""
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("beam", self.beam, 1)
        _at_least("seed", self.seed, 0)
        if not 0 <= self.tau < 1:
            raise UsageError(f"`tau` must be at least 0 and below 1, got {self.tau}")


@dataclass(frozen=True)
class AttributeConfig:
    """How replies are attributed to prompts."""

    max_new_tokens: int = 48
    target: str = "logprob"
    """What is attributed of each output token: logprob or prob."""
    method: str = "grad"
    """grad: gradient times embedding; ig: the gradient averaged over a line from the mean
    embedding; frozen: in the frozen network, where the sum is exact."""
    levels: int = 10
    """Steps that a column is rounded up to."""
    cut: int = 7
    """Levels up to this one count as nothing."""
    power: float = 4.0
    """p of the norm that a row's sum is divided by."""
    ig_steps: int = 16
    outputs: int | None = None
    """Output tokens to attribute, drawn by the seed; None for all."""
    ablate: int = 3
    """Prompt tokens whose embedding is replaced, to see what the reply loses."""
    chat: bool = True
    budget_minutes: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("target", self.target, ("logprob", "prob"))
        _one_of("method", self.method, ("grad", "ig", "frozen"))
        for name, least in (("max_new_tokens", 5), ("levels", 1), ("ig_steps", 1), ("ablate", 1)):
            _at_least(name, getattr(self, name), least)
        _at_least("seed", self.seed, 0)
        if self.outputs is not None:
            _at_least("outputs", self.outputs, 1)
        if not 0 <= self.cut < self.levels:
            raise UsageError(f"`cut` must be in 0..{self.levels - 1} (levels), got {self.cut}")
        if not self.budget_minutes > 0:
            raise UsageError(f"`budget_minutes` must be above 0, got {self.budget_minutes}")
        if not self.power > 1:
            raise UsageError(f"`power` must be above 1, got {self.power}")


WHAT = ("heads", "concepts")
RELATED = ("embeddings", "none")


@dataclass(frozen=True)
class DiffConfig:
    """Which weights of two models are compared, and on which words."""

    what: tuple[str, ...] = WHAT
    most: int = 100
    """Words on each side of a dimension of a head."""
    related: str = "embeddings"
    """Which pairs count: `embeddings` those whose centred cosine in the base's input embeddings is
    unusually high (a stand-in for word vectors), `none` all."""
    distance: tuple[int, ...] = (0,)
    """Tokens between query and key at which a rotary plane is read."""
    k: int = 300
    """Directions of an MLP's output that make its subspace."""
    top: int = 50
    """Words at each end of such a direction."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.what:
            raise UsageError(f"`what` must be of {', '.join(WHAT)}, got none")
        for one in self.what:
            _one_of("what", one, WHAT)
        _one_of("related", self.related, RELATED)
        for name in ("most", "k", "top"):
            _at_least(name, getattr(self, name), 1)
        if not self.distance or min(self.distance) < 0:
            raise UsageError(f"`distance` must be numbers of at least 0, got {self.distance}")
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True)
class ProbeConfig:
    """How states are told apart, grouped and moved."""

    site: str = "resid_post"
    """Read after each block: resid_post, attn_out or mlp_out. Layer 0 is the first block's input,
    layer l what is read in block l - 1."""
    folds: int = 5
    penalty: float = 1.0
    """Inverse strength of the penalty of logistic regression."""
    shuffles: int = 5
    """Fits with permuted labels, whose accuracy is subtracted."""
    n_init: int = 10
    """Starts of k-means, of which the tightest counts."""
    seeds: int = 1
    """Repetitions of k-means, averaged."""
    draws: int = 5
    """Random shifts beside each move of a centroid."""
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("site", self.site, ("resid_post", "attn_out", "mlp_out"))
        for name, least in (("folds", 2), ("shuffles", 1), ("n_init", 1), ("seeds", 1),
                            ("draws", 1)):  # fmt: skip
            _at_least(name, getattr(self, name), least)
        if not self.penalty > 0:
            raise UsageError(f"`penalty` must be above 0, got {self.penalty}")
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True)
class SymbolsConfig:
    """The symbolic instructions and the model that learns them."""

    tasks: int = 8
    templates: int = 4
    """Of each task, besides one of which only `shown` inputs are trained on."""
    shown: int = 1
    steps: int = 1400
    every: int = 200
    """Steps between checkpoints."""
    blocks: int = 4
    d_model: int = 64
    heads: int = 4
    lr: float = 1e-3
    batch: int = 128
    loss: str = "output"
    """`output` trains the answer alone, `all` every token."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tasks", 2), ("templates", 1), ("steps", 1), ("every", 1),
                            ("blocks", 1), ("heads", 1), ("batch", 1)):  # fmt: skip
            _at_least(name, getattr(self, name), least)
        if not 0 <= self.shown <= 5:
            raise UsageError(f"`shown` must be in 0..5 inputs, got {self.shown}")
        if not self.lr > 0:
            raise UsageError(f"`lr` must be above 0, got {self.lr}")
        if self.d_model % (2 * self.heads):
            raise UsageError(
                f"`d_model` {self.d_model} must be a multiple of 2 x {self.heads} heads"
            )
        _one_of("loss", self.loss, ("output", "all"))
        _at_least("seed", self.seed, 0)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise none_of(f"`{name}`", allowed, value)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"`{name}` must be at least {least}, got {value}")
