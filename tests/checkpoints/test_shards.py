"""Activation shards: whole, in order, and resumable at any moment."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import NonFiniteError, UsageError, UserError
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.checkpoints.shards import ShardReader, folder_name

D_MODEL = 4
PLACES = [(2, "resid_post"), (2, "attn_out"), (5, "resid_post"), (5, "attn_out")]


def corpus(start: int, tokens: int) -> tuple[dict[tuple[int, str], torch.Tensor], torch.Tensor]:
    """Activations that tell their token and their place."""
    ids = torch.arange(start, start + tokens)
    acts = {
        place: (ids[:, None] + 1000.0 * number).expand(tokens, D_MODEL).clone()
        for number, place in enumerate(PLACES)
    }
    return acts, ids


def writer_for(folder: Path, shard_tokens: int = 10, **changes: Any) -> ShardWriter:
    options: dict[str, Any] = {
        "layers": [2, 5],
        "sites": ["resid_post", "attn_out"],
        "d_model": D_MODEL,
        "dtype": torch.float32,
        "shard_tokens": shard_tokens,
        "facts": {"model": {"name": "tiny", "hash": "abc"}, "seed": 3},
    }
    return ShardWriter(folder, **{**options, **changes})


def harvest(writer: ShardWriter, start: int, sizes: list[int]) -> None:
    """Add batches of `sizes`, of which the first starts at token `start`."""
    for size in sizes:
        writer.add(*corpus(start, size), cursor={"next": start + size})
        start += size


def small_shards(folder: Path) -> ShardReader:
    writer = writer_for(folder)
    harvest(writer, 0, [6, 6, 3])
    writer.close({"excluded": 2})
    return ShardReader(folder)


def check_all(reader: ShardReader, tokens: int) -> None:
    """Every token of every place once, in order."""
    assert reader.tokens == tokens
    for place in PLACES:
        expected = corpus(0, tokens)[0][place]
        pieces = [reader.shard(index, *place) for index in range(len(reader))]
        assert torch.equal(torch.cat([rows for rows, _ in pieces]), expected)
        assert torch.equal(torch.cat([ids for _, ids in pieces]), torch.arange(tokens).int())


def nothing_left_over(folder: Path) -> bool:
    """Whether the folder holds the manifest and the files it lists, and no others."""
    listed = [entry["file"] for entry in files.read_json(folder / "manifest.json")["shards"]]
    found = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
    return sorted(found) == sorted([*listed, "manifest.json"])


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path) -> str:
    """The one line with which the reader refuses the folder."""
    with pytest.raises(UserError) as error:
        ShardReader(folder)
    text = str(error.value)
    assert "\n" not in text and f"`activations` {folder}" in text
    return text


def test_layout_and_manifest(tmp_path: Path) -> None:
    reader = small_shards(tmp_path)
    check_all(reader, 15)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["model"] == {"name": "tiny", "hash": "abc"}
    assert (manifest["layers"], manifest["sites"]) == ([2, 5], ["resid_post", "attn_out"])
    assert (manifest["d_model"], manifest["dtype"], manifest["tokens"]) == (4, "float32", 15)
    assert (manifest["seed"], manifest["excluded"], manifest["complete"]) == (3, 2, True)
    names = [entry["file"] for entry in manifest["shards"]]
    assert names[0] == "layer-2/shard-00000.safetensors"
    assert names[-1] == "layer-5-attn_out/shard-00001.safetensors"
    assert [entry["tokens"] for entry in manifest["shards"]] == [12] * 4 + [3] * 4
    for entry in manifest["shards"]:
        assert entry["sha256"] == files.sha256_file(tmp_path / entry["file"])
    tensors = load_file(tmp_path / names[0])
    assert tensors["activations"].shape == (12, 4) and tensors["token_ids"].dtype == torch.int32
    assert reader.shard_tokens == [12, 3] and len(reader) == 2
    reader.verify()


def test_a_module_path_as_site_stays_inside_the_folder() -> None:
    assert folder_name(3, "model.layers.3.mlp") == "layer-3-model.layers.3.mlp"
    assert "/" not in folder_name(3, "../a/b")


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    shard_tokens=st.integers(1, 12),
    stop=st.integers(0, 8),
)
def test_an_abandoned_writer_is_resumed(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_tokens: int, stop: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    harvest(writer_for(folder, shard_tokens), 0, sizes[:stop])  # ... and the process dies here
    writer, cursor = ShardWriter.resume(folder)
    done = cursor.get("next", 0)
    assert writer.tokens == writer.manifest["tokens"] == done
    assert not writer.manifest["complete"]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    left = [size for start, size in zip(starts, sizes, strict=True) if start >= done]
    assert done + sum(left) == sum(sizes)  # the cursor is the end of a whole batch
    harvest(writer, done, left)
    writer.close()
    if sum(sizes):
        check_all(ShardReader(folder), sum(sizes))
        ShardReader(folder).verify()


@pytest.mark.parametrize("how", ["kill", "ctrl-c"])
def test_a_stop_at_any_moment_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Stop around every call that changes the folder; resuming must complete the same shards.

    A kill is a copy of the folder as it is at that moment; Ctrl-C is an exception there.
    """
    sizes = [6, 6, 6, 6]
    stopped: list[Path] = []
    live = tmp_path / "live"
    originals = {name: getattr(os, name) for name in ("replace", "fsync")}

    def harvest_until(moment: int) -> int:
        """Run, stopping just before (even) or after (odd) a call; returns the number of moments."""
        seen = 0

        def passing() -> None:
            nonlocal seen
            if seen == moment:
                stopped.append(tmp_path / f"stopped-{moment}")
                shutil.copytree(live, stopped[-1])
                if how == "ctrl-c":
                    raise KeyboardInterrupt
            seen += 1

        for name, original in originals.items():

            def spy(*arguments: Any, original: Any = original) -> None:
                passing()
                original(*arguments)
                passing()

            monkeypatch.setattr(os, name, spy)
        shutil.rmtree(live, ignore_errors=True)
        live.mkdir()
        try:
            writer = writer_for(live)
            harvest(writer, 0, sizes)
            writer.close()
        except KeyboardInterrupt:
            shutil.rmtree(stopped[-1])  # cleaning up after Ctrl-C counts as well
            shutil.copytree(live, stopped[-1])
        monkeypatch.undo()
        return seen

    moments = harvest_until(-1)
    # Two shards of four files and four manifests, each with two fsyncs and a rename.
    assert moments == (2 * 4 + 4) * 3 * 2
    # From the first manifest on. Seven shares no factor with the pattern, so that every kind of
    # call, before and after, is met somewhere.
    for moment in range(5, moments, 7):
        harvest_until(moment)
    cursors = set()
    for folder in stopped:
        writer, cursor = ShardWriter.resume(folder)
        assert nothing_left_over(folder)
        done = cursor.get("next", 0)
        cursors.add(done)
        harvest(writer, done, [6] * ((24 - done) // 6))
        writer.close()
        check_all(ShardReader(folder), 24)
        assert nothing_left_over(folder)
    assert cursors == {0, 12, 24}


def test_checkpoint_saves_a_short_shard(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    harvest(writer, 0, [4])
    writer.checkpoint({"next": 4, "reason": "interrupted"})
    assert ShardReader(tmp_path).tokens == 4
    assert not ShardReader(tmp_path).manifest["complete"]
    writer, cursor = ShardWriter.resume(tmp_path)
    assert cursor == {"next": 4, "reason": "interrupted"}
    harvest(writer, 4, [3])
    writer.close()
    check_all(ShardReader(tmp_path), 7)


def test_resume_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"`out` {tmp_path} holds no manifest.json"):
        ShardWriter.resume(tmp_path)


def test_resume_refuses_a_cut_shard(tmp_path: Path) -> None:
    small_shards(tmp_path)
    path = tmp_path / "layer-5" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="shard-00000.safetensors is damaged or cut short"):
        ShardWriter.resume(tmp_path)


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("number", range(10))
def test_disk_full_while_writing_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The disk fills up at the n-th file of a shard (four places and the manifest)."""
    writer = writer_for(tmp_path)
    harvest(writer, 0, [10])
    before = sorted(tmp_path.rglob("*")), (tmp_path / "manifest.json").read_bytes()
    calls = []
    original = os.fsync

    def fill(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > number:
            disk_full()
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    if number == 9:  # the files are whole by then, only the folder's own fsync fails
        harvest(writer, 10, [10])
    else:
        with pytest.raises(UserError) as error:
            harvest(writer, 10, [10])
        text = str(error.value)
        assert "no space left while writing" in text and "`resume`" in text and "\n" not in text
        assert (sorted(tmp_path.rglob("*")), (tmp_path / "manifest.json").read_bytes()) == before
    monkeypatch.undo()
    assert writer.tokens == 20  # nothing was dropped: with space again, the writer goes on
    harvest(writer, 20, [1])
    writer.close()
    check_all(ShardReader(tmp_path), 21)


def test_disk_full_in_the_middle_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_for(tmp_path)
    monkeypatch.setattr(os, "write", disk_full)
    with pytest.raises(UserError, match="no space left while writing .*shard-00000.safetensors"):
        harvest(writer, 0, [10])
    assert [path.name for path in tmp_path.rglob("*.*")] == ["manifest.json"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_copied_and_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    writer = writer_for(tmp_path, dtype=dtype, layers=[0], sites=["resid_post"])
    buffer = torch.randn(3, D_MODEL)
    first = buffer.clone()
    writer.add({(0, "resid_post"): buffer}, torch.arange(3))
    buffer.zero_()
    writer.close()
    activations, token_ids = ShardReader(tmp_path).shard(0)
    assert torch.equal(activations, first.to(dtype))
    assert token_ids.tolist() == [0, 1, 2]


def test_non_finite_values_are_refused(tmp_path: Path) -> None:
    writer = writer_for(tmp_path, dtype=torch.float16, layers=[0], sites=["resid_post"])
    for value in (float("nan"), 1e6):  # 1e6 is infinite in float16
        rows = torch.zeros(2, D_MODEL)
        rows[1, 2] = value
        with pytest.raises(NonFiniteError, match="layer 0 resid_post.*`store_dtype` bfloat16"):
            writer.add({(0, "resid_post"): rows}, torch.arange(2))
    assert writer.tokens == 0


def test_add_wants_every_place_and_the_right_shape(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    acts, ids = corpus(0, 3)
    with pytest.raises(ValueError, match="shards want"):
        writer.add({PLACES[0]: acts[PLACES[0]]}, ids)
    with pytest.raises(ValueError, match="expected"):
        writer.add({**acts, PLACES[1]: torch.zeros(3, D_MODEL + 1)}, ids)
    assert writer.tokens == 0


@pytest.mark.parametrize(
    "changes",
    [{"layers": []}, {"sites": []}, {"d_model": 0}, {"shard_tokens": 0}, {"dtype": torch.int32}],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        writer_for(tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


class TestReader:
    def test_opening_loads_no_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        small_shards(tmp_path)
        monkeypatch.setattr(files, "read_tensors", disk_full)
        monkeypatch.setattr(ShardReader, "shard", disk_full)
        assert ShardReader(tmp_path).tokens == 15

    def test_a_place_must_be_clear(self, tmp_path: Path) -> None:
        reader = small_shards(tmp_path)
        for asked in ({}, {"layer": 2}, {"layer": 3, "site": "resid_post"}, {"site": "mlp_out"}):
            with pytest.raises(UserError, match=r"layers \[2, 5\].*`layer` and `site`"):
                reader.shard(0, **asked)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_shards_of_another_tool(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """Only the required keys, another float dtype, int64 ids, and bare file names."""
        (tmp_path / "layer-7").mkdir()
        tensors = {"activations": torch.ones(3, 2, dtype=dtype), "token_ids": torch.arange(3)}
        path = tmp_path / "layer-7" / "part.safetensors"
        save_file(tensors, path)
        for name in ("layer-7/part.safetensors", "part.safetensors"):
            manifest = {
                "schema_version": 1,
                "model": "m",
                "layers": [7],
                "sites": ["resid_post"],
                "d_model": 2,
                "dtype": "whatever",
                "tokens": 3,
                "shards": [{"file": name, "tokens": 3, "sha256": files.sha256_file(path)}],
            }
            files.write_json(tmp_path / "manifest.json", manifest)
            reader = ShardReader(tmp_path)
            assert reader.shard(0)[0].dtype == reader.dtype == dtype
            reader.verify()

    def test_no_manifest(self, tmp_path: Path) -> None:
        assert "holds no manifest.json" in refused(tmp_path)

    def test_no_tokens_yet(self, tmp_path: Path) -> None:
        writer_for(tmp_path)
        assert "holds no tokens" in refused(tmp_path)

    @pytest.mark.parametrize("key", ["schema_version", "model", "sites", "tokens", "shards"])
    def test_a_missing_key(self, tmp_path: Path, key: str) -> None:
        small_shards(tmp_path)
        edit_manifest(tmp_path, lambda manifest: manifest.pop(key))
        assert f"manifest.json lacks {key}" in refused(tmp_path)

    def test_another_schema(self, tmp_path: Path) -> None:
        small_shards(tmp_path)
        edit_manifest(tmp_path, lambda manifest: manifest.update(schema_version=9))
        assert "schema_version 9" in refused(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [{"layers": []}, {"layers": ["2"]}, {"sites": [1]}, {"tokens": "15"}, {"shards": 1}],
    )
    def test_values_of_the_wrong_type(self, tmp_path: Path, change: dict[str, Any]) -> None:
        small_shards(tmp_path)
        edit_manifest(tmp_path, lambda manifest: manifest.update(change))
        assert "wrong type" in refused(tmp_path)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        small_shards(tmp_path)
        (tmp_path / "layer-5" / "shard-00001.safetensors").unlink()
        assert "layer-5/shard-00001.safetensors is listed but missing" in refused(tmp_path)

    def test_a_cut_shard(self, tmp_path: Path) -> None:
        small_shards(tmp_path)
        path = tmp_path / "layer-5" / "shard-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert "is damaged or cut short" in refused(tmp_path)

    def test_a_changed_shard_fails_verify(self, tmp_path: Path) -> None:
        reader = small_shards(tmp_path)
        path = tmp_path / "layer-5" / "shard-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        says = "layer-5/shard-00001.safetensors.*SHA-256 differs"
        with pytest.raises(UserError, match=says):
            reader.verify()
        with pytest.raises(UserError, match=says):
            ShardReader(tmp_path).shard(1, 5, "resid_post")
        ShardReader(tmp_path).shard(0, 5, "resid_post")  # the other files are as listed
        for no_hash in (
            lambda manifest: [entry.update(sha256="") for entry in manifest["shards"]],
            lambda manifest: [entry.pop("sha256") for entry in manifest["shards"]],
        ):
            edit_manifest(tmp_path, no_hash)
            unlisted = ShardReader(tmp_path)
            unlisted.shard(1, 5, "resid_post")
            unlisted.verify()

    def test_a_shard_is_hashed_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reader = small_shards(tmp_path)
        hashed: list[Path] = []
        original = files.sha256_file

        def spy(path: Path) -> str:
            hashed.append(path)
            return original(path)

        monkeypatch.setattr(files, "sha256_file", spy)
        for _ in range(3):
            for index in range(2):
                reader.shard(index, 2, "attn_out")
        assert [path.name for path in hashed] == [f"shard-0000{i}.safetensors" for i in (0, 1)]

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_float8_is_read_as_bfloat16(self, tmp_path: Path, dtype: torch.dtype) -> None:
        (tmp_path / "layer-7").mkdir()
        values = torch.tensor([[0.0, -1.5], [448.0, 2.0**-9], [0.875, -0.0625]])
        tensors = {"activations": values.to(dtype), "token_ids": torch.arange(3).int()}
        save_file(tensors, tmp_path / "layer-7" / "part.safetensors")
        manifest = {
            "schema_version": 1,
            "model": "m",
            "layers": [7],
            "sites": ["resid_post"],
            "d_model": 2,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": 3,
            "shards": [{"file": "part.safetensors", "tokens": 3}],
        }
        files.write_json(tmp_path / "manifest.json", manifest)
        reader = ShardReader(tmp_path)
        rows = reader.shard(0)[0]
        assert reader.dtype == rows.dtype == torch.bfloat16
        # Exactly: bfloat16 has more exponent and more mantissa than either.
        assert torch.equal(rows.float(), values.to(dtype).float())

    def test_files_of_several_dtypes(self, tmp_path: Path) -> None:
        small_shards(tmp_path)
        path = tmp_path / "layer-2" / "shard-00000.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "activations": tensors["activations"].half()}, path)
        edit_manifest(tmp_path, lambda m: [entry.pop("sha256") for entry in m["shards"]])
        reader = ShardReader(tmp_path)
        assert reader.dtype == torch.float32
        check_all(reader, 15)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"activations": torch.zeros(3, 5), "token_ids": torch.zeros(3, dtype=torch.int32)},
            {"activations": torch.zeros(3, 4).int(), "token_ids": torch.zeros(3).int()},
            {"activations": torch.zeros(3, 4), "token_ids": torch.zeros(3)},
            {"activations": torch.zeros(3, 4)},
        ],
    )
    def test_wrong_tensors(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        small_shards(tmp_path)
        save_file(tensors, tmp_path / "layer-2" / "shard-00001.safetensors")
        assert "must hold activations [3, 4]" in refused(tmp_path)

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b/c", "layer-9/x", "layer-2\\x"])
    def test_names_that_lead_elsewhere(self, tmp_path: Path, name: str) -> None:
        small_shards(tmp_path)
        edit_manifest(tmp_path, lambda manifest: manifest["shards"][0].update(file=name))
        assert repr(name) in refused(tmp_path)

    def test_links_are_refused(self, tmp_path: Path) -> None:
        small_shards(tmp_path / "a")
        path = tmp_path / "a" / "layer-2" / "shard-00000.safetensors"
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert "missing (or a link)" in refused(tmp_path / "a")

    def test_a_wrong_count(self, tmp_path: Path) -> None:
        small_shards(tmp_path)
        edit_manifest(tmp_path, lambda manifest: manifest.update(tokens=16))
        assert "the manifest says 16" in refused(tmp_path)

    def test_a_place_with_fewer_shards(self, tmp_path: Path) -> None:
        small_shards(tmp_path)
        edit_manifest(tmp_path, lambda manifest: manifest["shards"].pop())
        assert "layer-5-attn_out hold 12 tokens" in refused(tmp_path)
