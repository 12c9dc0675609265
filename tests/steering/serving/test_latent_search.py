"""Latents are found by words, from a file or by the logit lens."""

import json
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.serving.latent_search import LatentCard, LatentSearch, lens_cards, read_cards

from .server_help import sae_of

ROWS = [
    {
        "id": 7,
        "density": 0.04,
        "max": 3.5,
        "descriptions": [{"text": "fires on weather", "by": "log-odds"}, {"text": "other"}],
        "telling": [{"token": " rain", "z": 9.0}],
        "lens_up": [" wet", " rain"],
        "top": [{"tokens": ["It", " pours", "."], "acts": [0.0, 3.5, 0.0], "index": 1}],
    },
    {"id": 2, "lens_up": [" train", " rainy"]},
    {"id": 5},
]


def written(folder: Path, text: str | None = None) -> Path:
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n"
    (folder / "latents.jsonl").write_text(lines if text is None else text)
    return folder


def test_cards_of_a_file(tmp_path: Path) -> None:
    search = read_cards(written(tmp_path), 8)
    assert len(search) == 3 and search.source == "latents.jsonl"
    card = LatentCard(7, "fires on weather", (" rain", " wet", " pours"), 3.5, 0.04)
    # A whole token before a part of one; words of the description count too.
    assert [one.id for one in search.find("Rain", 9)] == [7, 2]
    assert search.find("weather", 9) == search.find("wet RAIN", 9) == search.find("7", 9) == [card]
    assert search.find("snow", 9) == []
    assert [one.id for one in search.find(" ", 2)] == [7, 2]
    assert search.cards([6, 7]) == [LatentCard(6, "", ()), card]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1 of latents.jsonl is no latent of this SAE"),
        ("[]\n", "line 1"),
        ('{"id": 1}\n{"id": 8}\n', "line 2 .* id must be in 0..7, got 8"),
        ('{"id": "1"}', "got '1'"),
        ('{"description": "x"}', "KeyError"),
        ('{"id": 1, "descriptions": [3]}', "TypeError"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_cards(written(tmp_path, text), 8)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder that `saesteer latents` wrote"):
        read_cards(tmp_path, 8)


def test_the_lens_names_the_tokens_that_a_row_raises_most(lm: LanguageModel) -> None:
    sae = sae_of(lm)
    search = lens_cards(lm, sae)
    assert isinstance(search, LatentSearch) and len(search) == sae.spec.d_sae
    row = sae.W_dec[9] / sae.W_dec[9].norm() * lm.d_model**0.5
    best = lm.unembed(lm.final_norm(row)).topk(8).indices.tolist()
    assert list(search.cards([9])[0].tokens) == [lm.tokenizer.decode([i]) for i in best]
    assert torch.equal(sae.W_dec, sae_of(lm).W_dec)
