"""lm-eval's steering files: what they say is what a plan does, both ways; nothing is guessed."""

import csv
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAESpec, save_sae
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.exchange.conversion import (
    export_plan,
    import_vectors,
    lm_eval_files,
    read_blocks,
)
from saesteer.steering.hooking.edits import EditPositions, make_edit
from saesteer.steering.plans.plan import ModelIdentity, Plan, PlannedLatent, SAEIdentity
from saesteer.steering.plans.plan_file import load_plan

WIDTH, D_SAE = 32, 12
HEAD = ",".join(lm_eval_files.COLUMNS)


@pytest.fixture
def sae(tmp_path: Path) -> dict[str, Tensor]:
    """An SAE at saes/layers.1, decoder rows of different lengths, b_dec not 0."""
    random = torch.Generator().manual_seed(3)
    tensors = {
        "W_enc": torch.randn(WIDTH, D_SAE, generator=random),
        "b_enc": torch.randn(D_SAE, generator=random),
        "W_dec": 3 * torch.randn(D_SAE, WIDTH, generator=random),
        "b_dec": torch.randn(WIDTH, generator=random),
    }
    spec = SAESpec(architecture="standard", d_model=WIDTH, d_sae=D_SAE)
    save_sae(tmp_path / "saes" / "layers.1", spec, **tensors)
    return tensors


def theirs_clamp(x: Tensor, vector: Tensor, value: float, bias: Tensor | None) -> Tensor:
    """lm-eval 0.4.13, `SteeredModel.clamp`, in its own order of operations."""
    direction = vector / torch.norm(vector)
    acts = x if bias is None else x - bias
    projection = torch.sum(acts * direction, dim=-1, keepdim=True)
    clamped = acts + direction * (value - projection)
    return clamped if bias is None else clamped + bias


def ours(plan: Plan, x: Tensor) -> Tensor:
    return x + make_edit(plan.parts).delta(x, EditPositions())


def residuals() -> Tensor:
    return 5 * torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(8))


def write(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "steer.csv"
    path.write_text("\n".join([HEAD, *rows, ""]))
    return path


def test_a_clamp_of_the_csv_does_what_lm_eval_does(
    tmp_path: Path, lm: LanguageModel, sae: dict[str, Tensor]
) -> None:
    path = write(tmp_path, f"sparsify,clamp,{tmp_path / 'saes'},layers.1,5,2.5,,,a word")
    report = import_vectors(path, lm, tmp_path / "plan")
    plan = load_plan(tmp_path / "plan")
    assert plan.layer == 1 and plan.method == "set" and plan.ids == (5,) and plan.doses() == [2.5]
    assert any("block 1: clamp" in note for note in report["notes"])
    expected = theirs_clamp(residuals(), sae["W_dec"][5], 2.5, sae["b_dec"])
    # One float32 projection taken in another order.
    assert torch.allclose(ours(plan, residuals()), expected, atol=1e-4)
    assert not torch.allclose(ours(plan, residuals()), residuals(), atol=1e-1)
    # And out again as a `.pt` dict, whose bias is the part along the direction.
    export_plan(plan, tmp_path / "pt", "lm-eval")
    found = torch.load(tmp_path / "pt" / "lm_eval.pt", weights_only=True)["layers.1"]
    assert found["action"] == "clamp" and found["head_index"] is None
    again = theirs_clamp(
        residuals(), found["steering_vector"], found["steering_coefficient"], found["bias"]
    )
    assert torch.allclose(again, expected, atol=1e-4)
    import_vectors(tmp_path / "pt", lm, tmp_path / "back")
    assert torch.allclose(ours(load_plan(tmp_path / "back"), residuals()), expected, atol=1e-4)


def test_csv_of_sae_lens_there_and_back(
    tmp_path: Path, lm: LanguageModel, sae: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def release(source: str) -> Any:
        asked.append(source)
        return load(tmp_path / "saes" / "layers.1")

    load = lm_eval_files.load_sae
    monkeypatch.setattr(lm_eval_files, "load_sae", release)
    path = write(tmp_path, "sae_lens,clamp,some-release,layers.1,7,-1.5,,layer_1/width,")
    import_vectors(path, lm, tmp_path / "plan")
    plan = load_plan(tmp_path / "plan")
    assert asked == ["some-release:layer_1/width"] == [plan.sae.source]
    report = export_plan(plan, tmp_path / "csv", "lm-eval-csv")
    (row,) = csv.DictReader((tmp_path / "csv" / "lm_eval.csv").open())
    assert (row["sparse_model"], row["sae_id"]) == ("some-release", "layer_1/width")
    assert (row["feature_index"], row["steering_coefficient"]) == ("7", "-1.5")
    assert any("as in the plan" in note for note in report["notes"])
    import_vectors(tmp_path / "csv", lm, tmp_path / "again")
    assert torch.equal(ours(load_plan(tmp_path / "again"), residuals()), ours(plan, residuals()))


def test_rows_that_add(tmp_path: Path, lm: LanguageModel, sae: dict[str, Tensor]) -> None:
    path = write(tmp_path, f"sparsify,add,{tmp_path / 'saes'},layers.1,2,10.0,,,")
    import_vectors(path, lm, tmp_path / "plan")
    added = load_plan(tmp_path / "plan").part.added_vector().float()
    assert torch.allclose(added, 10 * sae["W_dec"][2])
    ((block,), _) = read_blocks(path)
    assert (block.block, block.action, block.coefficient) == (1, "add", 10.0)
    assert torch.equal(block.vector, sae["W_dec"][2])


def test_one_direction_projected_out_is_a_clamp(tmp_path: Path, lm: LanguageModel) -> None:
    direction = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    plan = Plan(
        model=ModelIdentity("tiny", "ab", 4, WIDTH), sae=SAEIdentity("x", "cd"), scope="all",
        site="resid_post", layer=2, latents=(PlannedLatent(id=7),), directions=direction,
        method="project",
    )  # fmt: skip
    export_plan(plan, tmp_path, "lm-eval")
    found = torch.load(tmp_path / "lm_eval.pt", weights_only=True)["layers.2"]
    moved = theirs_clamp(residuals(), found["steering_vector"], 0.0, found["bias"])
    assert found["steering_coefficient"] == 0.0
    assert torch.allclose(ours(plan, residuals()), moved, atol=1e-4)
    two = dataclasses.replace(
        plan, latents=(*plan.latents, PlannedLatent(id=8)), directions=torch.eye(2, WIDTH)
    )
    with pytest.raises(UserError, match="method project"):
        export_plan(two, tmp_path / "two", "lm-eval")


ROW = "sparsify,clamp,{saes},layers.1,5,2.5,,,"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROW.replace("clamp", "steer"), "has the action 'steer'"),
        (ROW.replace("sparsify", "pickle"), "has the loader 'pickle'"),
        (ROW.replace(",5,", ",five,"), "feature_index 'five'"),
        (ROW.replace(",5,", ",12,"), "has 12 latents, and no number 12"),
        (ROW.replace("2.5", "much"), "steering_coefficient of layers.1 is 'much'"),
        (ROW.replace("2.5", "nan"), "steering_coefficient of layers.1 is 'nan'"),
        (ROW.replace("2.5", ""), "is 'None', which is no number"),
        (ROW.replace("2.5,", "2.5,3"), "head_index"),
        (ROW.replace("layers.1", "embed_in"), "'embed_in' is not a block"),
        (ROW.replace("layers.1", ""), "'' is not a block"),
        (ROW.replace("layers.1", "layers.3"), "layers.3 does not exist"),
        (ROW + "\n" + ROW, "several rows for block 1, of which lm-eval keeps the last"),
        ("", "has 0 rows"),
    ],
)
def test_rows_that_are_refused(
    tmp_path: Path, lm: LanguageModel, sae: dict[str, Tensor], row: str, words: str
) -> None:
    path = write(tmp_path, row.format(saes=tmp_path / "saes"))
    with pytest.raises(UserError, match=words) as error:
        import_vectors(path, lm, tmp_path / "plan")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b'"', b"loader\n" * 3])
def test_files_that_are_no_csv(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_blocks(tmp_path / "a.csv")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"`source` {tmp_path / 'a.csv'}")


WORDS = ["clamp", "add", "sparsify", "sae_lens", "layers.1", "1", "../..", "nan"]


@settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.lists(st.text(max_size=6) | st.sampled_from(WORDS), max_size=10), max_size=3)
)
def test_any_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[list[str]]) -> None:
    def nothing(source: str) -> Any:
        raise UserError(f"`sae` {source!r} does not exist")

    monkeypatch.setattr(lm_eval_files, "load_sae", nothing)
    path = tmp_path / "fuzz.csv"
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(lm_eval_files.COLUMNS)
        writer.writerows(rows)
    try:
        read_blocks(path)
    except UserError as error:
        assert "\n" not in str(error)
