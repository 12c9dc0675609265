"""What is no causal language model is refused by its folder or config, in words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.model_kinds import check_config, check_folder, check_vocabulary

from .model_sources import refused

pytestmark = pytest.mark.usefixtures("fresh")


def said(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        check_config(config, "NAME")
    text = str(error.value)
    assert "\n" not in text and text.startswith("`model` NAME ")
    return text


def test_an_adapter_names_its_base_and_how_to_merge(tmp_path: Path) -> None:
    facts = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    for _ in range(2):  # also where a config lies beside it
        text = refused(tmp_path)
        assert "is a LORA adapter for org/base, not a whole model: merge the two" in text
        assert f"from_pretrained('org/base'), '{tmp_path}').merge_and_unload()" in text
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "adapter_config.json").write_text("{")
    assert "is a PEFT adapter for BASE" in refused(tmp_path)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("sae_weights.safetensors", "it holds an SAE, which `sae` takes"),
        ("plan.yaml", "it holds a plan, which `plan` takes"),
        ("step-100/config.json", "give one of its folders, such as {folder}/step-100"),
        ("snapshots/abc/config.json", "give one of its folders, such as {folder}/snapshots/abc"),
    ],
)
def test_a_folder_of_something_else_says_what_it_is(file: str, says: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert says.format(folder=tmp_path) in refused(tmp_path)


def test_a_folder_without_a_tokenizer(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), folder)
    check_folder(folder, "NAME")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer (no tokenizer.json" in refused(folder)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "is an encoder (bert), which fills gaps"),
        ({"model_type": "xlm-roberta"}, "is an encoder (xlm-roberta)"),
        ({"model_type": "modernbert"}, "is an encoder (modernbert)"),
        ({"model_type": "t5"}, "is an encoder-decoder (t5), not a causal language model"),
        ({"model_type": "bart"}, "is an encoder-decoder (bart)"),
        ({"model_type": "whisper"}, "is an encoder-decoder (whisper)"),
        ({"model_type": "clip"}, "of the type clip, which is not a causal language model"),
        ({"model_type": "no-such-type"}, "upgrade it (pip install -U transformers)"),
        ({"hidden_size": 8}, "a config.json without model_type"),
    ],
)
def test_what_is_no_causal_model_is_named(config: dict[str, Any], says: str) -> None:
    assert says in said(config)


def test_decoders_pass() -> None:
    """Also those that share a config with an encoder, and those only their own code knows."""
    for config in (
        {"model_type": "llama"}, {"model_type": "llava"}, {"model_type": "gpt2"},
        {"model_type": "bert", "is_decoder": True}, {"model_type": "own", "auto_map": {}},
        {"model_type": "bart", "is_encoder_decoder": False, "is_decoder": True},
    ):  # fmt: skip
        check_config(config, "NAME")


@pytest.mark.parametrize(
    "name", ["gpt-4o", "openai/gpt-4.1-mini", "o3-mini", "claude-sonnet-4-5", "gemini-2.5-pro"]
)
def test_models_behind_an_api_cannot_be_opened(name: str) -> None:
    text = refused(name)
    assert f"{name} runs on its maker's servers only" in text and "open weights" in text


@pytest.mark.parametrize(
    "name", ["openai/gpt-oss-20b", "gpt2", "xai-org/grok-1", "EleutherAI/gpt-j-6b", "o200k"]
)
def test_open_models_of_like_names_are_looked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "the Hub cannot be reached" in refused(name)


def test_a_misspelt_alias_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "(did you mean smollm2-135m-instruct?)" in refused("smollm-135m-instruct")


class Tokenizer:
    """As much of a tokenizer as the check reads."""

    def __init__(self, vocabulary: dict[str, int], bos: str | None = None, chat: str = "") -> None:
        self.vocabulary, self.bos_token, self.chat_template = vocabulary, bos, chat
        self.all_special_tokens = ["<pad>"]

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def get_added_vocab(self) -> dict[str, int]:
        return {token: i for token, i in self.vocabulary.items() if token.startswith("<")}


def test_tokens_beyond_the_embedding() -> None:
    check_vocabulary(Tokenizer({"a": 0, "b": 1}), 2, "NAME")
    # Padding is hidden from the model, and its id replaced.
    check_vocabulary(Tokenizer({"a": 0, "<pad>": 1}), 1, "NAME")
    for tokenizer, first in (
        (Tokenizer({"a": 0, "b": 1}), "'b' (id 1)"),
        (Tokenizer({"a": 0, "<s>": 1}, bos="<s>"), "'<s>' (id 1)"),
        (Tokenizer({"a": 0, "<turn>": 1}, chat="<turn>{{ x }}"), "'<turn>' (id 1)"),
    ):
        with pytest.raises(UserError) as error:
            check_vocabulary(tokenizer, 1, "NAME")
        text = str(error.value)
        assert "a vocabulary of 2 tokens and an embedding of 1 rows" in text and first in text
