"""`saesteer harvest` on a tiny model."""

import errno
import json
import os
from pathlib import Path

import pytest

from saesteer.checkpoints.durable import Draft
from saesteer.checkpoints.shards import ShardReader

from .conftest import Cli

pytestmark = pytest.mark.usefixtures("short_dry_run")

SMALL = ("--tokens", 500, "--context", 32, "--batch-size", 4, "--dtype", "float32")


def test_shards_and_summary(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    outcome = cli("harvest", "-m", model, "--layers", "-1,0", *SMALL, "-o", out)
    assert outcome.status == 0, outcome.err
    assert "stored 500 tokens of layer 3, 0 (resid_post, d_model 32)" in outcome.out
    assert f"next: saesteer train --activations {out} -o runs/sae" in outcome.out
    assert "harvest: 500 tokens" in outcome.err
    assert "harvest: done, 500 tokens in" in outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    reader = ShardReader(out)
    assert (reader.layers, reader.tokens, reader.manifest["dtype"]) == ([3, 0], 500, "float32")
    assert reader.shard(0, 3)[0].shape == (500, 32)


def test_json_is_the_manifest(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    found = cli("harvest", "--model", model, "--layer", 2, *SMALL, "--site", "mlp_out",
                "--store-dtype", "bf16", "-o", out, "--json", "-q").json()  # fmt: skip
    assert found == json.loads((out / "manifest.json").read_text())
    assert (found["sites"], found["dtype"]) == (["mlp_out"], "bfloat16")
    assert (out / "layer-2-mlp_out" / "shard-00000.safetensors").is_file()


def test_flags_from_a_file(cli: Cli, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The heron stood still. " * 60}) + "\n")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model}\nlayer: [1]\ntokens: 100k\ncontext: 32\ndata: {text}\ndtype: float32\n"
        f"out: {tmp_path / 'acts'}\njson: true\n"
    )
    found = cli("harvest", "-c", config, "--tokens", 50, "-q").json()
    assert found["tokens"] == 50
    assert found["data"][0]["name"].endswith("text.jsonl")


def test_a_corpus_that_ends_early_is_a_warning(cli: Cli, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The heron stood still. " * 40)
    outcome = cli("harvest", "--model", model, "--layer", 1, "--data", text, "--context", 32,
                  "--tokens", 5000, "-o", tmp_path / "acts", "-q")  # fmt: skip
    assert outcome.status == 0
    assert outcome.err.startswith("warning: the corpus ended after ")
    assert outcome.err.count("\n") == 1


def test_replies_join_the_text(cli: Cli, model: Path, task: Path, tmp_path: Path) -> None:
    words = ("--replies", task, "--replies-share", 0.25, "-o", tmp_path / "acts", "--json", "-q")
    found = cli("harvest", "--model", model, "--layer", 1, *SMALL, *words).json()
    assert len(found["data"]) == 2
    assert "replies-" in found["data"][1]["name"]


def test_dry_run_writes_nothing(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    words = ("harvest", "--model", model, "--layer", "0,1", "--tokens", 1000, "--context", 32,
             "--store-dtype", "float16", "-o", out, "--dry-run", "-q")  # fmt: skip
    found = cli(*words, "--json").json()
    assert found["layers"] == [0, 1]
    # Per layer and token: 32 numbers of two bytes, and an int32 id.
    assert found["bytes"] == 1000 * 2 * (32 * 2 + 4)
    assert found["contexts"] in (32, 33)  # 1000 / 32, a special token here and there
    assert found["tokens_per_second"] > 0
    assert found["seconds"] == pytest.approx(1000 / found["tokens_per_second"])
    text = cli(*words).out
    assert "would store 1,000 tokens of layer 0, 1" in text
    assert "136.0 kB in float16" in text
    assert not out.exists()


def test_a_dry_run_ends(cli: Cli, model: Path, tmp_path: Path) -> None:
    words = ("harvest", "--model", model, "--layer", 1, *SMALL, "--dry-run")
    assert "dry run: done, 6 batches in" in cli(*words).err
    text = tmp_path / "text.txt"  # two batches of 4 contexts of 32 tokens, and no more
    text.write_text("\n\n".join(["heron stood still " * 20] * 4))
    outcome = cli(*words, "--data", text, "--context", 16, "--batch-size", 2)
    assert outcome.status == 0, outcome.err
    assert "dry run: done, " in outcome.err


# --- what goes wrong -----------------------------------------------------------------------------


def fails(cli: Cli, status: int, tmp_path: Path, *words: object) -> str:
    """The error of a harvest that ends so, and leaves no folder."""
    line = cli("harvest", "-q", "-o", tmp_path / "acts", *words).error(status)
    assert not (tmp_path / "acts").exists()
    return line


def test_unknown_model(cli: Cli, tmp_path: Path) -> None:
    line = fails(cli, 1, tmp_path, "--model", "no-such/model", "--layer", 1)
    assert "--model no-such/model" in line
    line = fails(cli, 1, tmp_path, "--model", tmp_path, "--layer", 1)
    assert f"--model {tmp_path} holds no config.json" in line


def test_missing_flags(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert "--layer is missing" in fails(cli, 2, tmp_path, "--model", model)
    assert "--out is missing" in cli("harvest", "-q", "--layer", 1).error(2)
    assert "--context must be at least 2, got 1" in fails(
        cli, 2, tmp_path, "--layer", 1, "--context", 1
    )
    assert "--tokens must be at least 1, got -3" in fails(
        cli, 2, tmp_path, "--layer", 1, "--tokens", -3
    )


def test_layer_out_of_range(cli: Cli, model: Path, tmp_path: Path) -> None:
    line = fails(cli, 2, tmp_path, "--model", model, "--layer", 4)
    assert "--layer 4 is out of range" in line
    assert "0..3" in line
    line = fails(cli, 2, tmp_path, "--model", model, "--layer", "3,-1")
    assert "--layer names a block twice: 3,3" in line


def test_unknown_site_and_task(cli: Cli, model: Path, tmp_path: Path) -> None:
    line = fails(cli, 2, tmp_path, "--model", model, "--layer", 1, "--site", "resid_last")
    assert "--site must be one of resid_post" in line
    line = fails(cli, 2, tmp_path, "--model", model, "--layer", 1, "--replies", "klingon")
    assert "--replies klingon" in line
    assert "french" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "holds no text"),
        (b" \n\n", "holds no text"),
        (b"caf\xe9 " * 400, "is not UTF-8"),
        (b"Too short.", "fewer tokens than one context of 64"),
    ],
)
def test_corpora_that_cannot_be_used(
    cli: Cli, model: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    line = fails(cli, 1, tmp_path, "--model", model, "--layer", 1, "--data", text,
                 "--context", 64)  # fmt: skip
    assert f"--data {text}" in line
    assert says in line


def test_truncated_model(cli: Cli, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(
            file.read_bytes()[: 5000 if "safetensors" in file.name else None]
        )
    line = fails(cli, 1, tmp_path, "--model", copy, "--layer", 1)
    assert f"--model {copy}" in line
    assert "damaged or cut short" in line


def test_existing_folder(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    out.mkdir()
    (out / "mine.txt").touch()
    words = ("harvest", "--model", model, "--layer", 1, *SMALL, "-o", out, "-q")
    line = cli(*words).error(2)
    assert f"--out {out} exists and is not empty" in line
    assert "--resume" in line and "--force" in line
    assert "was not written by saesteer" in cli(*words, "--force").error(2)
    assert (out / "mine.txt").exists()


def test_force_keeps_the_old_harvest_until_the_model_is_there(
    cli: Cli, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "acts"
    words = ("harvest", "--layer", 1, *SMALL, "-o", out, "-q")
    assert cli(*words, "--model", model).status == 0
    cli(*words, "--force", "--model", "no-such/model").error(1)
    assert ShardReader(out).tokens == 500
    found = cli(*words, "--force", "--model", model, "--tokens", 300, "--json").json()
    assert found["tokens"] == 300


def test_full_disk_then_resume(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "acts"
    words = ("harvest", "--model", model, "--layer", 1, *SMALL, "-o", out, "-q")
    enter = Draft.__enter__

    def full(draft: Draft) -> Draft:
        if "shard-" in draft.path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return enter(draft)

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "__enter__", full)
        line = cli(*words).error(1)
    assert "no space left while writing" in line
    assert "shard-00000.safetensors" in line
    assert "--resume" in line
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["manifest.json"]
    found = cli(*words, "--resume", "--json").json()
    assert found["tokens"] == 500


def test_interrupted_harvest_keeps_its_tokens(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two batches: what was read is written, and --resume goes on from there."""
    import signal

    from saesteer.sae.activations.reader import ActivationStream

    out = tmp_path / "acts"
    words = ("harvest", "--model", model, "--layer", 1, *SMALL, "-o", out, "-q")
    whole = cli(*words[:-2], tmp_path / "whole", "-q", "--json").json()
    step = ActivationStream.next_batch

    def interrupted(self: ActivationStream) -> object:
        if self.batches:  # the first one is read before there is anything to keep
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStream, "next_batch", interrupted)
        line = cli(*words).error(130)
    # Two batches of four contexts of 32, less a special token where a document ends.
    assert "stopped after 256 of 500 tokens" in line or "stopped after 255 of 500" in line
    assert "--resume" in line
    found = cli(*words, "--resume", "--json").json()
    assert (found["tokens"], found["excluded"]) == (500, whole["excluded"])
    ids = [ShardReader(folder) for folder in (out, tmp_path / "whole")]
    read = [
        [int(i) for index in range(len(reader)) for i in reader.shard(index, 1)[1]]
        for reader in ids
    ]
    assert read[0] == read[1]


# --- how text is read and stored -----------------------------------------------------------------


def test_flags_of_reading_and_storing(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    found = cli("harvest", "--model", model, "--layer", 1, *SMALL[:-4], "--isolate-documents",
                "--exclude-template", "--shuffle", "--keep-positions", "--shard-tokens", 200,
                "--batch-size", "auto", "--device-map", "auto", "--dtype", "float32",
                "-o", out, "--json", "-q").json()  # fmt: skip
    config = found["config"]
    assert config["isolate_documents"] and config["exclude_template"] and config["shuffle"]
    assert config["keep_positions"] and config["batch_size"] >= 1
    reader = ShardReader(out)
    assert len(reader) >= 1 and set(reader.columns(0)) == {"token_ids", "positions", "contexts"}
    assert found["peak_memory_bytes"] > 10**7


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch-size", "some"], "--batch-size must be a whole number, got 'some'"),
        (["--batch-size", "0"], "--batch-size must be at least 1, or auto, got '0'"),
        (["--quantize", "3bit"], "--quantize must be one of 8bit, 4bit, got '3bit'"),
        (["--shard-tokens", "0"], "--shard-tokens must be at least 1, got 0"),
        (["--rank-timeout", "0"], "--rank-timeout must be at least 1, got 0"),
    ],
)
def test_flags_that_cannot_be(cli: Cli, tmp_path: Path, words: list[str], says: str) -> None:
    assert says in fails(cli, 2, tmp_path, "--layer", 1, *words)


def test_dry_run_says_memory_and_batch(cli: Cli, model: Path) -> None:
    words = ("harvest", "--model", model, "--layer", 1, *SMALL, "--dry-run", "-q")
    text = cli(*words).out
    assert "of 32 tokens, 4 at once" in text and "  memory    " in text
    found = cli(*words, "--batch-size", "auto", "--json").json()
    assert found["batch_size"] > 4 and found["memory_bytes"] > found["model_bytes"]


def test_only_the_first_process_speaks(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 says nothing, and a folder that rank 0 has begun is none of its business."""
    out = tmp_path / "acts"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("saesteer.sae.harvest", lambda *args, **options: {"tokens": 1})
    outcome = cli("harvest", "--model", model, "--layer", 1, *SMALL, "-o", out, "--json")
    assert (outcome.status, outcome.out, outcome.err) == (0, "", "")
