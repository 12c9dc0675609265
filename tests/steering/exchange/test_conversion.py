"""Plans in other tools' files: read back to the bit, refused with the reason, and hostile files."""

import csv
import dataclasses
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.exchange.conversion import (
    export_plan,
    import_vectors,
    read_blocks,
)
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.plan import Condition, ModelIdentity, Plan, PlannedLatent, SAEIdentity
from saesteer.steering.plans.plan_file import load_plan

WIDTH = 32


def make_plan(layer: int = 2, **changes: Any) -> Plan:
    directions = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "model": ModelIdentity("tiny", "ab", 4, WIDTH),
        "sae": SAEIdentity("release:layer_2", "cd"),
        "site": "resid_post",
        "layer": layer,
        "latents": (PlannedLatent(id=7, value=1.5), PlannedLatent(id=3, value=-0.5)),
        "directions": directions,
        "scale": 2.0,
        "scope": "all",
    }
    return Plan(**{**options, **changes})


def plan_vector(plan: Plan) -> torch.Tensor:
    """What `make_plan` adds to each residual, written out."""
    weights = [plan.scale * (latent.value or 0.0) for latent in plan.latents]
    total = sum(w * d.double() for w, d in zip(weights, plan.directions, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.float()


def read_vectors(path: Path) -> dict[int, torch.Tensor]:
    """The vectors that a file adds, by block."""
    blocks, _ = read_blocks(path)
    assert all(block.action == "add" for block in blocks)
    return {block.block: block.vector * block.coefficient for block in blocks}


@pytest.mark.parametrize("format", ["gguf", "steering-vectors", "lm-eval"])
def test_there_and_back(tmp_path: Path, lm: LanguageModel, format: str) -> None:
    plan = make_plan()
    report = export_plan(plan, tmp_path / "a", format)
    vectors = read_vectors(tmp_path / "a")
    assert list(vectors) == [2] and torch.equal(vectors[2], plan_vector(plan))
    assert any("every position" in note for note in report["notes"])
    import_vectors(report["files"][0], lm, tmp_path / "b")
    again = load_plan(tmp_path / "b")
    assert torch.equal(plan_vector(again), plan_vector(plan)) and again.scope == "all"
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        with steer(lm, dataclasses.replace(again, model=again.model)):
            steered = lm.model(input_ids=ids).logits
        assert not torch.equal(steered, lm.model(input_ids=ids).logits)


def test_resid_pre_is_the_block_before(tmp_path: Path) -> None:
    export_plan(make_plan(site="resid_pre"), tmp_path, "gguf")
    assert list(read_vectors(tmp_path)) == [1]


def test_gguf_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    plan = make_plan()
    export_plan(plan, tmp_path, "gguf")
    reader = gguf.GGUFReader(tmp_path / "control_vector.gguf")
    (tensor,) = reader.tensors
    assert tensor.name == "direction.2" and tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert torch.equal(torch.from_numpy(tensor.data.copy()), plan_vector(plan))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 1
    assert reader.get_field("controlvector.model_hint").contents() == "tiny"


def test_steering_vectors_adds_the_same(tmp_path: Path, lm: LanguageModel) -> None:
    package = pytest.importorskip("steering_vectors")
    plan = make_plan()
    export_plan(plan, tmp_path, "steering-vectors")
    vectors = read_vectors(tmp_path)
    theirs = package.SteeringVector(vectors, "decoder_block")
    ids = torch.arange(5, 11)[None]
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    block = lm.model.model.layers[2]
    with torch.no_grad():
        handle = block.register_forward_hook(keep)
        lm.model(input_ids=ids)
        handle.remove()
        with theirs.apply(lm.model):
            handle = block.register_forward_hook(keep)
            lm.model(input_ids=ids)
            handle.remove()
    moved = seen[1] - seen[0]
    # A float32 sum and difference.
    assert torch.allclose(moved, plan_vector(plan).expand_as(moved), atol=1e-5)


def test_a_clamp_for_lm_eval(tmp_path: Path) -> None:
    plan = make_plan(
        method="set", latents=(PlannedLatent(id=7, value=4.0),), scale=1.0, layer=3,
        directions=torch.ones(1, WIDTH),
    )  # fmt: skip
    report = export_plan(plan, tmp_path, "lm-eval-csv")
    (row,) = csv.DictReader((tmp_path / "lm_eval.csv").open())
    assert row["loader"] == "sae_lens" and row["action"] == "clamp"
    assert (row["sparse_model"], row["sae_id"]) == ("release", "layer_2")
    assert row["feature_index"] == "7" and float(row["steering_coefficient"]) == 4.0
    assert row["hookpoint"] == "layers.3"
    assert any("projection" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("format", "changes", "words"),
    [
        ("gguf", {"scope": "generation"}, "scope is generation.*`as_scope` all"),
        ("lm-eval", {"scope": "first:3"}, "`as_scope` all"),
        ("gguf", {"layer": 0}, "no place for a vector at resid_post of layer 0"),
        ("lm-eval", {"layer": 0, "site": "resid_pre"}, "no place"),
        ("gguf", {"site": "mlp_out"}, "steers mlp_out"),
        (
            "gguf",
            {"method": "set-to", "scope": "tail"},
            "method set-to, which gguf cannot hold; .*of the parts that are",
        ),
        (
            "gguf",
            {"scope": "tail", "by_place": torch.ones(2, 2)},
            "the plan has doses by place in the prompt, and the file can only add one vector",
        ),
        ("gguf", {"schedule": "steps:0=1,4=2"}, "the plan has the schedule 'steps:0=1,4=2'"),
        (
            "gguf",
            {"when": Condition(layer=1, weight=torch.ones(WIDTH), bias=0.0)},
            r"acts only where its condition holds .*export plan\.with_changes\(when=None\)",
        ),
        ("gguf", {"method": "set"}, "method set, which gguf cannot hold; it holds add"),
        ("steering-vectors", {"unit": "rel"}, "unit rel"),
        ("lm-eval-csv", {}, "has method add"),
        ("lm-eval-csv", {"method": "set"}, "several latents"),
        ("onnx", {}, "`format` must be one of gguf"),
    ],
)
def test_what_cannot_be_exported(
    tmp_path: Path, format: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        export_plan(make_plan(**changes), tmp_path / "a", format)
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_as_scope_says_what_changes(tmp_path: Path) -> None:
    report = export_plan(make_plan(scope="generation"), tmp_path, "gguf", as_scope="all")
    assert report["notes"][0] == "the plan's scope generation is lost"
    with pytest.raises(UsageError):
        export_plan(make_plan(scope="generation"), tmp_path, "gguf", as_scope="prompt")


def parts(*changes: dict[str, Any]) -> Plan:
    """A plan of one part for each of the changes."""
    made = [make_plan(**change) for change in changes]
    return made[0].with_changes(parts=tuple(plan.part for plan in made))


@pytest.mark.parametrize("format", ["gguf", "steering-vectors", "lm-eval"])
def test_parts_that_add_are_one_vector_a_block(tmp_path: Path, format: str) -> None:
    # The input of block 3 is the output of block 2.
    plan = parts({"layer": 1}, {"layer": 2}, {"layer": 3, "site": "resid_pre", "scale": 0.5})
    report = export_plan(plan, tmp_path, format)
    vectors = read_vectors(tmp_path)
    one = plan_vector(plan.only(0))
    assert sorted(vectors) == [1, 2] and torch.equal(vectors[1], one)
    # A sum of three float32 terms in another order.
    torch.testing.assert_close(vectors[2], 1.25 * one)
    assert any("every position" in note for note in report["notes"])


def test_clamps_of_several_blocks_for_lm_eval(tmp_path: Path) -> None:
    clamp = {
        "method": "set", "latents": (PlannedLatent(id=7, value=4.0),), "scale": 1.0,
        "directions": torch.ones(1, WIDTH),
    }  # fmt: skip
    plan = parts({**clamp, "layer": 1}, {**clamp, "layer": 3})
    export_plan(plan, tmp_path, "lm-eval-csv")
    rows = list(csv.DictReader((tmp_path / "lm_eval.csv").open()))
    assert [row["hookpoint"] for row in rows] == ["layers.1", "layers.3"]
    with pytest.raises(UserError, match="part 0 and part 1 of the plan act on .* block 1, and lm-"):
        export_plan(parts({**clamp, "layer": 1}, {**clamp, "layer": 1}), tmp_path, "lm-eval-csv")


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("gguf", {"scope": "prompt"}, "^part 1's scope is prompt and gguf steers every position"),
        ("gguf", {"method": "min"}, "^part 1 has method min, which gguf cannot hold; it holds add"),
        ("lm-eval", {"method": "min"}, "^part 1 has method min, .* it holds add, set, project"),
        ("lm-eval", {"schedule": "first:3"}, "^part 1 has the schedule 'first:3'"),
        ("steering-vectors", {"gate": "7 > 1"}, "^part 1 has the gate '7 > 1'"),
        ("lm-eval-csv", {}, "^part 0 has method add, which lm-eval-csv cannot hold; it holds set"),
    ],
)
def test_a_part_that_a_format_cannot_hold_is_named(
    tmp_path: Path, format: str, change: dict[str, Any], words: str
) -> None:
    plan = parts({"layer": 1}, {"layer": 3, **change})
    with pytest.raises(UserError, match=words) as error:
        export_plan(plan, tmp_path / "a", format)
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_a_hook_point_names_one_block(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`hookpoint` h.1 names one block and .* blocks 1, 3"):
        export_plan(parts({"layer": 1}, {"layer": 3}), tmp_path, "lm-eval", hookpoint="h.1")


def test_scopes_that_are_lost_are_noted_for_each_part(tmp_path: Path) -> None:
    plan = parts({"layer": 1, "scope": "prompt"}, {"layer": 3, "scope": "generated"})
    notes = export_plan(plan, tmp_path, "gguf", as_scope="all")["notes"]
    assert notes[:2] == ["part 0's scope prompt is lost", "part 1's scope generated is lost"]


def test_several_layers(tmp_path: Path, lm: LanguageModel) -> None:
    vectors = {f"layer.{i}": torch.full((WIDTH,), float(i)) for i in (1, 3)}
    save_file(vectors, tmp_path / "v.safetensors")
    report = import_vectors(tmp_path / "v.safetensors", lm, tmp_path / "out")
    assert len(report["files"]) == 1 and "one plan of 2 parts, a block each" in report["notes"]
    plan = load_plan(tmp_path / "out")
    assert [part.layer for part in plan.parts] == [1, 3]
    assert plan.with_changes(scale=0.5).scale == 0.5  # weaker in one go
    with pytest.raises(UserError, match="holds no plan.yaml: give one of the plans in it: .*out"):
        load_plan(tmp_path)
    save_file({"layer.9": torch.ones(WIDTH)}, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="has 4 blocks"):
        import_vectors(tmp_path / "v.safetensors", lm, tmp_path / "more")


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(3)},
        {-1: torch.ones(3)},
        {1: torch.ones(3), "1": torch.ones(3)},
        {1: torch.ones(2, 3)},
        {1: torch.full((3,), torch.nan)},
        {1: torch.ones(3, dtype=torch.long)},
        {1: "text"},
        {},
        {"layers.1": {"steering_vector": torch.zeros(3), "action": "clamp"}},
        {"layers.1": {"steering_vector": torch.ones(3), "bias": torch.ones(3)}},
        {"layers.1": {"steering_vector": torch.ones(3), "steering_coefficient": "2"}},
        {"layers.x": {"steering_vector": torch.ones(3)}},
    ],
)
def test_dicts_that_are_no_vectors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(UserError) as error:
        read_vectors(tmp_path / "v.pt")
    assert "\n" not in str(error.value)


def test_a_pickled_object_is_not_opened(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "v.pt")
    with pytest.raises(UserError, match="could run code: refused"):
        read_vectors(tmp_path / "v.pt")
    (tmp_path / "v.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled objects are not opened"):
        read_vectors(tmp_path / "v.pkl")


def gguf_bytes(name: bytes = b"direction.1", shape: int = 4, kind: int = 0, **head: int) -> bytes:
    """A control vector written byte by byte."""
    counts = {"version": 3, "tensors": 1, "facts": 0, "axes": 1, "offset": 0, **head}
    raw = b"GGUF" + struct.pack("<IQQ", counts["version"], counts["tensors"], counts["facts"])
    raw += struct.pack("<Q", len(name)) + name + struct.pack("<I", counts["axes"])
    raw += struct.pack("<QIQ", shape, kind, counts["offset"])
    return raw + b"\0" * (-len(raw) % 32) + struct.pack("<4f", 1, 2, 3, 4)


def read_gguf(tmp_path: Path, raw: bytes) -> dict[int, torch.Tensor]:
    (tmp_path / "v.gguf").write_bytes(raw)
    return read_vectors(tmp_path / "v.gguf")


def test_a_small_gguf_reads(tmp_path: Path) -> None:
    assert read_gguf(tmp_path, gguf_bytes())[1].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"GGUF", b"nope", gguf_bytes()[:-1], gguf_bytes(tensors=1 << 60),
        gguf_bytes(facts=1 << 60), gguf_bytes(version=9), gguf_bytes(shape=1 << 62),
        gguf_bytes(shape=0), gguf_bytes(kind=1), gguf_bytes(axes=1 << 31),
        gguf_bytes(offset=1 << 63), gguf_bytes(name=b"token_embd.weight"),
        gguf_bytes(name=b"direction.-1"), gguf_bytes(name=b"direction.\xff"),
        gguf_bytes(tensors=0), gguf_bytes()[:-4] + struct.pack("<f", float("nan")),
    ],
)  # fmt: skip
def test_bad_gguf_files(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(UserError) as error:
        read_gguf(tmp_path, raw)
    assert "\n" not in str(error.value)


@settings(
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 100)),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_changed_gguf_bytes(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(gguf_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=6)):
        raw[place] = data.draw(st.integers(0, 255))
    try:
        vectors = read_gguf(tmp_path, bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(bool(torch.isfinite(vector).all()) for vector in vectors.values())
