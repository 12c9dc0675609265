"""The card: what its header says, and what of an older card stays."""

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
