"""The card: what its header says, and what of an older card stays."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from saesteer.checkpoints.model_card import END, MARK, card

FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6}


def entry(model: str = "org/lm", **held_out: Any) -> dict[str, Any]:
    return {"sha256": "0" * 64, "model": {"name": model}, "held_out": held_out}


def header(text: str | None) -> dict[str, Any]:
    assert text is not None and text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_new_card() -> None:
    text = card(None, "me/saes", {"a": entry(fvu=FIGURE), "b": entry("/tmp/lm")}, "mit")
    assert header(text) == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "saelens"],
        "license": "mit",
        "base_model": ["org/lm"],
        "model-index": [
            {
                "name": "saes",
                "results": [
                    {
                        "task": {
                            "type": "sparse-autoencoder",
                            "name": "reconstruction of activations",
                        },
                        "dataset": {"name": "held-out text", "type": "text", "config": "a"},
                        "metrics": [
                            {
                                "type": "fvu",
                                "value": 0.5,
                                "name": "fraction of variance unexplained",
                                "args": {"interval_95": [0.4, 0.6]},
                            }
                        ],
                    }
                ],
            }
        ],
    }
    assert text is not None and f"---\n\n{MARK}\n# Sparse autoencoders: me/saes\n" in text
    assert text.endswith(f"{END}\n")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "smollm2-135m-instruct-q4"])
def test_a_built_in_name_is_given_as_its_repository(name: str) -> None:
    found = header(card(None, "me/saes", {"a": entry(name)}))
    assert found["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_datasets_of_the_hub_are_named() -> None:
    text = [{"name": name} for name in ("hf:org/set:en:train", "hf:plain", "python-docs", "a.txt")]
    local = {"name": "hf:/home/me/set"}
    found = header(card(None, "me/saes", {"a": {**entry(), "text": [*text, local]}}))
    assert found["datasets"] == ["org/set", "plain"]


def test_the_code_on_a_card_of_the_hub() -> None:
    text = card(None, "me/saes", {"a": entry("org/lm")})
    assert text is not None
    assert 'SAE.from_pretrained("me/saes", "a")' in text and 'load_model("org/lm")' in text
    crosscoder = {**entry("org/lm"), "places": ["x", "y"]}
    assert "plan_from_latents" not in str(card(None, "me/saes", {"a": crosscoder}))


def test_the_code_on_a_card_runs(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder above the shared one, whose name the card gives."""
    import torch

    from saesteer.checkpoints import push
    from saesteer.checkpoints.sae_file import SAESpec, save_sae

    spec = SAESpec(
        architecture="topk", d_model=32, d_sae=8, k=2, hook_name="blocks.1.hook_resid_post",
        hf_hook_name="model.layers.1", model_name=str(tiny_model_dir("llama")),
    )  # fmt: skip
    W_dec = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
    save_sae(tmp_path / "sae", spec, torch.randn(32, 8), torch.zeros(8), W_dec, torch.zeros(32))
    push(tmp_path / "sae", str(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", Path("shared/README.md").read_text(), flags=re.S)
    assert len(code) == 3
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    assert names["sae"].spec.d_sae == 8 and names["plan"].layer == 1


def test_a_card_without_figures_has_no_model_index() -> None:
    found = header(card(None, "me/saes", {"a": entry("")}))
    assert found == {"library_name": "saelens", "tags": ["sparse-autoencoder", "saelens"]}


def test_our_part_is_written_anew_and_the_rest_stays() -> None:
    first = card(None, "me/saes", {"a": entry(fvu=FIGURE)}, "mit")
    assert first is not None
    mine = ModelCard(first.replace(MARK, f"Before.\n\n{MARK}").replace(END, f"{END}\n\nAfter."))
    mine.data.language = "en"
    second = card(str(mine), "me/saes", {"a": entry(l0=FIGURE), "b": entry("org/other")})
    assert second is not None
    found = header(second)
    assert found["license"] == "mit" and found["language"] == "en"
    assert found["base_model"] == ["org/lm", "org/other"]
    (result,) = found["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["l0"]
    assert second.count(MARK) == second.count("# Sparse autoencoders") == 1
    assert f"Before.\n\n{MARK}" in second and f"{END}\n\nAfter.\n" in second
    assert card(second, "me/saes", {"a": entry(l0=FIGURE), "b": entry("org/other")}) == second


def test_results_of_others_stay() -> None:
    theirs = {
        "task": {"type": "probing"},
        "dataset": {"type": "x", "name": "X"},
        "metrics": [{"type": "accuracy", "value": 0.9}],
    }
    front = yaml.safe_dump({"model-index": [{"name": "mine", "results": [theirs]}]})
    before = f"---\n{front}---\n{MARK}\n{END}\n"
    found = header(card(before, "me/saes", {"a": entry(fvu=FIGURE)}))
    assert found["model-index"][0]["name"] == "mine"
    assert theirs in found["model-index"][0]["results"]
    assert len(found["model-index"][0]["results"]) == 2


@pytest.mark.parametrize("front", ["a: [", "- a", "model-index: [{}]"])
def test_a_broken_header_stays_as_it_is(front: str) -> None:
    text = card(f"---\n{front}\n---\n{MARK}\n{END}\n", "me/saes", {"a": entry()})
    assert text is not None and text.startswith(f"---\n{front}\n---\n{MARK}\n# Sparse")


def test_a_card_of_somebody_else_is_left_alone() -> None:
    assert card("# Mine\n", "me/saes", {"a": entry()}) is None
    assert card(f"{END} {MARK}", "me/saes", {"a": entry()}) is None
