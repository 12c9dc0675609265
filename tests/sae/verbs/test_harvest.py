"""Harvested rows equal the model's own hidden states, however the harvest is cut."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.durable import Draft
from saesteer.checkpoints.errors import Interrupted, NonFiniteError, UsageError, UserError
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.reader import ActivationStream, open_activations
from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.contexts import open_contexts
from saesteer.sae.verbs.harvest import harvest

Shared = Callable[..., LanguageModel]

TEXT = TextConfig(context=24, batch_size=4, seed=5)
CONFIG = HarvestConfig(layers=(1, 3), tokens=500, text=TEXT, shard_tokens=150)


def stored(folder: Path) -> dict[Any, Tensor]:
    """Everything in a folder of shards, by layer, with the token ids."""
    reader = ShardReader(folder)
    reader.verify()
    out: dict[Any, Tensor] = {}
    for place in reader.places:
        pieces = [(rows, ids) for _, rows, ids in reader.iter_shards(None, *place)]
        out[place] = torch.cat([rows for rows, _ in pieces])
        out["ids"] = torch.cat([ids for _, ids in pieces])
    return out


def equal(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def slow_reference(lm: LanguageModel, config: HarvestConfig) -> dict[Any, Tensor]:
    """Row by row from `hidden_states`, with the sink rule written out.

    The limit is a multiple of the mean, over this context and those before it, of the median norm.
    """
    contexts = open_contexts(lm, config.text)
    layers = [layer % lm.n_layers for layer in config.layers]
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    medians: dict[int, list[float]] = {layer: [] for layer in layers}
    ids: list[int] = []
    while (batch := contexts.next_batch(config.text.batch_size)) is not None:
        with torch.inference_mode():
            states = lm.model(input_ids=batch.token_ids, output_hidden_states=True).hidden_states
        for at in range(batch.token_ids.shape[0]):
            for layer in layers:
                norms = states[layer + 1][at][batch.keep[at]].norm(dim=-1)
                medians[layer].append(float(norms.median()))
            for position in range(batch.token_ids.shape[1]):
                here = {layer: states[layer + 1][at, position] for layer in layers}
                limits = {
                    m: config.text.max_norm_ratio * sum(v) / len(v) for m, v in medians.items()
                }
                sink = any(float(h.norm()) > limits[layer] for layer, h in here.items())
                if not batch.keep[at, position] or sink:
                    continue
                ids.append(int(batch.token_ids[at, position]))
                for layer in layers:
                    rows[layer].append(here[layer])
                if len(ids) == config.tokens:
                    done = {(layer, "resid_post"): torch.stack(rows[layer]) for layer in layers}
                    return {**done, "ids": torch.tensor(ids, dtype=torch.int32)}
    raise AssertionError("the corpus is too short")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_multimodal"])
def test_equals_a_slow_reference(family: str, shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm(family)
    # The last layer's hidden state is reported after the final norm: compare those below it.
    config = replace(CONFIG, layers=(-4, 2))
    manifest = harvest(lm, tmp_path / "out", config)
    assert equal(stored(tmp_path / "out"), slow_reference(lm, config))
    assert manifest["tokens"] == 500 and manifest["complete"]
    assert manifest["layers"] == [0, 2] and manifest["dtype"] == "float32"
    assert manifest["model"]["hash"] == lm.fingerprint and manifest["model"]["n_layers"] == 4
    assert manifest["hook_names"] == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    assert manifest["hf_hook_names"] == [f"{lm.blocks_path}.0", f"{lm.blocks_path}.2"]
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())


def with_sinks(lm: LanguageModel) -> int:
    """Make one ordinary token a sink; returns its id."""
    token = int(lm.tokenizer(" the")["input_ids"][0])
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[token] *= 300
    return token


def test_sinks_and_special_tokens_are_left_out_and_counted(
    fresh_lm: Shared, tmp_path: Path
) -> None:
    lm = fresh_lm()
    token = with_sinks(lm)
    config = replace(CONFIG, layers=(0, 2))
    manifest = harvest(lm, tmp_path / "out", config)
    found = stored(tmp_path / "out")
    assert equal(found, slow_reference(lm, config))
    assert token not in found["ids"] and not torch.isin(found["ids"], lm.special_ids).any()
    # Counted over the contexts that were read, all of the last batch included.
    contexts = open_contexts(lm, TEXT)
    batches: list[Tensor] = []
    kept = 0
    while kept < 500:
        batch = contexts.next_batch(4)
        assert batch is not None
        batches.append(batch.token_ids)
        kept += int((batch.keep & (batch.token_ids != token)).sum())
    read = torch.cat(batches)
    special = int(torch.isin(read, lm.special_ids).sum())
    assert manifest["excluded"] == {
        "special": special, "template": 0, "sinks": int((read == token).sum())
    }  # fmt: skip
    assert manifest["excluded"]["sinks"] > 3 and special > 0
    ratios = stored(tmp_path / "out")[0, "resid_post"].norm(dim=1)
    assert ratios.max() < 10 * ratios.median()
    # Switched off, they are in.
    text = replace(TEXT, max_norm_ratio=float("inf"))
    all_in = harvest(lm, tmp_path / "all", replace(config, text=text))
    assert all_in["excluded"]["sinks"] == 0 and token in stored(tmp_path / "all")["ids"]


@pytest.mark.parametrize("tokens", [1, 92, 93, 500])
def test_exactly_the_tokens_asked(tokens: int, shared_lm: Shared, tmp_path: Path) -> None:
    manifest = harvest(shared_lm(), tmp_path / "out", replace(CONFIG, tokens=tokens))
    whole = harvest(shared_lm(), tmp_path / "more", replace(CONFIG, tokens=501))
    assert manifest["tokens"] == tokens and whole["tokens"] == 501
    short, long = stored(tmp_path / "out"), stored(tmp_path / "more")
    assert all(torch.equal(short[key], long[key][:tokens]) for key in long)


def test_store_dtype_and_site(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    exact = harvest(lm, tmp_path / "a", replace(CONFIG, site="mlp_out"))
    assert exact["sites"] == ["mlp_out"] and (tmp_path / "a" / "layer-1-mlp_out").is_dir()
    harvest(lm, tmp_path / "b", replace(CONFIG, site="mlp_out", store_dtype="bfloat16"))
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert torch.equal(a[3, "mlp_out"].bfloat16(), b[3, "mlp_out"])
    path = "model.layers.{layer}.mlp.down_proj"
    harvest(lm, tmp_path / "c", replace(CONFIG, site=path))
    assert torch.equal(stored(tmp_path / "c")[1, path], a[1, "mlp_out"])


def test_a_site_of_another_width(shared_lm: Shared, tmp_path: Path) -> None:
    config = replace(CONFIG, site="model.layers.{layer}.mlp.up_proj")
    with pytest.raises(UsageError, match="up_proj has width 64, the residual stream .* has 32"):
        harvest(shared_lm(), tmp_path, config)


def test_a_loaded_model_and_its_folder_give_the_same(
    tiny_model_dir: Callable[..., Path], shared_lm: Shared, tmp_path: Path
) -> None:
    by_name = str(tiny_model_dir("llama"))
    harvest(by_name, tmp_path / "a", CONFIG, device="cpu", dtype="float32")
    harvest(shared_lm("llama"), tmp_path / "b", CONFIG)
    assert equal(stored(tmp_path / "a"), stored(tmp_path / "b"))


def test_replies_join_the_corpus(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    text = replace(TEXT, replies_share=0.5)
    manifest = harvest(
        lm, tmp_path / "out", replace(CONFIG, text=text),
        replies=["Say one", "Say two"], replies_folder=tmp_path / "replies",
    )  # fmt: skip
    (path,) = (tmp_path / "replies").iterdir()
    assert [entry["name"] for entry in manifest["data"]] == ["python-docs", path.name]
    spelled = lm.tokenizer.decode(stored(tmp_path / "out")["ids"].tolist())
    assert "Say one" in spelled and "Say two" in spelled


# --- bad input


def test_nan_names_layer_and_batch(fresh_lm: Shared, tmp_path: Path) -> None:
    lm = fresh_lm()
    points = [resolve_site(lm, 1)]
    contexts = open_contexts(lm, TEXT)
    seen = torch.cat([contexts.next_batch(4).token_ids for _ in range(2)])  # type: ignore[union-attr]
    third = contexts.next_batch(4)
    assert third is not None
    new = third.token_ids[~torch.isin(third.token_ids, seen)][0]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[new] = torch.nan
    stream = ActivationStream(lm, points, open_contexts(lm, TEXT), TEXT)
    stream.next_batch()
    stream.next_batch()
    with pytest.raises(NonFiniteError, match=r"NaN .* at layer 1 in batch 2: try `dtype` float32"):
        stream.next_batch()


def test_a_block_named_twice(shared_lm: Shared, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`layer` names a block twice: 3,3"):
        harvest(shared_lm(), tmp_path, replace(CONFIG, layers=(3, -1)))


def test_a_corpus_that_ends_is_a_warning(shared_lm: Shared, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words that fill some contexts. " * 40)
    text = replace(TEXT, data=(str(path),))
    said: list[str] = []
    manifest = harvest(
        shared_lm(), tmp_path / "out", replace(CONFIG, text=text, tokens=10**6), warn=said.append
    )
    tokens = manifest["tokens"]
    assert 0 < tokens < 10**4 and manifest["complete"]
    assert said == [
        f"the corpus ended after {tokens} of 1000000 `tokens`: give more `data` or `epochs`"
    ]
    twice = replace(CONFIG, text=replace(text, epochs=2), tokens=10**6)
    assert harvest(shared_lm(), tmp_path / "two", twice)["tokens"] >= 2 * tokens


def test_a_folder_in_use(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    first = harvest(lm, tmp_path / "out", CONFIG)
    with pytest.raises(UsageError, match="exists and is not empty: add `resume` .* `force`"):
        harvest(lm, tmp_path / "out", CONFIG)
    # A mistake in the command does not cost the old shards.
    for mistake in (
        {"config": replace(CONFIG, text=replace(TEXT, data=("absent.txt",)))},
        {"config": replace(CONFIG, layers=(9,))},
        {"model": "absent/model"},
    ):
        with pytest.raises(UserError):
            harvest(**{"model": lm, "out": tmp_path / "out", "config": CONFIG, **mistake},
                    force=True)  # fmt: skip
        assert ShardReader(tmp_path / "out").tokens == 500
    again = harvest(lm, tmp_path / "out", replace(CONFIG, tokens=100), force=True)
    assert again["tokens"] == 100 and len(again["shards"]) < len(first["shards"])
    on_disk = {str(p.relative_to(tmp_path / "out")) for p in tmp_path.rglob("*.safetensors")}
    assert on_disk == {entry["file"] for entry in again["shards"]}, "nothing of the old is left"


def test_two_harvests_into_one_folder(
    shared_lm: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = shared_lm()
    refused: list[str] = []

    def second(stage: str, done: int, total: int, note: str) -> None:
        if stage == "harvest" and not refused:
            for options in ({}, {"resume": True}, {"force": True}):
                with pytest.raises(UserError, match="is being written by process") as error:
                    harvest(lm, tmp_path / "out", CONFIG, **options)
                refused.append(str(error.value))

    harvest(lm, tmp_path / "out", CONFIG, progress=second)
    assert len(refused) == 3 and "choose another `out`" in refused[0]
    harvest(lm, tmp_path / "whole", CONFIG)
    assert equal(stored(tmp_path / "out"), stored(tmp_path / "whole"))
    assert not list((tmp_path / "out").glob(".*")), "the lock goes with its holder"


def test_a_disk_without_room_is_seen_before_the_work(
    shared_lm: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = shared_lm()
    row = 32 * 4 + 4  # float32 activations of width 32, and an id
    places = len(CONFIG.layers)
    # The lock file, of a few hundred bytes, counts as what lies there.
    free = [CONFIG.tokens * row * places - 1000]
    monkeypatch.setattr(
        "saesteer.checkpoints.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free[0])
    )
    with pytest.raises(UserError, match="harvesting writes up to .* lower `tokens`"):
        harvest(lm, tmp_path / "out", CONFIG)
    assert not list(tmp_path.rglob("*.safetensors"))
    free[0] += 1000
    harvest(lm, tmp_path / "out", CONFIG)
    # What lies there makes room for what replaces it, or is not written again.
    free[0] = 0
    assert harvest(lm, tmp_path / "out", CONFIG, resume=True)["complete"]
    assert harvest(lm, tmp_path / "out", CONFIG, force=True)["complete"]


# --- stopping and resuming


def test_an_interrupted_harvest_goes_on_to_the_bit(
    fresh_lm: Shared, stop_at: Callable[..., Any], tmp_path: Path
) -> None:
    lm = fresh_lm()
    with_sinks(lm)
    expected = harvest(lm, tmp_path / "whole", CONFIG)
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=r"stopped after \d+ of 500 tokens.*`resume`") as caught:
        harvest(lm, out, CONFIG, progress=stop_at("harvest", 50))
    done = ShardReader(out).tokens
    # Less than a shard: a stop writes what there is.
    assert 50 <= done < 150 and f"after {done} of" in str(caught.value)
    assert not ShardReader(out).complete
    with pytest.raises(Interrupted):
        harvest(lm, out, CONFIG, resume=True, progress=stop_at("harvest", 300))
    found = harvest(lm, out, CONFIG, resume=True)
    assert equal(stored(out), stored(tmp_path / "whole"))
    assert found["excluded"] == expected["excluded"] and found["complete"]
    # Once more changes nothing.
    assert harvest(lm, out, CONFIG, resume=True) == found


def test_a_killed_harvest_goes_on_at_its_last_shard(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    harvest(lm, tmp_path / "whole", CONFIG)

    def die(stage: str, done: int, total: int, note: str) -> None:
        if done > 250:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        harvest(lm, tmp_path / "out", CONFIG, progress=die)
    assert 150 <= ShardReader(tmp_path / "out").tokens < 250
    harvest(lm, tmp_path / "out", CONFIG, resume=True)
    assert equal(stored(tmp_path / "out"), stored(tmp_path / "whole"))


def test_resume_before_the_first_shard_starts_from_zero(shared_lm: Shared, tmp_path: Path) -> None:
    for content in ((), ("layer-1",)):
        out = tmp_path / f"out{len(content)}"
        for name in content:
            (out / name).mkdir(parents=True)
        assert harvest(shared_lm(), out, CONFIG, resume=True)["tokens"] == 500


def test_disk_full_keeps_what_was_whole(
    shared_lm: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = shared_lm()
    harvest(lm, tmp_path / "whole", CONFIG)
    original = Draft.__enter__
    written = 0

    def full(draft: Draft) -> Draft:
        nonlocal written
        if draft.path.name.startswith("shard"):
            written += 1
            if written > 3:  # the second shard of the second layer
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(draft)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "__enter__", full)
        with pytest.raises(UserError, match="no space left while writing .*shard-00001.*`resume`"):
            harvest(lm, out, CONFIG)
    reader = ShardReader(out)
    assert len(reader) == 1 and reader.tokens < 500
    assert len(list(out.rglob("*.safetensors"))) == 2 and not list(out.rglob("*.tmp"))
    harvest(lm, out, CONFIG, resume=True)
    assert equal(stored(out), stored(tmp_path / "whole"))


def test_resume_with_other_settings_is_refused(
    fresh_lm: Shared, stop_at: Callable[..., Any], tmp_path: Path
) -> None:
    lm = fresh_lm()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("some words to read again and again. " * 200)
    text = replace(TEXT, data=(str(corpus),))
    config = replace(CONFIG, text=text)
    with pytest.raises(Interrupted):
        harvest(lm, tmp_path / "out", config, progress=stop_at("harvest", 100))
    cases: list[tuple[Any, HarvestConfig, str]] = [
        (lm, replace(config, text=replace(text, context=32)), "`context` 24, now it is 32"),
        (lm, replace(config, text=replace(text, seed=6)), "`seed` 5, now it is 6"),
        (lm, replace(config, tokens=600), "`tokens` 500, now it is 600"),
        (lm, replace(config, layers=(1, 2)), r"`layer` \[1, 3\], now it is \[1, 2\]"),
        (lm, replace(config, site="mlp_out"), "`site` resid_post, now it is mlp_out"),
        (lm, replace(config, store_dtype="bfloat16"), "`store_dtype` float32, now it is bfloat16"),
        (fresh_lm(seed=1), config, f"`model` of hash {lm.fingerprint}"),
    ]
    for model, changed, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            harvest(model, tmp_path / "out", changed, resume=True)
        assert "\n" not in str(caught.value)
    corpus.write_text("other words to read again and again. " * 200)
    with pytest.raises(UserError, match="was made from other text or replies than those there now"):
        harvest(lm, tmp_path / "out", config, resume=True)


def test_streams_resume_at_any_batch(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()

    def fresh() -> ActivationStream:
        points = [resolve_site(lm, 2)]
        # A ratio at which the running median decides about many rows.
        text = replace(TEXT, max_norm_ratio=1.2)
        return open_activations(lm, points, text, replies_folder=tmp_path)

    whole = fresh()
    batches = [whole.next_batch() for _ in range(6)]
    stream = fresh()
    for batch in batches:
        state = json.loads(json.dumps(stream.state_dict()))
        stream = fresh()
        stream.load_state_dict(state)
        found = stream.next_batch()
        assert found is not None and batch is not None
        assert torch.equal(found.activations[2, "resid_post"], batch.activations[2, "resid_post"])
        assert torch.equal(found.token_ids, batch.token_ids)
    assert stream.state_dict() == whole.state_dict()
    assert 0.05 < whole.excluded["sinks"] / (6 * 4 * 24) < 0.5


def test_an_automatic_batch_size_is_kept_on_resume(
    shared_lm: Shared, stop_at: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saesteer.sae.runs import memory_use

    lm, config = shared_lm(), replace(CONFIG, text=replace(TEXT, batch_size=0))
    monkeypatch.setattr(memory_use, "automatic_batch_size", lambda lm, text: 3)
    with pytest.raises(Interrupted):
        harvest(lm, tmp_path / "out", config, progress=stop_at("harvest", 100))
    monkeypatch.setattr(memory_use, "automatic_batch_size", lambda lm, text: 9)
    found = harvest(lm, tmp_path / "out", config, resume=True)
    assert found["config"]["batch_size"] == 3
    harvest(lm, tmp_path / "whole", replace(config, text=replace(TEXT, batch_size=3)))
    assert equal(stored(tmp_path / "out"), stored(tmp_path / "whole"))


def test_a_model_given_by_name_keeps_only_what_it_needs(
    fresh_lm: Shared, shared_lm: Shared, tmp_path: Path
) -> None:
    lm = fresh_lm()
    config = replace(CONFIG, layers=(0, 1), tokens=200)
    harvest(lm, tmp_path / "a", config, consume_model=True)
    assert all(p.is_meta for p in lm.blocks[2].parameters()) and lm.unembed.weight.is_meta
    # Another site needs its own block alone; a path outside the blocks needs them all.
    harvest(shared_lm(), tmp_path / "b", config)
    assert equal(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert not shared_lm().unembed.weight.is_meta, "a loaded model is left whole unless asked"
    whole = fresh_lm()
    outside = replace(config, layers=(1,), site="model.norm")
    harvest(whole, tmp_path / "c", outside, consume_model=True)
    assert not any(p.is_meta for p in whole.blocks.parameters())


def test_positions_are_stored_when_asked(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    harvest(lm, tmp_path / "plain", CONFIG)
    assert set(ShardReader(tmp_path / "plain").columns(0)) == {"token_ids"}
    harvest(lm, tmp_path / "out", replace(CONFIG, keep_positions=True, shuffle=True))
    reader = ShardReader(tmp_path / "out")
    contexts = open_contexts(lm, TEXT).next_batch(40)
    assert contexts is not None
    seen = set()
    for index in range(len(reader)):
        columns = reader.columns(index)
        where = columns["contexts"], columns["positions"].long()
        assert torch.equal(contexts.token_ids[where].int(), columns["token_ids"])
        seen |= set(zip(*(values.tolist() for values in where), strict=True))
    assert len(seen) == 500, "each place once"
    assert reader.manifest["shuffle_seed"] == 5
