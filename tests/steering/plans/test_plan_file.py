"""Plans on disk: what is written reads back, and what is spoilt is refused in one line."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.from_sae import plan_from_latents
from saesteer.steering.plans.plan import Condition, Plan, PlanPart, TaskIdentity
from saesteer.steering.plans.plan_file import load_plan, save_plan

from ..ranked_plans import make_sae, ranked

FIELDS = ("model", "sae", "site", "layer", "latents", "method", "unit", "scale", "beta", "scope",
          "task", "metrics")  # fmt: skip


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_a_plan_reads_back_as_it_was_written(
    architecture: str, lm: LanguageModel, tmp_path: Path
) -> None:
    plan = ranked(
        lm,
        sae=make_sae(architecture).to(dtype=torch.bfloat16),
        method="set",
        scale=1.5,
        beta=-0.25,
        scope="first:4",
        task=TaskIdentity("french", "0123", ("En français", "In French")),
        metrics={"top_score": 0.95, "n": 200, "note": None},
    )
    file = save_plan(plan, tmp_path / "plan")
    assert sorted(p.name for p in file.parent.iterdir()) == ["plan.safetensors", "plan.yaml"]
    for path in (file, file.parent, str(file)):
        read = load_plan(path)
        for field in FIELDS:
            assert getattr(read, field) == getattr(plan, field), field
        assert read.part.tensors().keys() == plan.part.tensors().keys()
        for name, tensor in plan.part.tensors().items():
            assert torch.equal(read.part.tensors()[name], tensor)
            assert read.part.tensors()[name].dtype == tensor.dtype


def test_plan_yaml_has_the_keys_that_other_tools_rely_on(lm: LanguageModel, tmp_path: Path) -> None:
    document = yaml.safe_load(save_plan(ranked(lm), tmp_path).read_text(encoding="utf-8"))
    assert list(document) == ["schema_version", *FIELDS]
    assert document["model"] == {
        "name": "tiny", "hash": lm.fingerprint, "n_layers": 4, "d_model": 32
    }  # fmt: skip
    assert {"source": "folder", "sha256": "ab"}.items() <= document["sae"].items()
    assert document["latents"][0] == {
        "id": 9, "score": 0.95, "mu": 2.0, "sigma": 0.5, "lens": [" é", "à"], "max": 6.0
    }  # fmt: skip
    assert document["task"] is None


def test_the_wordings_of_a_task_are_optional(lm: LanguageModel, tmp_path: Path) -> None:
    task = TaskIdentity("french", "0123")
    file = save_plan(ranked(lm, task=task), tmp_path)
    assert yaml.safe_load(file.read_text())["task"] == {"name": "french", "hash": "0123"}
    assert load_plan(file).task == task
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    document["task"]["instructions"] = [1]
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(UserError, match=r"key 'task.instructions\[1\]' must be a text, got 1"):
        load_plan(file)


def test_a_local_sae_is_named_by_its_absolute_path(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    assert ranked(lm).sae.source == "folder"  # no such folder: a release, or in memory
    monkeypatch.chdir(tmp_path)
    assert ranked(lm).sae.source == str(tmp_path / "folder")


def test_a_plan_by_hand_reads_back(lm: LanguageModel, tmp_path: Path) -> None:
    plan = plan_from_latents(lm, make_sae(), None, {9: 1.2, 2: -0.8})
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path).latents == plan.latents
    save_plan(dataclasses.replace(plan, scale=3.0), tmp_path)  # over the old one
    assert load_plan(tmp_path).scale == 3.0


def test_latents_may_be_deleted_and_moved_by_hand(lm: LanguageModel, tmp_path: Path) -> None:
    plan = ranked(lm)
    file = save_plan(plan, tmp_path)
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    document["latents"].reverse()
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert load_plan(file).ids == (2, 9)
    assert torch.equal(load_plan(file).directions, plan.directions[[1, 0]])
    del document["latents"][0]
    document["scale"] = 2  # a whole number where a float is meant
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    read = load_plan(file)
    assert read.doses() == [4.0]
    assert torch.equal(read.directions, plan.directions[[0]])


def _set(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        document = document[int(parent) if parent.isdigit() else parent]
    key = int(last) if last.isdigit() else last
    if value is ...:
        del document[key]  # type: ignore[arg-type]
    else:
        document[key] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("strength", 3, "unknown key 'strength'; allowed: .*schema_version, model"),
        ("model.width", 3, "unknown key 'model.width'"),
        ("latents.0.bias", 3, r"unknown key 'latents\[1\].bias'"),
        ("layer", ..., "key 'layer' is missing"),
        ("model.hash", ..., "key 'model.hash' is missing"),
        ("latents.1.id", ..., r"key 'latents\[2\].id' is missing"),
        ("schema_version", 99, "schema_version is 99 and this saesteer reads 1"),
        ("layer", "two", "key 'layer' must be a whole number, got 'two'"),
        ("layer", True, "key 'layer' must be a whole number, got True"),
        ("scale", "big", "key 'scale' must be a number, got 'big'"),
        ("latents", {}, r"key 'latents' must be a list"),
        ("latents", [], "needs at least one latent"),
        ("latents.0", 9, r"key 'latents\[1\]' must be a mapping"),
        ("latents.0.lens", [1], r"key 'latents\[1\].lens\[1\]' must be a text"),
        ("latents.0.mu", float("nan"), "mu of latent 9 must be finite"),
        ("latents.0.id", 5, "latent 5 is in plan.yaml and not in plan.safetensors"),
        ("model.d_model", 16, r"directions has shape \[2, 32\]"),
        ("method", "clamp", "`method` must be one of"),
        ("scope", "here", "`scope` must be one of"),
        ("layer", 12, r"layer must be in 0..3"),
    ],
)
def test_a_plan_file_with_a_wrong_key_or_value_is_refused(
    path: str, value: Any, message: str, lm: LanguageModel, tmp_path: Path
) -> None:
    file = save_plan(ranked(lm), tmp_path)
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    _set(document, path, value)
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(UserError, match=f"^`plan` .*{message}") as caught:
        load_plan(file)
    assert "\n" not in str(caught.value)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("plan.yaml", Path.unlink, "holds no plan.yaml: give a folder that rank"),
        ("plan.yaml", lambda f: f.write_text("a: [", "utf-8"), "not valid YAML"),
        ("plan.yaml", lambda f: f.write_text("- a", "utf-8"), "holds no mapping"),
        ("plan.yaml", lambda f: f.write_bytes(b"\xff\xfe\x00"), "cannot read"),
        ("plan.safetensors", Path.unlink, "no file .*plan.safetensors"),
        ("plan.safetensors", _cut, "plan.safetensors is damaged or cut short"),
    ],
)
def test_a_spoilt_plan_file_is_one_line(
    name: str, spoil: Callable[[Path], Any], message: str, lm: LanguageModel, tmp_path: Path
) -> None:
    save_plan(ranked(lm), tmp_path)
    spoil(tmp_path / name)
    with pytest.raises(UserError, match=f"^`plan` .*{message}") as caught:
        load_plan(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tensor_file_of_something_else_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    from saesteer.checkpoints.files import write_tensors

    save_plan(ranked(lm), tmp_path)
    file = tmp_path / "plan.safetensors"
    for tensors, metadata in (
        ({"directions": torch.ones(2, 32)}, None),
        ({"directions": torch.ones(2, 32)}, {"ids": "[9]"}),
        ({"directions": torch.ones(2, 32), "other": torch.ones(1)}, {"ids": "[9, 2]"}),
        ({"W_enc": torch.ones(32, 2)}, {"ids": "[9, 2]"}),
    ):
        write_tensors(file, tensors, metadata)
        with pytest.raises(UserError, match="^`plan` .*is not the tensor file of a plan"):
            load_plan(tmp_path)


def of_parts(lm: LanguageModel) -> Plan:
    """Two parts of two SAEs at two layers, the second gated and with latents of the same ids."""
    first = ranked(lm, sae=make_sae("jumprelu"), method="set", scope="prompt")
    other = make_sae("standard", hook="blocks.3.hook_resid_post")
    second = with_gate(ranked(lm, sae=other, scale=0.5, schedule="linear:4"), "2 > 1", other)
    return Plan(
        model=first.model, parts=(*first.parts, *second.parts), metrics={"n": 3},
        task=TaskIdentity("french", "0123", ("In French",)),
    )  # fmt: skip


def assert_same_part(read: PlanPart, wanted: PlanPart) -> None:
    for field in dataclasses.fields(PlanPart):
        found, meant = getattr(read, field.name), getattr(wanted, field.name)
        if isinstance(meant, torch.Tensor):
            assert torch.equal(found, meant) and found.dtype == meant.dtype, field.name
        else:
            assert found == meant, field.name


def test_a_plan_of_several_parts_reads_back(lm: LanguageModel, tmp_path: Path) -> None:
    plan = of_parts(lm)
    file = save_plan(plan, tmp_path)
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert list(document) == ["schema_version", "model", "parts", "task", "metrics"]
    assert document["schema_version"] == 2
    assert [row["tensors"] for row in document["parts"]] == ["part0", "part1"]
    read = load_plan(file)
    assert (read.model, read.task, read.metrics) == (plan.model, plan.task, plan.metrics)
    for found, wanted in zip(read.parts, plan.parts, strict=True):
        assert_same_part(found, wanted)
    save_plan(read.only(1), tmp_path)
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["schema_version"] == 1
    assert_same_part(load_plan(file).part, plan.parts[1])


def test_parts_may_be_deleted_and_moved_by_hand(lm: LanguageModel, tmp_path: Path) -> None:
    plan = of_parts(lm)
    file = save_plan(plan, tmp_path)
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    document["parts"].reverse()
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    for found, wanted in zip(load_plan(file).parts, plan.parts[::-1], strict=True):
        assert_same_part(found, wanted)
    del document["parts"][1]
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert_same_part(load_plan(file).part, plan.parts[1])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("parts", [], "holds no part"),
        ("parts", ..., "key 'parts' is missing"),
        ("layer", 2, "unknown key 'layer'"),
        ("parts.1.strength", 3, r"unknown key 'parts\[2\].strength'"),
        ("parts.0.tensors", ..., r"key 'parts\[1\].tensors' is missing"),
        ("parts.0.tensors", "part7", "does not hold the tensors 'part7'"),
        ("parts.1.latents.0.id", 5, "latent 5 is in plan.yaml and not in plan.safetensors"),
        ("parts.1.layer", 7, r"layer must be in 0..3"),
        ("parts.1.scope", "here", "`scope` must be one of"),
        ("schema_version", 1, "unknown key 'parts'"),
    ],
)
def test_a_wrong_key_or_value_of_a_part_is_refused(
    path: str, value: Any, message: str, lm: LanguageModel, tmp_path: Path
) -> None:
    file = save_plan(of_parts(lm), tmp_path)
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    _set(document, path, value)
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(UserError, match=f"^`plan` .*{message}") as caught:
        load_plan(file)
    assert "\n" not in str(caught.value)


def test_doses_by_place_and_a_condition_read_back(lm: LanguageModel, tmp_path: Path) -> None:
    weight = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    when = Condition(layer=2, weight=weight, bias=-0.25, source="latent 4 of somewhere")
    by_place = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    plan = ranked(lm, method="set-to", scope="tail", schedule="steps:0=1.5,8=1")
    plan = plan.with_changes(by_place=by_place[:, : len(plan.latents)].contiguous(), when=when)
    for whole in (plan, Plan(model=plan.model, parts=plan.parts * 2, when=when)):
        save_plan(whole, tmp_path)
        again = load_plan(tmp_path)
        assert again.when is not None and torch.equal(again.when.weight, weight)
        facts = again.when.layer, again.when.site, again.when.bias, again.when.source
        assert facts == (2, "resid_post", -0.25, "latent 4 of somewhere")
        for part in again.parts:
            assert part.by_place is not None and torch.equal(part.by_place, plan.part.by_place)
            assert part.schedule == "steps:0=1.5,8=1"


def test_a_condition_without_its_weight_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    when = Condition(layer=1, weight=torch.ones(lm.d_model), bias=0.0)
    save_plan(ranked(lm).with_changes(when=when), tmp_path / "with")
    save_plan(ranked(lm), tmp_path / "without")
    (tmp_path / "without/plan.yaml").write_bytes((tmp_path / "with/plan.yaml").read_bytes())
    with pytest.raises(UserError, match=r"does not hold when\.weight of plan\.yaml"):
        load_plan(tmp_path / "without")
    with pytest.raises(UserError, match="`when` reads layer 9 with 32 numbers"):
        ranked(lm).with_changes(when=dataclasses.replace(when, layer=9))
    with pytest.raises(UserError, match="must be one row of finite numbers"):
        dataclasses.replace(when, weight=torch.full((lm.d_model,), torch.nan))


def test_a_folder_of_plans_names_them(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=f"give one of the plans in it: {tmp_path / 'first'}, "):
        load_plan(tmp_path)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    with pytest.raises(UserError, match="it holds an SAE, which `sae` takes"):
        load_plan(tmp_path / "sae")
