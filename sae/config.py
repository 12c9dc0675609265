"""The settings of each stage, one frozen dataclass per stage. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.training.architectures import check_name

Progress = Callable[[str, int, int, str], None]
"""Called as `progress(stage, done, total, note)`; the command line draws it, a notebook may ignore
it."""


def no_progress(stage: str, done: int, total: int, note: str) -> None:
    """A `Progress` that shows nothing."""


def check_sampling(
    temperature: float, top_p: float, batch_size: int, max_new_tokens: int = 1
) -> None:
    """Raise UsageError for settings of generation that are out of range."""
    _at_least("`max_new_tokens`", max_new_tokens, 1)
    if temperature < 0:
        raise UsageError(f"`temperature` must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise UsageError(f"`top_p` must be in (0, 1], got {top_p}")
    _at_least("`batch_size`", batch_size, 1)


def _at_least(name: str, value: int | float, least: int | float) -> None:
    if value < least:
        raise UsageError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Which text goes through the language model, and how it is cut."""

    data: tuple[str, ...] = ("python-docs",)
    """Corpora: a text file, JSONL, Parquet or CSV with `text` or `messages`, a folder,
    `hf:DATASET[:config][:split]`, `python-docs`."""
    context: int = 256
    """Tokens per sequence; documents are packed, nothing is padded."""
    batch_size: int = 16
    """Sequences per forward pass of the language model; 0 takes what fits the memory."""
    replies_share: float = 0.5
    """Share of the contexts that hold the model's own replies, when there are any."""
    replies_tokens: int = 40
    """Longest of these replies, in tokens."""
    replies_temperature: float = 0.8
    """Temperature that they are sampled at; 0 is greedy."""
    replies_top_p: float = 0.95
    """Share of the probability that their tokens are drawn from."""
    epochs: int = 1
    """How often the corpus may be read."""
    max_norm_ratio: float = 10.0
    """Rows longer than this multiple of the running median norm (attention sinks) are left out."""
    isolate_documents: bool = False
    """Let attention see only the document that a token belongs to, not what is packed before it."""
    bos: str = "auto"
    """Whether contexts, and isolated documents, begin with the beginning-of-text token: `auto`
    does what the tokenizer does with a text, `always`, `never`."""
    exclude_template: bool = False
    """Leave out what the chat template writes around the messages of a chat."""
    compile: bool = False
    """Harvest and train with the model's blocks compiled: faster, with different rounding."""
    seed: int = 0
    """Seed of the order of the documents."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("`data` needs at least one corpus, got none: try python-docs")
        _at_least("`context`", self.context, 2)
        if self.batch_size < 0:
            raise UsageError(f"`batch_size` must be at least 1, or auto, got {self.batch_size}")
        _at_least("`epochs`", self.epochs, 1)
        if not 0 < self.replies_share < 1:
            raise UsageError(
                f"`replies_share` must be between 0 and 1 exclusive, got {self.replies_share}"
            )
        _at_least("`replies_tokens`", self.replies_tokens, 1)
        _at_least("`replies_temperature`", self.replies_temperature, 0)
        if not 0 < self.replies_top_p <= 1:
            raise UsageError(f"`replies_top_p` must be in (0, 1], got {self.replies_top_p}")
        if self.bos not in ("auto", "always", "never"):
            raise UsageError(f"`bos` must be auto, always or never, got {self.bos!r}")
        if not self.max_norm_ratio > 1:
            raise UsageError(f"`max_norm_ratio` must be above 1, got {self.max_norm_ratio}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig:
    """One pass of a corpus through a language model, activations written to shards."""

    layers: tuple[int, ...]
    """Blocks whose site is stored; negative counts from the end."""
    site: str = "resid_post"
    """`resid_post`, `resid_pre`, `resid_mid`, `attn_out`, `mlp_out`, or a module path."""
    tokens: int = 1_000_000
    """Activations to keep."""
    text: TextConfig = TextConfig()
    """The text to read."""
    store_dtype: str | None = None
    """`bfloat16`, `float16`, `float32`; by default bfloat16, or float32 with a float32 model."""
    shard_tokens: int = 65_536
    """Activations per shard file."""
    shuffle: bool = False
    """Write the rows of each shard in a random order drawn from the seed."""
    keep_positions: bool = False
    """Store each row's position in its context, and the number of the context, too."""
    rank_timeout: int = 600
    """Seconds that a process of torchrun waits for the others before it fails."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("`layer` needs at least one block index")
        if len(set(self.layers)) != len(self.layers):
            raise UsageError(f"`layer` names a block twice: {','.join(map(str, self.layers))}")
        _at_least("`tokens`", self.tokens, 1)
        _at_least("`shard_tokens`", self.shard_tokens, 1)
        _at_least("`rank_timeout`", self.rank_timeout, 1)
        if self.store_dtype not in (None, "bfloat16", "float16", "float32"):
            raise UsageError(
                f"`store_dtype` must be bfloat16, float16 or float32, got {self.store_dtype!r}"
            )


PENALTIES = ("quadratic", "quadratic-per-token", "step", "tanh")
"""Values of `JumpReLUConfig.penalty`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JumpReLUConfig:
    """How thresholds are trained; the formulas are in
    `saesteer.sae.training.architectures.jumprelu`."""

    penalty: str = "quadratic"
    """`quadratic`, `quadratic-per-token`, `step` or `tanh`."""
    bandwidth: float = 0.2
    """Full width of the window in which a threshold learns."""
    threshold: float | None = None
    """Where thresholds start; by default where about as many latents are active as aimed at."""
    units: str = "sqrt_d"
    """Of the two before and of `pre_act_loss`: `sqrt_d` for inputs of mean length sqrt(d_model), as
    they are trained on; `unit` for inputs of length 1."""
    to_input: bool = False
    """Whether pairs in the window move the encoder as well."""
    log_threshold: bool = False
    """Whether the logarithm of the threshold is the parameter."""
    pre_act_loss: float = 0.0
    """Weight of the loss of pre-activations below their threshold, beside a squared error that is
    summed over d_model."""
    frequency: float = 0.0
    """Weight of sum_i w_i (1 + w_i / knee), w_i the share of tokens on which latent i is active."""
    frequency_knee: float = 0.1
    """The share from which that grows faster."""

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise UsageError(f"`penalty` must be one of {', '.join(PENALTIES)}, got {self.penalty}")
        if self.units not in ("sqrt_d", "unit"):
            raise UsageError(f"`units` must be sqrt_d or unit, got {self.units!r}")
        for name, value in (("bandwidth", self.bandwidth), ("frequency_knee", self.frequency_knee)):
            if not 0 < value < float("inf"):
                raise UsageError(f"`{name}` must be above 0, got {value:g}")
        if self.threshold is not None and not 0 < self.threshold < float("inf"):
            raise UsageError(f"`threshold` must be above 0, got {self.threshold:g}")
        _at_least("`pre_act_loss`", self.pre_act_loss, 0)
        _at_least("`frequency`", self.frequency, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Training of one SAE or of the product of several layers, widths, k and seeds."""

    layers: tuple[int, ...] = ()
    """Blocks to train on; empty with shards means every layer they hold."""
    site: str = "resid_post"
    """The site to read; see `HarvestConfig.site`."""
    to_layer: int | None = None
    """With transcoders: the block that is reconstructed; by default the one that is read."""
    to_site: str | None = None
    """With transcoders: the site that is reconstructed; by default the same as `site`."""
    arch: str = "topk"
    """The kind of SAE: a name in `saesteer.sae.training.architectures`."""
    d_sae: tuple[int, ...] = ()
    """Numbers of latents; empty means 8 times d_model."""
    k: tuple[int, ...] = ()
    """Latents kept per token, for the architectures that keep a number of them; empty means 32."""
    l0: tuple[float, ...] = ()
    """Mean number of active latents per token aimed at, for the architectures whose penalty decides
    it; empty means 32."""
    coefficient: float | None = None
    """Where the coefficient of that penalty starts, from which it is controlled; by default a
    starting point of the architecture's own. Units: those of a reconstruction loss that is 1 for a
    reconstruction by the mean, with latents of an input of mean length 1."""
    sparsity_warmup_steps: int | None = None
    """Steps over which that coefficient rises from 0; by default a twentieth of the run."""
    jumprelu: JumpReLUConfig = JumpReLUConfig()
    """Details of `jumprelu` and `gemma-scope-2`."""
    prefixes: tuple[int, ...] = ()
    """Numbers of latents, up to d_sae, whose sums are trained to reconstruct by themselves, with
    `matryoshka` and `gemma-scope-2`; empty means 1/32, 3/32, 7/32, 15/32 and all of d_sae."""
    init_seed: tuple[int, ...] = (0,)
    """Seeds of the initialisation, one SAE each."""
    init_from: str | None = None
    """An SAE to start from, as `load_sae` takes it, in place of random weights."""
    tokens: int = 1_000_000
    """Activations to train on."""
    batch_tokens: int = 2048
    """Activations per optimiser step."""
    lr: float | None = None
    """Peak learning rate; by default `default_lr` of the widths and the number of steps."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default a twentieth of the run, at most 1000."""
    beta1: float = 0.9
    """Adam's decay of the mean of gradients; that of their squares is 0.999."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the learning rate falls to zero."""
    dtype: str = "auto"
    """Type of the SAE's matrices in products: `float32`, or `bfloat16` copies of float32 ones; by
    default bfloat16 on a GPU. On a CPU float32 is the fast one."""
    moments: str = "float32"
    """Type of Adam's moments of the matrices; `bfloat16` halves them and rounds at random."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all parameters together; by default no clipping."""
    micro_batch_tokens: int | None = None
    """Rows per pass; the gradients of a batch's passes are added up. By default one pass."""
    latent_shards: int = 1
    """Under torchrun: how many processes share the latents of each SAE out; the others share the
    rows of every batch out."""
    rank_timeout: int = 600
    """Seconds that a process of torchrun waits for the others before it fails."""
    cuda_graph: bool = False
    """Record a step on a GPU once and replay it: for narrow SAEs, where launching kernels takes
    most of a step."""
    auxk: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents; 0 switches it off."""
    dead_after_tokens: int | None = None
    """Activations without firing after which a latent counts as dead; by default
    min(10M, tokens / 4)."""
    buffer_tokens: int = 131_072
    """Activations in the shuffle buffer (at most half of `tokens`)."""
    checkpoint_every: int = 5_000_000
    """Activations between saved states; later where saving would take more than 1 % of the time."""
    keep_states: int = 2
    """How many of the newest saved states are kept; the one with the lowest FVU is kept as well."""
    seed: int = 0
    """Seed of the order of the data."""
    held_out_share: float = 0.05
    """Share of the rows, of shards or of text that is read more than once, that is not trained on
    but measured at the end; 0 trains on all. Where there is other text anyway, that is measured."""
    text: TextConfig = TextConfig()
    """Used when training live from a model."""

    def __post_init__(self) -> None:
        check_name(self.arch)
        if not self.init_seed:
            raise UsageError("`init_seed` needs at least one value")
        several = {
            "`layer`": self.layers,
            "`d_sae`": self.d_sae,
            "`k`": self.k,
            "`l0`": self.l0,
            "`init_seed`": self.init_seed,
        }
        for name, values in several.items():
            if len(set(values)) != len(values):
                raise UsageError(f"{name} names a value twice: {','.join(map(str, values))}")
        for k in self.k:
            _at_least("`k`", k, 1)
        for l0 in self.l0:
            if not 0 < l0 < float("inf"):
                raise UsageError(f"`l0` must be above 0, got {l0:g}")
        if self.coefficient is not None and not 0 < self.coefficient < float("inf"):
            raise UsageError(f"`coefficient` must be above 0, got {self.coefficient:g}")
        if self.sparsity_warmup_steps is not None:
            _at_least("`sparsity_warmup_steps`", self.sparsity_warmup_steps, 0)
        for prefix in self.prefixes[:1]:
            _at_least("`prefixes`", prefix, 1)
        if any(b <= a for a, b in zip(self.prefixes, self.prefixes[1:], strict=False)):
            raise UsageError(
                f"`prefixes` must rise, got {','.join(map(str, self.prefixes))}: each counts all "
                "latents from the first"
            )
        _at_least("`tokens`", self.tokens, 1)
        _at_least("`batch_tokens`", self.batch_tokens, 2)  # one row alone has no variance
        if self.tokens < 2 * self.batch_tokens:
            raise UsageError(
                f"`tokens` must be at least twice `batch_tokens` ({self.batch_tokens}), "
                f"got {self.tokens}"
            )
        if self.lr is not None and not 0 < self.lr < 1:
            raise UsageError(f"`lr` must be between 0 and 1, got {self.lr}")
        if self.warmup_steps is not None:
            _at_least("`warmup_steps`", self.warmup_steps, 0)
        if not 0 <= self.beta1 < 1:
            raise UsageError(f"`beta1` must be in 0..1, got {self.beta1}")
        if not 0 <= self.decay_share <= 1:
            raise UsageError(f"`decay_share` must be in 0..1, got {self.decay_share}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"`dtype` must be auto, float32 or bfloat16, got {self.dtype!r}")
        if self.moments not in ("float32", "bfloat16"):
            raise UsageError(f"`moments` must be float32 or bfloat16, got {self.moments!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"`clip_norm` must be above 0, got {self.clip_norm}")
        if self.micro_batch_tokens is not None:
            _at_least("`micro_batch_tokens`", self.micro_batch_tokens, 2)
        _at_least("`auxk`", self.auxk, 0)
        if self.dead_after_tokens is not None:
            _at_least("`dead_after_tokens`", self.dead_after_tokens, 1)
        if self.buffer_tokens < self.batch_tokens:
            raise UsageError(
                f"`buffer_tokens` must be at least `batch_tokens` ({self.batch_tokens}), "
                f"got {self.buffer_tokens}"
            )
        _at_least("`latent_shards`", self.latent_shards, 1)
        _at_least("`rank_timeout`", self.rank_timeout, 1)
        _at_least("`checkpoint_every`", self.checkpoint_every, 1)
        _at_least("`keep_states`", self.keep_states, 1)
        if not 0 <= self.held_out_share <= 0.5:
            raise UsageError(f"`held_out_share` must be in 0..0.5, got {self.held_out_share}")

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.tokens // self.batch_tokens

    @property
    def resolved_k(self) -> tuple[int, ...]:
        """`k`, or its default."""
        return self.k or (32,)

    @property
    def resolved_l0(self) -> tuple[float, ...]:
        """`l0`, or its default."""
        return self.l0 or (32.0,)

    @property
    def resolved_warmup_steps(self) -> int:
        """`warmup_steps`, or its default."""
        return min(1000, self.steps // 20) if self.warmup_steps is None else self.warmup_steps

    @property
    def resolved_dead_after_tokens(self) -> int:
        """`dead_after_tokens`, or its default."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(1, min(10_000_000, self.tokens // 4))


def default_lr(d_model: int, d_sae: int, steps: int) -> float:
    """Peak learning rate when none is given.

    Long runs follow 2e-4 / sqrt(d_sae / 2^14) (Gao et al., arXiv 2406.04093, appendix A.3). Up to
    tens of thousands of steps the best rate is larger, and falls with the root of their number:
    2.3 / sqrt(d_model * steps), measured from 64 steps on (see `docs/quality.md`). A rate that is
    some multiple of 1 / sqrt(d_model) is that part of an entry of a unit row.
    """
    published = 2e-4 * (2**14 / d_sae) ** 0.5
    return float(max(published, 2.3 * (d_model * max(64, steps)) ** -0.5))


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Measurement of an SAE on held-out text."""

    tokens: int = 50_000
    """Kept positions to measure on."""
    text: TextConfig = TextConfig()
    """The text to measure on."""
    bootstrap: int = 1000
    """Resamples of the documents behind each 95 % interval."""

    def __post_init__(self) -> None:
        _at_least("`tokens`", self.tokens, 2)
        _at_least("`bootstrap`", self.bootstrap, 1)
