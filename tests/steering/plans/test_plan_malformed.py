"""Broken, hostile and random plans, tasks and config files: one line, or what they say."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_header, read_tensors, write_tensors
from saesteer.cli.__main__ import make_parser
from saesteer.sae.model.language_model import wrap_model
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import PlannedLatent
from saesteer.steering.plans.plan_file import load_plan, save_plan
from saesteer.steering.tasks.task import load_task

from ..ranked_plans import make_sae

FUZZ = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)), deadline=None)

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.dates()
    | st.binary(max_size=4)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "empty": "",
    "a list": "- a\n- b\n",
    "cut": "schema_version: [1,",
    "nested": "[" * 1_500,
    "nested mappings": "{a: " * 5_000,
    "code": "!!python/object/apply:os.mkdir [code-was-run]\n",
    "a tag": "schema_version: !zap 1\n",
    "no such date": "schema_version: 2024-13-45\n",
    "an endless number": f"schema_version: {'9' * 10_000}\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "an alias of nothing": "schema_version: *x\n",
    "itself": "&a [*a]\n",
    "itself inside": "schema_version: &a [*a]\n",
    "laughs": LAUGHS,
    "a zero byte": "schema_version: \0\n",
    "two documents": "a: 1\n---\nb: 2\n",
}


def one_line(call: Callable[[], Any]) -> bool:
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


@pytest.fixture(scope="module")
def plan(tiny_lm: Callable[..., tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    lm = wrap_model(*tiny_lm("llama"), "tiny")
    latents = (
        PlannedLatent(id=9, score=0.95, mu=2.0, sigma=0.5, lens=(" é", "à"), max=6.0),
        PlannedLatent(id=2, score=0.5, mu=1.0, sigma=0.25, max=3.0),
    )
    folder = tmp_path_factory.mktemp("plan")
    save_plan(make_plan(lm, make_sae(), latents), folder)
    return folder


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_that_is_no_plan(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = plan / "plan.yaml"
    before = file.read_text()
    try:
        for text in (TEXTS[name], before + TEXTS[name]):
            file.write_text(text)
            one_line(lambda: load_plan(plan))
        file.write_text(TEXTS[name])
        assert not one_line(lambda: load_plan(plan)), name
        # The same text as a task and as a config file.
        assert not one_line(lambda: load_task(str(file))), name
        one_line(lambda: make_parser("train").read(["-c", str(file)]))
    finally:
        file.write_text(before)
    assert not (tmp_path / "code-was-run").exists()
    # A billion laughs written out would take the whole memory, and this line would not be reached.


def test_values_that_expand_are_not_written_out(plan: Path) -> None:
    file = plan / "plan.yaml"
    before = file.read_text()
    document = yaml.safe_load(before)
    try:
        for key in document:
            rest = yaml.safe_dump({k: v for k, v in document.items() if k != key})
            file.write_text(f"{rest}{key}: {{{LAUGHS.strip().replace(chr(10), ', ')}}}\n")
            assert not one_line(lambda: load_plan(plan)), key
    finally:
        file.write_text(before)


@FUZZ
@given(data=st.data())
def test_plans_of_junk(plan: Path, data: st.DataObject) -> None:
    file = plan / "plan.yaml"
    before = file.read_text()
    document = yaml.safe_load(before)
    changed = copy.deepcopy(document)
    place: Any = changed
    while True:
        key = data.draw(
            st.sampled_from(sorted(place)) if isinstance(place, dict)
            else st.integers(0, len(place) - 1)
        )  # fmt: skip
        inner = place[key]
        if not inner or not isinstance(inner, dict | list) or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(junk)
    try:
        file.write_text(yaml.safe_dump(changed, allow_unicode=True))
        one_line(lambda: load_plan(plan))
    finally:
        file.write_text(before)


@FUZZ
@given(at=st.integers(0, 2000), change=st.integers(1, 255), cut=st.booleans())
def test_plan_tensors_with_any_bytes(plan: Path, at: int, change: int, cut: bool) -> None:
    file = plan / "plan.safetensors"
    before = file.read_bytes()
    content = bytearray(before)
    content[at % len(content)] ^= change
    try:
        file.write_bytes(bytes(content[: at % len(content)]) if cut else bytes(content))
        if one_line(lambda: load_plan(plan)):
            assert torch.isfinite(load_plan(plan).directions).all()
    finally:
        file.write_bytes(before)


def test_plan_tensors_of_integers(plan: Path) -> None:
    """As long and as many as they should be; a damaged header can say so."""
    file = plan / "plan.safetensors"
    before = file.read_bytes()
    tensors, metadata = read_tensors(file), read_header(file)["metadata"]
    whole = {name: tensor.clone() for name, tensor in tensors.items()}
    del tensors
    try:
        for name in whole:
            write_tensors(file, {**whole, name: whole[name].to(torch.int32)}, metadata)
            with pytest.raises(UserError, match="is not the tensor file of a plan"):
                load_plan(plan)
    finally:
        file.write_bytes(before)
