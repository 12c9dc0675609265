"""What a model's config says it is, and the refusal of what is no causal language model.

Read before the weights, so that an encoder, an adapter or a folder of something else costs nothing.
"""

from pathlib import Path
from typing import Any

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json",
    "vocab.txt", "tekken.json", "sentencepiece.bpe.model",
)  # fmt: skip
_SAE_FILES = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz")


def check_folder(path: Path, name: str) -> None:
    """Refuse a folder that holds no model, or one cut short; `name` is what the user gave.

    Raises UserError.
    """
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"`model` {name} is {_adapter(path)}")
    if not (path / "config.json").is_file():
        raise UserError(f"`model` {name} holds no config.json: {_instead(path)}")
    for weights in sorted(path.glob("*.safetensors")):
        try:
            files.read_header(weights)
        except UserError as error:
            raise UserError(f"`model` {name}: {error}") from error
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(
            f"`model` {name} holds no tokenizer (no tokenizer.json or tokenizer_config.json): copy "
            "those files from the model it was made from"
        )


def check_config(config: dict[str, Any], name: str) -> None:
    """Refuse a config (the content of config.json) of what is no causal language model.

    Raises UserError.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    kind = config.get("model_type")
    if "auto_map" in config:
        return  # what it is, only its own code knows
    if not isinstance(kind, str):
        raise UserError(
            f"`model` {name} has a config.json without model_type: give the folder of a language "
            "model that transformers saved"
        )
    if kind not in CONFIG_MAPPING:
        from transformers import __version__

        raise UserError(
            f"`model` {name} is of the type {kind}, which transformers {__version__} does not "
            "know: upgrade it (pip install -U transformers), or give another model"
        )
    try:
        read = CONFIG_MAPPING[kind].from_dict(config)
    except Exception:  # values that its class refuses: loading says which
        return
    todo = "give a decoder that continues text, such as a Llama, Qwen, Gemma or GPT-2"
    if getattr(read, "is_encoder_decoder", False):
        raise UserError(
            f"`model` {name} is an encoder-decoder ({kind}), not a causal language model: {todo}"
        )
    causal = getattr(read, "is_decoder", False) or getattr(read, "causal", False)
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind in masked and not causal:
        raise UserError(
            f"`model` {name} is an encoder ({kind}), which fills gaps and is not a causal language "
            f"model: {todo}"
        )
    generating = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )  # fmt: skip
    if not any(kind in names for names in generating):
        raise UserError(
            f"`model` {name} is of the type {kind}, which is not a causal language model: {todo}"
        )


def check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    """Refuse a tokenizer that makes ids for which an embedding of `rows` rows has none.

    Special and added tokens beyond it are allowed where neither a text's beginning nor the chat
    template can hold them: padding, say, which the attention mask hides. Raises UserError.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    beyond = {token: i for token, i in vocabulary.items() if i >= rows}
    if not beyond:
        return
    added = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    used = [
        token
        for token in beyond
        if token not in added or token == tokenizer.bos_token or token in template
    ]
    if used:
        first = min(used, key=lambda token: beyond[token])
        raise UserError(
            f"`model` {name} has a vocabulary of {max(vocabulary.values()) + 1} tokens and an "
            f"embedding of {rows} rows, so {len(used)} tokens have none, first {first!r} (id "
            f"{beyond[first]}): give the tokenizer that belongs to these weights, or resize the "
            "embedding and train it"
        )


def _adapter(path: Path) -> str:
    try:
        config = files.read_json(path / ADAPTER_CONFIG)
    except UserError:
        config = {}
    kind = config.get("peft_type") or "PEFT"
    base = config.get("base_model_name_or_path") or "BASE"
    return (
        f"a {kind} adapter for {base}, not a whole model: merge the two "
        f"(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "
        f"{str(path)!r}).merge_and_unload().save_pretrained(FOLDER), and the tokenizer there too), "
        "and give FOLDER"
    )


def _instead(path: Path) -> str:
    """What to give in place of a folder that holds no model."""
    if gguf := sorted(path.glob("*.gguf")):
        return f"give the file {gguf[0]}"
    if any((path / file).is_file() for file in _SAE_FILES):
        return "it holds an SAE, which `sae` takes; give the language model's folder"
    if (path / "plan.yaml").is_file():
        return "it holds a plan, which `plan` takes; give the language model's folder"
    inner = sorted(file.parent for file in path.glob("*/config.json"))
    if not inner:  # a repository's folder in the Hub's cache
        inner = sorted(file.parent for file in path.glob("snapshots/*/config.json"))
    if inner:
        return f"give one of its folders, such as {inner[-1]}"
    return "give a folder with config.json"
