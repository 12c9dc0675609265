"""Sharing an SAE: to a folder and to a server that speaks like the Hub, and back, pinned."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from saesteer.checkpoints import from_pretrained, load_sae, push
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import read_json, write_json
from saesteer.checkpoints.sae_file import SAESpec, save_sae

HOOK = "blocks.1.hook_resid_post"


def make_sae(folder: Path, seed: int = 0, layer: int = 1) -> Path:
    """An SAE with the records that training leaves."""
    generator = torch.Generator().manual_seed(seed)
    spec = SAESpec(
        architecture="topk", d_model=4, d_sae=8, k=2, hook_name=f"blocks.{layer}.hook_resid_post",
        hf_hook_name=f"model.layers.{layer}", model_name="org/lm",
        metadata={"context_size": 64, "prepend_bos": True, "saesteer": {
            "model": {"name": "org/lm", "hash": "0123abcd", "dtype": "bfloat16"}, "tokens": 12_345,
            "text": [{"name": "python-docs", "sha256": "f" * 64}, {"name": "/home/me/a.txt",
                                                                   "sha256": ["e" * 64] * 5}],
        }},
    )  # fmt: skip
    W_dec = torch.nn.functional.normalize(torch.randn(8, 4, generator=generator), dim=1)
    sha256 = save_sae(
        folder, spec, torch.randn(4, 8, generator=generator), torch.randn(8, generator=generator),
        W_dec, torch.randn(4, generator=generator),
    )  # fmt: skip
    write_json(folder / "run.json", {
        "verb": "train", "complete": True, "sae": {"init_seed": 3, "sha256": sha256},
        "config": {"seed": 5, "tokens": 12_345}, "recipe": {"activations": "/home/me/acts"},
        "model": {"name": "org/lm", "hash": "0123abcd", "dtype": "bfloat16"},
        "final": {"fvu": 0.1234, "l0": 2.0, "dead_fraction": 0.25},
        "versions": {"saesteer": "0.1.0", "torch": "2.9", "numpy": "2"}, "git_revision": "abc123",
    })  # fmt: skip
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def make_metrics(folder: Path, sha256: str) -> Path:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    folder.mkdir()
    write_json(folder / "metrics.json", {
        "sae": {"sha256": sha256}, "tokens": 1000, "documents": 7, "seen_in_training": False,
        "dead_fraction": 0.125, "fvu": figure, "l0": figure, "ce_recovered": figure, "kl": figure,
    })  # fmt: skip
    return folder


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    return make_sae(tmp_path / "sae")


def test_to_a_folder_and_back(sae: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    done = push(sae, str(shared), license_name="mit")
    original = load_sae(sae)
    assert done == {"repo": str(shared), "revision": None, "saes": {HOOK: original.sha256}}
    assert sorted(path.name for path in (shared / HOOK).iterdir()) == [
        "cfg.json", "metrics.jsonl", "run.json", "sae_weights.safetensors"
    ]  # fmt: skip
    for found in (
        from_pretrained(shared, HOOK),
        from_pretrained(shared),
        from_pretrained(shared, sha256=original.sha256),
        load_sae(f"{shared}:{HOOK}"),
    ):
        assert torch.equal(found.W_enc, original.W_enc) and found.spec == original.spec
        assert found.source == f"{shared}:{HOOK}" and found.sha256 == original.sha256
    assert not list(shared.rglob(".*")), "neither lock nor temporary file stays"
    assert "/home/me" not in (shared / HOOK / "run.json").read_text()
    assert read_json(shared / HOOK / "run.json")["recipe"]["activations"] == "acts"


def test_the_card_says_what_it_is_made_of(sae: Path, tmp_path: Path) -> None:
    metrics = make_metrics(tmp_path / "metrics", load_sae(sae).sha256)
    push(sae, str(tmp_path / "shared"), metrics=metrics, license_name="mit")
    text = (tmp_path / "shared" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "saelens" and front["license"] == "mit"
    assert front["base_model"] == ["org/lm"] and "saelens" in front["tags"]
    for fact in (
        f"| `{HOOK}` | `{HOOK}` | 8 | 2 | 12,345 tokens | 0.1234 | 2 | 0.25 |",
        "`org/lm`, weights 0123abcd, in bfloat16", "`python-docs` (SHA-256 ffffffffffffffff)",
        "and 2 more", "init 3, data 5", "saesteer 0.1.0, torch 2.9", "`abc123`",
        "Measured on 1,000 tokens of 7 documents:", "| fvu | 0.5 | [0.4, 0.6] |",
        f'SAE.from_pretrained("shared", "{HOOK}")',
        f'from_pretrained("shared", "{HOOK}", revision="COMMIT")', load_sae(sae).sha256,
    ):  # fmt: skip
        assert fact in text, fact
    with pytest.raises(UserError, match="measured other weights"):
        push(make_sae(tmp_path / "b", seed=1), str(tmp_path / "c"), metrics=metrics)
    for content, words in ((None, "cannot be read"), ("{", "cannot be"), ("[1]", "names no SAE")):
        file = tmp_path / "figures.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=rf"^`metrics` {file} {words}"):
            push(sae, str(tmp_path / "c"), metrics=file)


def test_a_second_sae_joins_the_first(sae: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    push(sae, str(shared))
    readme = shared / "README.md"
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    push(make_sae(tmp_path / "two", seed=1, layer=2), str(shared))
    text = readme.read_text()
    assert f"`{HOOK}`" in text and "`blocks.2.hook_resid_post`" in text
    assert text.endswith("\nMy own words.\n") and text.count("# Sparse autoencoders") == 1
    with pytest.raises(UsageError, match="name the SAE to open; it lists blocks.1"):
        from_pretrained(shared)
    with pytest.raises(UserError, match="holds no SAE 'x'; it lists"):
        from_pretrained(shared, "x")
    # Other weights do not silently take its place.
    with pytest.raises(UserError, match="holds other weights under .*`force`"):
        push(make_sae(tmp_path / "three", seed=3), str(shared))
    push(tmp_path / "three", str(shared), force=True)
    push(tmp_path / "three", str(shared))  # the same once more is no conflict
    assert from_pretrained(shared, HOOK).sha256 == load_sae(tmp_path / "three").sha256


def test_a_card_written_by_hand_stays(sae: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "README.md").write_text("# Mine\n")
    push(sae, str(tmp_path / "shared"))
    assert (tmp_path / "shared" / "README.md").read_text() == "# Mine\n"
    from_pretrained(tmp_path / "shared")


def test_a_run_of_several(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for layer in (1, 2):
        make_sae(run / f"layer-{layer}_k-2", layer=layer)
    done = push(run, str(tmp_path / "shared"))
    assert list(done["saes"]) == ["layer-1_k-2", "layer-2_k-2"]
    assert from_pretrained(tmp_path / "shared", "layer-2_k-2").spec.layer == 2
    with pytest.raises(UsageError, match="an id is for one SAE"):
        push(run, str(tmp_path / "shared"), sae_id="a")


def test_replaced_weights_are_noticed(sae: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    push(sae, str(shared))
    make_sae(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "sae_weights.safetensors", shared / HOOK)
    with pytest.raises(UserError, match="have SHA-256 .* not .*were replaced"):
        from_pretrained(shared)
    with pytest.raises(UserError, match="have SHA-256"):
        from_pretrained(tmp_path, "other", sha256="0" * 64)


@pytest.mark.parametrize("name", ["../sae", "/etc", "a/../b", ".", "", "a//b", "a b", "-x"])
def test_ids_stay_inside(sae: Path, tmp_path: Path, name: str) -> None:
    if name:  # an empty one stands for the default
        with pytest.raises(UsageError, match="id must be a name"):
            push(sae, str(tmp_path / "shared"), sae_id=name)
    with pytest.raises(UsageError, match="id must be a name"):
        from_pretrained(tmp_path, name)


def test_an_index_of_another_shape(sae: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    push(sae, str(shared))
    for content in ("[]", "{", '{"saes": []}', '{"saes": {"a": 1}}', "[" * 100_000):
        (shared / "saes.json").write_text(content)
        with pytest.raises(UserError, match="saes.json is not"):
            from_pretrained(shared)
    (shared / "saes.json").write_text('{"saes": {"../sae": {}}}')
    with pytest.raises(UserError, match="id must be"):
        from_pretrained(shared)
    (shared / "saes.json").unlink()
    assert from_pretrained(shared, HOOK).spec.d_sae == 8
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(sae)
    with pytest.raises(UserError, match="holds no SAE 'a'"):
        from_pretrained(tmp_path / "linked", "a")


def test_names_that_are_no_repository(sae: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`repo` must be NAMESPACE/NAME"):
        push(sae, "just-a-name")
    with pytest.raises(UsageError, match="neither a folder nor"):
        from_pretrained("just-a-name", "a")
    with pytest.raises(UsageError, match="has no revisions"):
        from_pretrained(tmp_path, "a", revision="main")
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        push(sae, "org/saes")
    with pytest.raises(UserError, match="cannot be reached"):
        from_pretrained("org/saes", "a")


# --- a server ------------------------------------------------------------------------------------

USE_HUB = """
import json, sys
import torch
from saesteer.checkpoints import from_pretrained, load_sae, push
from saesteer.checkpoints.errors import UserError

one, two = sys.argv[1:3]
found = {}
first = push(one, "org/saes", private=True)
second = push(two, "org/saes", force=True)
found["revisions"] = [first["revision"], second["revision"]]
pinned = from_pretrained("org/saes", "blocks.1.hook_resid_post", revision=first["revision"])
latest = from_pretrained("org/saes")
found["sources"] = [pinned.source, latest.source]
assert torch.equal(pinned.W_dec, load_sae(one).W_dec), "the pinned one is the old one"
assert torch.equal(latest.W_dec, load_sae(two).W_dec)
again = load_sae(pinned.source)
assert again.source == pinned.source and torch.equal(again.W_dec, pinned.W_dec)
for call in (
    lambda: from_pretrained("org/absent", "a"),
    lambda: from_pretrained("org/saes", "a"),
    lambda: from_pretrained("org/saes", revision="0" * 40),
    lambda: push(one, "org/saes"),
    lambda: from_pretrained("org/saes", sha256="0" * 64),
):
    try:
        call()
        found.setdefault("errors", []).append("none")
    except UserError as error:
        found.setdefault("errors", []).append(str(error))
import sae_lens
theirs = sae_lens.SAE.from_pretrained("org/saes", "blocks.1.hook_resid_post", device="cpu")
x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
found["largest_difference"] = float((theirs.encode(x) - latest.encode(x)).abs().max())
found["reconstruction"] = float((theirs(x) - latest.decode(latest.encode(x))).abs().max())
print(json.dumps(found))
"""


@pytest.fixture
def server() -> Iterator[tuple[str, Any]]:
    spec = importlib.util.spec_from_file_location(
        "hub_server", Path(__file__).with_name("hub_server.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serving() as running:
        yield running


def test_to_the_hub_and_back(sae: Path, server: tuple[str, Any], tmp_path: Path) -> None:
    """In a process of its own: libraries read the address of the Hub when they are imported."""
    address, hub = server
    two = make_sae(tmp_path / "two", seed=1)
    offline = {name for name in os.environ if name.endswith("_OFFLINE")}
    proxies = {name for name in os.environ if name.lower().endswith("_proxy")}
    environment = {k: v for k, v in os.environ.items() if k not in offline | proxies}
    environment |= {
        "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", USE_HUB, str(sae), str(two)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(hub.requests)
    found = json.loads(done.stdout.splitlines()[-1])
    history = [digest for digest, _ in hub.commits["org/saes"]]
    assert found["revisions"] == history[1:], "one commit a push, after the empty one"
    assert found["sources"] == [f"org/saes@{revision}:{HOOK}" for revision in history[1:]]
    assert hub.visibility["org/saes"]
    absent, no_id, no_revision, conflict, wrong_hash = found["errors"]
    assert "no such repository" in absent
    assert "holds no SAE 'a'; it lists blocks.1" in no_id
    assert "org/saes" in no_revision and "revision" in no_revision.lower()
    assert "holds other weights" in conflict and "have SHA-256" in wrong_hash
    assert not any("\n" in error for error in found["errors"])
    # What users of SAELens get is the same function; sums in another order, hence not to the bit.
    assert found["largest_difference"] < 1e-5 and found["reconstruction"] < 1e-5
    card = hub.commits["org/saes"][-1][1]["README.md"].decode()
    assert 'SAE.from_pretrained("org/saes"' in card
