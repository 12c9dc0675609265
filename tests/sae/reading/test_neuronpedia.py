"""The export has the files and fields that Neuronpedia imports."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading import neuronpedia
from saesteer.sae.reading.card import Description, Detection
from saesteer.sae.reading.neuronpedia import Names
from saesteer.sae.reading.result import Latents
from saesteer.sae.reading.site import save_latents
from saesteer.sae.verbs.latents import latents

from .small_sae import config, small_sae

# The columns of Neuronpedia's tables, as its import script reads them.
FEATURE = """
modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel
vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices
neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson
correlated_neurons_l1 correlated_features_indices correlated_features_pearson
correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero
freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights
logits_hist_data_bar_values decoder_weights_dist sourceSetName
""".split()
ACTIVATION = """
id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource
dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin
binMax binContains qualifyingTokenIndex
""".split()
EXPLANATION = """
id modelId layer index description authorId embedding triggeredById typeName explanationModelName
notes createdAt
""".split()


def rows(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.decode().splitlines()]


@pytest.fixture(scope="module")
def found(shared_lm: Callable[..., LanguageModel]) -> Latents:
    lm = shared_lm()
    read = latents(small_sae(lm), lm, config(ids=(3, 5, 40), steer=0))
    return replace(read, described={40: Description("words", "a-model", Detection(4, 4, 4, 2))})


@pytest.fixture(scope="module")
def folder(found: Latents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "site"
    names = Names(np_model="tiny-it", np_set="our-res-48", np_creator="A. Person")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "BATCH", 2)
        document = save_latents(found, out, names)
    return Path(document["neuronpedia"])


def test_the_files_lie_where_they_are_imported_from(folder: Path) -> None:
    assert folder.parts[-3:] == ("neuronpedia", "tiny-it", "1-our-res-48")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "activations/batch-0.jsonl.gz", "activations/batch-1.jsonl.gz",
        "explanations/batch-1.jsonl.gz",
        "features/batch-0.jsonl.gz", "features/batch-1.jsonl.gz",
        "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl",
    ]  # fmt: skip


def test_features_are_the_latents(folder: Path, found: Latents) -> None:
    features = [row for i in range(2) for row in rows(folder / f"features/batch-{i}.jsonl.gz")]
    assert [row["index"] for row in features] == ["3", "5", "40"]
    for row in features:
        card = found[int(row["index"])]
        assert list(row) == FEATURE
        assert (row["modelId"], row["layer"]) == ("tiny-it", "1-our-res-48")
        assert row["frac_nonzero"] == card.density
        assert row["maxActApprox"] == pytest.approx(card.max, rel=1e-3)
        assert row["hookName"] == "blocks.1.hook_resid_post"
        heights = row["freq_hist_data_bar_heights"]
        assert sum(heights) == card.fired
        assert len(heights) == len(row["freq_hist_data_bar_values"])  # read side by side
        assert row["pos_str"] == [one.token for one in card.lens_up]
        assert row["topkCosSimIndices"] == [one.id for one in card.near]
        expected = found.direction(card.id).tolist()
        assert row["vector"] == pytest.approx(expected, rel=1e-5)


def test_activations_are_the_contexts(folder: Path, found: Latents) -> None:
    first = rows(folder / "activations/batch-0.jsonl.gz")
    found_rows = [*first, *rows(folder / "activations/batch-1.jsonl.gz")]
    assert all(list(row).__len__() == len(ACTIVATION) for row in found_rows)
    assert all(set(row) == set(ACTIVATION) for row in found_rows)
    assert len({row["id"] for row in found_rows}) == len(found_rows)
    assert all(len(row["id"]) == 25 for row in found_rows)
    card = found[3]
    own = [row for row in found_rows if row["index"] == "3"]
    assert len(own) == len(card.top) + sum(len(part.contexts) for part in card.quantiles)
    for row, one in zip(own, card.top, strict=False):
        assert row["tokens"] == list(one.tokens)
        assert row["qualifyingTokenIndex"] == one.index
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert (row["binMin"], row["binMax"], row["binContains"]) == (-1, -1, -1)
    part = own[len(card.top)]
    assert part["binMin"] <= part["values"][part["qualifyingTokenIndex"]] <= part["binMax"]
    assert part["binContains"] == 0.25


def test_only_descriptions_by_a_model_are_explanations(folder: Path) -> None:
    (row,) = rows(folder / "explanations/batch-1.jsonl.gz")
    assert set(row) == set(EXPLANATION)
    assert (row["index"], row["description"]) == ("40", "words")
    assert row["explanationModelName"] == "a-model" and "0.750" in row["notes"]


def test_heads_name_each_other(folder: Path) -> None:
    heads = {
        kind: rows(folder / f"{kind}.jsonl")[0]
        for kind in ("release", "model", "sourceset", "source")
    }
    assert heads["source"]["id"] == "1-our-res-48" == heads["model"]["defaultSourceId"]
    assert heads["source"]["setName"] == heads["sourceset"]["name"] == "our-res-48"
    assert heads["sourceset"]["releaseName"] == heads["release"]["name"]
    assert {heads[kind]["modelId"] for kind in ("source", "sourceset")} == {heads["model"]["id"]}
    assert heads["model"]["instruct"] is True and heads["model"]["layers"] == 4
    assert heads["release"]["creatorName"] == "A. Person"


def test_names_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="`np_set` must be letters, digits"):
        Names(np_set="two words")
    with pytest.raises(UsageError, match="`np_model` must be"):
        Names(np_model="../up")
