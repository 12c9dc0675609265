"""Whether the documents of one context are kept apart is proved, not hoped for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.forward_pass import model_inputs
from saesteer.sae.model.isolation import prove_isolation
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.text.contexts import ContextBatch

from .family_sites import build

Shared = Callable[..., LanguageModel]

LEAKING: dict[str, dict[str, Any]] = {
    "OPTConfig": {
        "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128,
    },
    "BloomConfig": {"vocab_size": 264, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "MambaConfig": {
        "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2", "mixtral"]
)
def test_families_that_keep_documents_apart(family: str, shared_lm: Shared) -> None:
    prove_isolation(shared_lm(family))


@pytest.mark.parametrize("name", LEAKING)
def test_a_leak_is_refused_wherever_text_is_read(name: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name)(**LEAKING[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    lm = wrap_model(model, None, name)
    ids = torch.arange(20).reshape(1, 20)
    contexts = ContextBatch(ids, ids >= 0, (ids >= 10).long(), torch.arange(1))
    for _ in range(2):  # the answer is remembered
        with pytest.raises(UserError, match=f"`isolate_documents` does not work with {name}: when"):
            model_inputs(lm, contexts, True)
    # Without a boundary there is nothing to leak.
    whole = ContextBatch(ids, ids >= 0, ids * 0, torch.arange(1))
    assert "position_ids" not in model_inputs(lm, whole, True)


def test_the_last_block_that_runs_is_compared() -> None:
    # Mllama's third block waits for an image.
    prove_isolation(wrap_model(build("mllama"), None, "mllama"))


def test_a_model_whose_upper_blocks_were_freed_is_tried_as_far_as_it_goes(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    lm.keep_only(1)
    prove_isolation(lm)
