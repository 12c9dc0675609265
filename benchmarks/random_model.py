"""Language models with random weights, made from a config where there is no network."""

import torch

from saesteer.sae.model.language_model import LanguageModel, load_model, pick_dtype, wrap_model
from saesteer.sae.text.corpora import PythonDocs

SHAPES = {
    # Llama 3.2 1B.
    "random:1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "random:tiny": {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
END = "<|end|>"


def load(name: str, device: torch.device, dtype: str = "auto") -> LanguageModel:
    """`random:1b`, `random:tiny`, or any model that `load_model` knows."""
    if name not in SHAPES:
        return load_model(name, device=device.type, dtype=dtype)
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = _tokenizer()
    config = LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=pick_dtype(dtype, device), attn_implementation="sdpa"
        )
    return wrap_model(model.requires_grad_(False), tokenizer, name)


def _tokenizer():  # type: ignore[no-untyped-def]
    """Byte-level BPE of 4096 tokens, trained in a second on the Python language reference."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(PythonDocs().topics, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, unk_token=END
    )
