"""How the rivals of benchmarks/harvest.py are set up: their arguments, and what a round is."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

BATCH_TOKENS = 2048
BATCHES_A_ROUND = 16
PASSES_A_ROUND = 8
"""Passes over a batch of contexts, for contenders that return no batches of tokens."""
Round = Callable[[], int]
"""Does some work and returns for how many tokens."""


def sae_lens(bench: Any, model: Any, hook: str) -> Round:
    """Batches of SAELens's ActivationsStore for a model that it accepts."""
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"text": bench.documents}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=bench.text.context,
        d_in=bench.lm.d_model,
        n_batches_in_buffer=20,
        total_training_tokens=1,
        store_batch_size_prompts=bench.text.batch_size,
        train_batch_size_tokens=BATCH_TOKENS,
        prepend_bos=True,
        normalize_activations="none",
        device=bench.lm.device,
        dtype=str(bench.lm.dtype).removeprefix("torch."),
    )
    store.next_batch()

    def run() -> int:
        return sum(len(store.next_batch()) for _ in range(BATCHES_A_ROUND))

    return run


def sae_lens_hf(bench: Any) -> Round:
    """SAELens on the Hugging Face model itself."""
    from sae_lens.load_model import HookedProxyLM

    name = f"{bench.lm.blocks_path}.{bench.layer}"
    proxy = HookedProxyLM(bench.lm.model, bench.lm.tokenizer, hook_names=[name])
    return sae_lens(bench, proxy, name)


def sae_lens_default(bench: Any) -> Round:
    """TransformerLens knows models by Hub name; here its own conversion of Llama is called."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    given = bench.lm.model.config
    if given.model_type != "llama":
        raise RuntimeError("only Llama-like models are converted here")
    rope = getattr(given, "rope_parameters", None) or {}
    cfg = HookedTransformerConfig(
        d_model=given.hidden_size,
        n_layers=given.num_hidden_layers,
        d_mlp=given.intermediate_size,
        d_head=given.hidden_size // given.num_attention_heads,
        n_heads=given.num_attention_heads,
        n_key_value_heads=given.num_key_value_heads,
        n_ctx=bench.text.context,
        d_vocab=given.vocab_size,
        act_fn="silu",
        eps=given.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        gated_mlp=True,
        rotary_adjacent_pairs=False,
        rotary_dim=given.hidden_size // given.num_attention_heads,
        rotary_base=rope.get("rope_theta", getattr(given, "rope_theta", 10_000)),
        original_architecture="LlamaForCausalLM",
        dtype=bench.lm.dtype,
        device=str(bench.lm.device),
        default_prepend_bos=False,
    )
    hooked = HookedTransformer(cfg, bench.lm.tokenizer, move_to_device=False)
    hooked.load_state_dict(convert_llama_weights(bench.lm.model, cfg), strict=False)
    hooked.to(bench.lm.device, print_details=False)
    ids = torch.randint(1000, 2000, (1, 16), device=bench.lm.device)
    hook = f"blocks.{bench.layer}.hook_resid_post"
    with torch.inference_mode():
        theirs = hooked.run_with_cache(ids, names_filter=hook)[1][hook].float()
        ours = bench.lm.model(ids, output_hidden_states=True).hidden_states[1].float()
        ours = ours if bench.layer == 0 else _at(bench, ids)
    off = float((theirs - ours)[:, 1:].norm() / ours[:, 1:].norm())
    if off > 0.1:
        raise RuntimeError(f"its conversion gives other activations (off by {off:.0%})")
    return sae_lens(bench, hooked, hook)


def _at(bench: Any, ids: torch.Tensor) -> torch.Tensor:
    from saesteer.sae.model.hooks import run_to

    return run_to(bench.lm, [bench.point], input_ids=ids)[bench.point.key].float()


def sparsify(bench: Any) -> Round:
    """The part of `sparsify.Trainer.fit` before its SAE: the whole base model under a hook."""
    import sparsify as _  # noqa: F401
    from datasets import Dataset
    from sparsify.data import chunk_and_tokenize

    rows = chunk_and_tokenize(
        Dataset.from_dict({"text": bench.documents}),
        bench.lm.tokenizer,
        max_seq_len=bench.text.context,
        num_proc=1,
    )
    loader = torch.utils.data.DataLoader(rows, batch_size=bench.text.batch_size)
    base = bench.lm.text_model

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()

    def run() -> int:
        tokens = 0
        got: list[torch.Tensor] = []
        hook = bench.point.module.register_forward_hook(
            lambda module, inputs, outputs: got.append(
                (outputs[0] if isinstance(outputs, tuple) else outputs).flatten(0, 1)
            )
        )
        with torch.no_grad():
            for _ in range(PASSES_A_ROUND):
                ids = next(batches)["input_ids"].to(bench.lm.device)
                base(ids)
                tokens += ids.numel()
        hook.remove()
        return tokens

    return run


def dictionary_learning(bench: Any) -> Round:
    """Batches of dictionary_learning's ActivationBuffer, which uses nnsight."""
    from dictionary_learning import ActivationBuffer
    from nnsight import LanguageModel as Traced

    traced = Traced(bench.lm.model, tokenizer=bench.lm.tokenizer)

    def texts() -> Iterator[str]:
        while True:
            yield from bench.documents

    module = traced
    for part in f"{bench.lm.blocks_path}.{bench.layer}".split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    buffer = ActivationBuffer(
        texts(),
        traced,
        module,
        d_submodule=bench.lm.d_model,
        n_ctxs=64,
        ctx_len=bench.text.context,
        refresh_batch_size=bench.text.batch_size,
        out_batch_size=BATCH_TOKENS,
        device=str(bench.lm.device),
    )
    next(buffer)

    def run() -> int:
        return sum(len(next(buffer)) for _ in range(BATCHES_A_ROUND))

    return run
