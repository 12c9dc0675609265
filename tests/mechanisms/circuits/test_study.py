"""Found on one part of the pairs and tested on the other; files and page."""

import json
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.circuits.circuit import load_circuit
from saesteer.mechanisms.circuits.groups import Group
from saesteer.mechanisms.circuits.study import save_study, study_circuit
from saesteer.mechanisms.config import CircuitConfig, MaskConfig
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.toys.hand_built import hand_built_scenes
from saesteer.sae.model.language_model import LanguageModel

GROUPS = (Group("fetcher", "last", "logits"), Group("mover", "object", "fetcher", "k"))


def test_a_study(toy: LanguageModel, tmp_path: Path) -> None:
    config = CircuitConfig(draws=2, random=2, ablate="resample")
    study = study_circuit(
        toy,
        hand_built_scenes(16, 3),
        GROUPS,
        config,
        masks=("last",),
        mask_config=MaskConfig(seeds=1),
    )
    assert (study.n_found_on, study.n_tested_on) == (8, 8)
    document = save_study(tmp_path, study)
    assert load_circuit(tmp_path / "circuit.json", toy).members == {
        ("fetcher", (1, 1)), ("mover", (0, 0))
    }  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text())["test"]["completeness_gap"] < 1e-4
    page = (tmp_path / "report.html").read_text()
    assert "(1,1)" in page and page.count("<svg") == 3 and "Mask learned at last for answer" in page
    # On a telephone the long names of figures break, and the figures stay on the screen.
    assert '<th scope="row">faithfulness (F(C)' in page
    assert "tbody th { font-weight: 500; white-space: normal;" in page
    frame = study.to_frame()
    assert list(frame["layer"]) == [1, 0] and (frame["cost"] > 9).all()
    assert document["masks"][0]["at"] == "last" and "faithfulness 1.00" in repr(study)


def test_a_mask_that_cannot_be_is_refused_before_the_model(scenes: list[Pair]) -> None:
    """No model of this name is there to be loaded."""
    with pytest.raises(UsageError, match="`mask` must be of first, last, label, object .* 'box'"):
        study_circuit("nowhere", scenes, GROUPS, masks=("last", "box"))
    with pytest.raises(UserError, match="a mask needs 12 pairs or more, got 11"):
        study_circuit("nowhere", scenes[:11], GROUPS, masks=("last",))
    lost = (Group("fetcher", "last", "logits"), Group("mover", "thing", "fetcher", "k"))
    with pytest.raises(UsageError, match="`groups` must be of first, last, .* got 'thing'"):
        study_circuit("nowhere", scenes, lost)
    with pytest.raises(UsageError, match="`desiderata` position is for masks: give `mask`"):
        study_circuit("nowhere", scenes, GROUPS, desiderata={"position": scenes})


def test_too_few_groups(toy: LanguageModel, scenes: list[Pair]) -> None:
    says = "12 groups of pairs leave 6 to find heads on and 6 to test on, at least 8"
    with pytest.raises(UserError, match=says):
        study_circuit(toy, scenes, GROUPS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ablate": "zero"}, "`ablate` must be of mean-position, resample, got 'zero'"),
        ({"fdr": 0.0}, "`fdr` must lie between 0 and 1"),
        ({"held_out": 1.0}, "`held_out` must lie between 0 and 1"),
        ({"keep": 0.0}, "`keep` must be above 0"),
        ({"draws": -1}, "`draws` must be 0 or more"),
        ({"score": "kl"}, "`score` must be of logit-diff, prob, got 'kl'"),
        ({"top": (0,)}, "`top` must be counts of at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        CircuitConfig(**settings)
