"""Pages that are there are found, and linked to from where the link stands."""

import json
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.sae.reading.found_pages import latent_pages, link


def pages(folder: Path, sha256: str, ids: list[int]) -> Path:
    folder.mkdir(parents=True)
    (folder / "latents.json").write_text(json.dumps({"sae": {"sha256": sha256}, "ids": ids}))
    return folder


def test_what_is_beside_a_report_is_found(tmp_path: Path) -> None:
    pages(tmp_path / "runs/latents", "one", [3, 4])
    pages(tmp_path / "runs/sae/latents", "two", [5])
    found = latent_pages((), [tmp_path / "runs", tmp_path / "runs/sae"], tmp_path / "runs/report")
    assert found == {
        "one": {"folder": "../latents", "ids": [3, 4]},
        "two": {"folder": "../sae/latents", "ids": [5]},
    }
    assert link(found, "one", 4) == "../latents/latents/4.html"
    assert link(found, "one", 5) is None and link(found, "three", 4) is None
    assert link({}, "one", 4) is None


def test_what_is_given_comes_first(tmp_path: Path) -> None:
    pages(tmp_path / "near", "one", [1])
    given = pages(tmp_path / "given", "one", [2])
    found = latent_pages([given], [tmp_path], tmp_path)
    assert found == {"one": {"folder": "given", "ids": [2]}}


def test_broken_pages_are_passed_over_unless_given(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "latents.json").write_text('{"sae"')
    assert latent_pages((), [tmp_path, tmp_path / "none"], tmp_path) == {}
    with pytest.raises(UserError, match="`latent_pages` .*is broken: make it again"):
        latent_pages([broken], (), tmp_path)
    with pytest.raises(UserError, match="holds no latents.json"):
        latent_pages([tmp_path], (), tmp_path)
