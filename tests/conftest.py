"""Shared fixtures: tiny random-weight models of many families, made from configs, no downloads.

The fast suite never touches the network: ``HF_HUB_OFFLINE`` is on, ``SAESTEER_CACHE`` is a
temporary folder, and a fast test that tries to reach another machine fails (``offline.py``).
``--run-slow`` runs the tests marked ``slow`` too; those see the real cache and the real network.

``-n auto`` runs a worker process a core; ``-n 0`` or nothing runs all in this one.

Nothing from ``saesteer`` is imported here at the top: the jaxtyping plugin has to install its
shape-checking import hook first.
"""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from .offline import Guard

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Read by tokenizers, wandb and child processes when they start.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")  # sae_lens pulls wandb in; it must never log

USER_CACHE = os.environ.get("SAESTEER_CACHE")

# The same examples at every run of the suite, so that a change is what makes it fail. A campaign
# (make test-durable) sets FUZZ_EXAMPLES and looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
if "FUZZ_EXAMPLES" not in os.environ:
    hypothesis.settings.load_profile("repeatable")

D_MODEL = 32
N_LAYERS = 4
VOCAB_SIZE = 400

MOST_WORKERS = 8
"""Every worker imports torch and builds the shared models itself, so more gain little."""

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "phi",
    "olmo2",
    "mistral",
    "mixtral",
    "gemma3_multimodal",
    "llava",
)
"""Every family ``tiny_lm`` can build; the last two are text towers inside multimodal wrappers."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with a default system line, as in SmolLM2."""


# ---------------------------------------------------------------------------------------------
# which tests run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-slow",
        action="store_true",
        help="also run the tests marked slow (minutes; they fetch a real model)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Worker processes for ``-n auto``: one a core, and 2 GB of memory for each."""
    if not hasattr(os, "sysconf"):
        return min(CORES, MOST_WORKERS)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(CORES, MOST_WORKERS, memory // (2 * 10**9)))


def pytest_configure(config: pytest.Config) -> None:
    # Read by torch, which nothing has imported yet, in this process, its workers and all children.
    # The models are tiny: a second thread gains little, and threads that wait for one another
    # while the cores have other work lose much.
    workers = config.getoption("numprocesses", None) or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(2, CORES // workers))))
    os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    # Threads that spin while they wait take a busy machine's cores from those that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # huggingface_hub reads this once, when it is imported.
    if not config.getoption("--run-slow"):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --run-slow"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="gpu: this machine has no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(report: pytest.TestReport) -> Iterator[None]:
    """Name a failure when it happens, not only at the end, which a stopped run never reaches."""
    status = yield
    if report.failed and status and status[1] in ("F", "E") and status[2] not in ("", None):
        category, letter, word = status
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message.partition("\n")[0] if crash else ""
        return category, f"\n{letter} {report.nodeid} {reason}\n", word
    return status


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests did not run and why, also without -rs."""
    counts: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        counts[reason] = counts.get(reason, 0) + 1
    for reason, count in sorted(counts.items()):
        terminalreporter.write_line(f"not run: {count} ({reason})", yellow=True)


# ---------------------------------------------------------------------------------------------
# environment

GUARD = Guard()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    GUARD.allow = item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session", autouse=True)
def offline_guard() -> Iterator[Guard]:
    with GUARD.installed():
        yield GUARD


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    """Fail a fast test that tried to reach another machine, even where the refusal was caught."""
    GUARD.refused.clear()
    yield
    assert not GUARD.refused, f"a fast test reached for {', '.join(GUARD.refused)}"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point the cache at a temporary folder, so that no test depends on earlier runs."""
    folder = tmp_path_factory.mktemp("saesteer-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAESTEER_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _user_cache_for_slow_tests(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give slow tests the user's own cache back: converting the real model once is enough."""
    if request.node.get_closest_marker("slow"):
        if USER_CACHE is None:
            monkeypatch.delenv("SAESTEER_CACHE", raising=False)
        else:
            monkeypatch.setenv("SAESTEER_CACHE", USER_CACHE)


@pytest.fixture
def short_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a dry run (and the doctor's) time a few batches, not six seconds of them."""
    from saesteer.sae.runs import harvest_prediction

    monkeypatch.setattr(harvest_prediction, "_TIMED_SECONDS", 0.0)


# ---------------------------------------------------------------------------------------------
# the tiny tokenizer


def _train_tokenizer() -> Any:
    """Byte-level BPE, 400 tokens, trained in memory on the Python language reference.

    As in SmolLM2: ids 0, 1, 2 are <|endoftext|>, <|im_start|>, <|im_end|>; padding reuses the
    end-of-turn token, so a mask guessed from the pad id is wrong and a test can notice.
    """
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "\n".join(topics[name] for name in sorted(topics))[:60_000]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


@pytest.fixture(scope="session")
def _trained_tokenizer() -> Any:
    return _train_tokenizer()


@pytest.fixture
def tiny_tokenizer(_trained_tokenizer: Any) -> Any:
    """A fresh copy of the 400-token tokenizer (ChatML template, offsets, pad = <|im_end|>)."""
    return copy.deepcopy(_trained_tokenizer)


# ---------------------------------------------------------------------------------------------
# the tiny models


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }


def _config(family: str) -> tuple[str, Any]:
    """Return the class to build and its tiny config."""
    import transformers as tf

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        # Tied weights would make a random model repeat its last token forever.
        "tie_word_embeddings": False,
        **ids,
    }
    grouped = {**common, "num_key_value_heads": 2}
    # Sequences in tests are longer than this, so both kinds of attention layer are exercised.
    gemma = {**grouped, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    match family:
        case "llama":
            return "LlamaForCausalLM", tf.LlamaConfig(**grouped)
        case "qwen2":
            # Real Qwen2 models have more embedding rows than their tokenizer has tokens.
            return "Qwen2ForCausalLM", tf.Qwen2Config(**{**grouped, "vocab_size": VOCAB_SIZE + 16})
        case "qwen3":
            return "Qwen3ForCausalLM", tf.Qwen3Config(**grouped, head_dim=8)
        case "gemma2":
            return "Gemma2ForCausalLM", tf.Gemma2Config(**gemma)
        case "gemma3":
            return "Gemma3ForCausalLM", tf.Gemma3TextConfig(**gemma)
        case "gpt2":
            return "GPT2LMHeadModel", tf.GPT2Config(
                vocab_size=VOCAB_SIZE,
                n_embd=D_MODEL,
                n_layer=N_LAYERS,
                n_head=4,
                n_positions=1024,
                tie_word_embeddings=False,
                **ids,
            )
        case "gpt_neox":
            return "GPTNeoXForCausalLM", tf.GPTNeoXConfig(**common)
        case "phi":
            return "PhiForCausalLM", tf.PhiConfig(**common)
        case "olmo2":
            return "Olmo2ForCausalLM", tf.Olmo2Config(**grouped)
        case "mistral":
            return "MistralForCausalLM", tf.MistralConfig(**grouped, head_dim=8, sliding_window=16)
        case "mixtral":
            return "MixtralForCausalLM", tf.MixtralConfig(
                **grouped, num_local_experts=4, num_experts_per_tok=2
            )
        case "gemma3_multimodal":
            return "Gemma3ForConditionalGeneration", tf.Gemma3Config(
                text_config=gemma,
                vision_config=_vision(),
                mm_tokens_per_image=4,
                image_token_index=VOCAB_SIZE - 1,
                boi_token_index=VOCAB_SIZE - 2,
                eoi_token_index=VOCAB_SIZE - 3,
                tie_word_embeddings=False,
                **ids,
            )
        case "llava":
            return "LlavaForConditionalGeneration", tf.LlavaConfig(
                text_config={**grouped, "model_type": "llama"},
                vision_config={**_vision(), "model_type": "clip_vision_model"},
                image_token_index=VOCAB_SIZE - 1,
                tie_word_embeddings=False,
                **ids,
            )
        case _:
            raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")


def build_tiny_model(family: str, seed: int = 0) -> Any:
    """Build one random-weight model: 4 blocks, width 32, float32, evaluation mode.

    The library's own init (std 0.02) leaves a tiny model almost linear with nearly constant
    outputs; here matrices keep the scale of their input, so tokens, positions and blocks all
    matter and greedy continuations vary.
    """
    import torch
    import transformers

    class_name, config = _config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def families() -> tuple[str, ...]:
    """The names ``tiny_lm`` takes."""
    return FAMILIES


@pytest.fixture(scope="session")
def tiny_lm(_trained_tokenizer: Any) -> Callable[..., tuple[Any, Any]]:
    """Make a tiny model and its tokenizer: ``model, tokenizer = tiny_lm("llama")``.

    Each call builds both afresh (milliseconds), with the same weights for the same ``seed``: no
    test can spoil another one's model.
    """

    def make(family: str = "llama", *, seed: int = 0) -> tuple[Any, Any]:
        return build_tiny_model(family, seed), copy.deepcopy(_trained_tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(
    tiny_lm: Callable[..., tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Save a tiny model and its tokenizer once: ``--model`` takes ``tiny_model_dir("llama")``.

    The folder is shared by the session: read it, never write to it.
    """
    folders: dict[tuple[str, int], Path] = {}

    def make(family: str = "llama", *, seed: int = 0) -> Path:
        if (family, seed) not in folders:
            model, tokenizer = tiny_lm(family, seed=seed)
            folder = tmp_path_factory.mktemp("models") / f"tiny-{family}-{seed}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[family, seed] = folder
        return folders[family, seed]

    return make
