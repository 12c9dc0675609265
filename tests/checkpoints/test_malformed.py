"""Broken, hostile and random input to the readers of states, manifests and JSON.

Whatever a file holds, its reader returns or raises a `UserError` of one line: no other exception,
no code run, no memory beyond the file's own size.
"""

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saesteer.checkpoints import files, run_state
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.checkpoints.shards import ShardReader

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "state-1.safetensors", "a\x00b", "layer-1/../../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def one_line(call: Callable[[], Any]) -> bool:
    """Whether the call ended well; a `UserError` of one line is the only other end."""
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


class Bomb:
    """Unpickling this would run code."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("code-was-run",))


# --- files of tensors


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR_FILES: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x02",
    "no header": header(b""),
    "header longer than the file": header(b"{}", 2**40),
    "header longer than memory": header(b"{}", 2**63),
    "not JSON": header(b"{nope}"),
    "not UTF-8": header(b"\xff\xfe\xfd"),
    "a list": header(b"[]"),
    "nested": header(b"[" * 100_000),
    "negative shape": header(
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', data=b"1234"
    ),
    "a shape beyond memory": header(
        b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}',
        data=b"1234",
    ),
    "offsets beyond the file": header(
        b'{"a":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}', data=b"1234"
    ),
    "offsets that overlap": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        data=b"1234",
    ),
    "an unknown dtype": header(
        b'{"a":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}}', data=b"1234"
    ),
    "a name twice": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        data=b"12345678",
    ),
    "data without a tensor": header(b"{}", data=b"1234"),
    "a pickle": pickle.dumps(Bomb()),
    "a zip": b"PK\x03\x04" + b"\x00" * 100,
}


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_tensor_files_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(TENSOR_FILES[name])
    for read in (files.read_tensors, files.read_header):
        assert not one_line(lambda read=read: read(path)), name
    # The same as a state whose hash is right: only what safetensors says counts.
    run_state.save_state(tmp_path, {"a": torch.zeros(2)}, {})
    replace_state(tmp_path, TENSOR_FILES[name])
    assert not one_line(lambda: run_state.load_state(tmp_path)), name
    assert not (tmp_path / "code-was-run").exists()


def replace_state(folder: Path, content: bytes) -> None:
    """Put other bytes in place of the newest state, with the hash that belongs to them."""
    pointer = json.loads((folder / "state" / "latest.json").read_text())
    (folder / "state" / pointer["file"]).write_bytes(content)
    pointer["sha256"] = hashlib.sha256(content).hexdigest()
    pointer["bytes"] = len(content)
    write_pointer(folder, pointer)


def write_pointer(folder: Path, pointer: Any) -> None:
    if isinstance(pointer, dict):
        pointer.pop("checksum", None)  # a pointer without one is read too
    (folder / "state" / "latest.json").write_text(json.dumps(pointer))


@FUZZ
@given(
    cut=st.integers(min_value=0, max_value=400),
    flips=st.lists(
        st.tuples(st.integers(min_value=0, max_value=399), st.integers(1, 255)), max_size=4
    ),
)
def test_states_with_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    """Bytes cut and changed, and the hash made to fit: tensors, or one line."""
    folder = tmp_path_factory.mktemp("state")
    tensors = {"a": torch.arange(12).reshape(3, 4).float(), "b": torch.tensor(7)}
    run_state.save_state(folder, tensors, {"step": 1})
    path = next((folder / "state").glob("*.safetensors"))
    original = path.read_bytes()
    content = bytearray(original)
    for at, change in flips:
        content[at % len(content)] ^= change
    kept = bytes(content[: len(content) - cut % len(content)])
    # With the old hash any change is noticed ...
    path.write_bytes(kept)
    assert one_line(lambda: run_state.load_state(folder)) == (kept == original)
    # ... and with a new one the reader has to cope.
    replace_state(folder, kept)
    one_line(lambda: run_state.load_state(folder))


# --- JSON


JSON_FILES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "not UTF-8": b'{"a": "\xff"}',
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "a key twice": b'{"file": "a", "file": "b"}',
    "a key twice inside": b'{"a": [{"b": 1, "b": 2}]}',
    "an endless number": b'{"a": ' + b"9" * 10_000 + b"}",
    "a pickle": pickle.dumps(Bomb()),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_that_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "latest.json").write_bytes(JSON_FILES[name])
    (tmp_path / "manifest.json").write_bytes(JSON_FILES[name])
    (tmp_path / "log.jsonl").write_bytes(JSON_FILES[name].replace(b"\n", b"") + b"\n")
    assert not one_line(lambda: files.read_json(tmp_path / "manifest.json"))
    assert not one_line(lambda: run_state.load_state(tmp_path))
    assert not one_line(lambda: ShardReader(tmp_path))
    one_line(lambda: files.read_jsonl(tmp_path / "log.jsonl"))


def test_json_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no space
    with pytest.raises(UserError, match="too large for a JSON file"):
        files.read_json(path)


@FUZZ
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_json_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.json").write_bytes(content)
    one_line(lambda: files.read_json(folder / "a.json"))
    one_line(lambda: files.read_jsonl(folder / "a.json"))


# --- pointers and manifests of junk


POINTER_KEYS = ("schema_version", "file", "bytes", "sha256", "score", "meta", "earlier", "x")


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(POINTER_KEYS), junk, min_size=1), drop=st.booleans())
def test_pointers_of_junk(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], drop: bool
) -> None:
    folder = tmp_path_factory.mktemp("state")
    for step in (1, 2):
        run_state.save_state(folder, {"a": torch.tensor(step)}, {"step": step}, keep=2)
    pointer = json.loads((folder / "state" / "latest.json").read_text())
    changed = {**pointer, **changes}
    (folder / "state" / "latest.json").write_text(json.dumps(changed))
    if changed != pointer and json.dumps(changed) != json.dumps(pointer):
        assert not one_line(lambda: run_state.load_state(folder)), "the checksum notices"
    if drop:
        changed = {key: value for key, value in changed.items() if key not in changes}
    write_pointer(folder, changed)
    one_line(lambda: run_state.load_state(folder))
    one_line(lambda: run_state.load_state(folder, "best"))
    # A state that cannot be trusted never stands in the way of the next.
    run_state.save_state(folder, {"a": torch.tensor(3)}, {"step": 3}, keep=2)
    assert run_state.load_state(folder)[1] == {"step": 3}


@FUZZ
@given(value=junk)
def test_entries_of_junk(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    for step in (1, 2):
        run_state.save_state(folder, {"a": torch.tensor(step)}, {"step": step}, keep=2)
    pointer = json.loads((folder / "state" / "latest.json").read_text())
    for key in ("file", "sha256", "meta", "score", "bytes"):
        entry = {**pointer["earlier"][0], key: value}
        write_pointer(folder, {**pointer, "earlier": [entry]})
        one_line(lambda: run_state.load_state(folder))


STATE_SPEC = {
    "architecture": "topk", "d_model": 4, "d_sae": 6, "k": 2, "hook_name": "blocks.1.hook_mlp_out",
}  # fmt: skip
STATE_TENSORS = {
    "0/param.W_enc_rows": torch.ones(6, 4), "0/param.W_dec": torch.ones(6, 4),
    "0/param.b_enc": torch.zeros(6), "0/param.b_dec": torch.zeros(4),
    "0/scale.mean": torch.zeros(4, dtype=torch.float64), "batches/rows": torch.ones(9),
}  # fmt: skip


@FUZZ
@given(data=st.data())
def test_states_of_junk_as_saes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("state")
    meta: dict[str, Any] = {"step": 3, "scales": [0.5], "saes": {"one": STATE_SPEC}}
    run_state.save_state(folder, STATE_TENSORS, meta)
    load_sae(folder)
    where = data.draw(st.sampled_from(["meta", "spec", "tensor"]))
    tensors = dict(STATE_TENSORS)
    if where == "meta":
        meta[data.draw(st.sampled_from(sorted(meta)))] = data.draw(junk)
    elif where == "spec":
        key = data.draw(st.sampled_from([*STATE_SPEC, "d_out", "dtype", "metadata", "x"]))
        meta["saes"] = {"one": {**STATE_SPEC, key: data.draw(junk)}}
    else:
        shape = data.draw(st.lists(st.integers(0, 6), max_size=3))
        tensors[data.draw(st.sampled_from(sorted(tensors)))] = torch.zeros(shape)
    run_state.save_state(folder, tensors, meta)
    one_line(lambda: load_sae(folder))
    one_line(lambda: load_sae(folder / "state" / "one"))


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acts")
    writer = ShardWriter(
        folder, layers=[1], sites=["resid_post"], d_model=4, dtype=torch.float32,
        facts={"model": "made-up"},
    )  # fmt: skip
    writer.add({(1, "resid_post"): torch.randn(6, 4)}, torch.arange(6))
    writer.close()
    return folder


@FUZZ
@given(data=st.data())
def test_manifests_of_junk(acts: Path, data: st.DataObject) -> None:
    path = acts / "manifest.json"
    before = path.read_text()
    manifest = json.loads(before)
    key = data.draw(st.sampled_from(sorted(manifest)))
    value = data.draw(junk)
    if key == "shards" and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(["file", "tokens", "sha256"]))
        value = [{**manifest["shards"][0], inner: value}]
    try:
        path.write_text(json.dumps({**manifest, key: value}))

        def read() -> None:
            reader = ShardReader(acts)
            for place in reader.places:
                for index in range(len(reader)):
                    reader.shard(index, *place)

        one_line(read)
    finally:
        path.write_text(before)


def test_a_state_behind_a_link_is_not_read(tmp_path: Path) -> None:
    run_state.save_state(tmp_path, {"a": torch.zeros(2)}, {})
    path = next((tmp_path / "state").glob("*.safetensors"))
    outside = tmp_path / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(UserError, match="missing or damaged"):
        run_state.load_state(tmp_path)
