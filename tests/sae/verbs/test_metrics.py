"""Figures of an SAE equal a slow computation, and are right for SAEs one can foresee."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec, save_sae
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.config import MetricsConfig, TextConfig
from saesteer.sae.measuring import splicing
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.contexts import ContextBatch, open_contexts
from saesteer.sae.verbs.metrics import metrics

Shared = Callable[..., LanguageModel]

TEXT = TextConfig(context=24, batch_size=4, seed=2)
CONFIG = MetricsConfig(tokens=400, text=TEXT, bootstrap=200)
FIGURES = (
    "fvu", "l0", "ce_plain", "ce_spliced", "ce_ablated", "ce_recovered", "kl",
    "ce_zero", "ce_recovered_zero", "ce_increase", "cosine", "relative_norm", "shrinkage",
    "token_error", "ev_legacy", "ev_about_zero",
)  # fmt: skip


def sae_of(
    lm: LanguageModel, W_enc: Tensor, W_dec: Tensor, *, layer: int = 1, **changes: Any
) -> SAE:
    """A ReLU SAE without biases unless given, with rows of `W_enc` and `W_dec` per latent."""
    b_enc = changes.pop("b_enc", torch.zeros(len(W_dec)))
    b_dec = changes.pop("b_dec", torch.zeros(lm.d_model))
    fields = {
        "architecture": "standard", "d_model": lm.d_model, "d_sae": len(W_dec),
        "hook_name": f"blocks.{layer}.hook_resid_post", "model_name": lm.name,
        "metadata": {"saesteer": {"model": {"hash": lm.fingerprint}}},
    }  # fmt: skip
    return SAE(SAESpec(**{**fields, **changes}), W_enc.T, b_enc, W_dec, b_dec, source="made-up")


def perfect(lm: LanguageModel, **changes: Any) -> SAE:
    """x = relu(x) - relu(-x): every activation is given back as it came."""
    both = torch.cat([torch.eye(lm.d_model), -torch.eye(lm.d_model)])
    return sae_of(lm, both, both, **changes)


def rough(lm: LanguageModel, **changes: Any) -> SAE:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(80, lm.d_model, generator=rng) / 6
    b_dec = 0.3 * torch.randn(lm.d_model, generator=rng)
    return sae_of(
        lm, rows, rows, architecture="topk", k=12, b_enc=torch.full((80,), -1.0), b_dec=b_dec,
        **changes,
    )  # fmt: skip


def contexts_for(lm: LanguageModel, config: MetricsConfig) -> list[ContextBatch]:
    """The batches that are read until enough rows are kept, when there are no sinks."""
    contexts = open_contexts(lm, config.text)
    batches: list[ContextBatch] = []
    while sum(int(batch.keep.sum()) for batch in batches) < config.tokens:
        batch = contexts.next_batch(config.text.batch_size)
        assert batch is not None
        batches.append(batch)
    return batches


def slow_figures(lm: LanguageModel, sae: SAE, config: MetricsConfig) -> dict[str, float]:
    """One context and one position at a time, with a hook of the test's own."""
    assert sae.spec.layer is not None
    block = lm.blocks[sae.spec.layer]
    rows = [
        (ids, keep)
        for batch in contexts_for(lm, config)
        for ids, keep in zip(batch.token_ids, batch.keep, strict=True)
    ]

    def run(ids: Tensor, new: Callable[[Tensor], Tensor] | None, keep: Tensor) -> tuple[Any, Any]:
        """Log-probabilities, and the activation, with the kept positions replaced by `new`."""
        seen: list[Tensor] = []

        def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
            seen.append(output[0].clone())
            if new is None:
                return None
            changed = output.clone()
            for position in range(len(ids)):
                if keep[position]:
                    changed[0, position] = new(output[0, position])
            return changed

        handle = block.register_forward_hook(hook)
        try:
            logits = lm.model(input_ids=ids[None]).logits[0]
        finally:
            handle.remove()
        return torch.log_softmax(logits.double(), dim=-1), seen[0].double()

    with torch.inference_mode():
        plain = [run(ids, None, keep) for ids, keep in rows]
        kept = torch.cat([x[keep] for (_, x), (_, keep) in zip(plain, rows, strict=True)])
        mean = kept.mean(dim=0)
        names = (
            "error variance square out product active plain spliced ablated zero kl "
            "cosine norm token legacy"
        )
        sums = dict.fromkeys(names.split(), 0.0)
        count = 0
        for (ids, keep), (log_p, x) in zip(rows, plain, strict=True):
            log_q = run(ids, lambda h: sae.decode(sae.encode(h)), keep)[0]
            log_m = run(ids, lambda h: mean.float(), keep)[0]
            log_0 = run(ids, torch.zeros_like, keep)[0]
            for t in range(len(ids) - 1):
                if not keep[t]:
                    continue
                count += 1
                f = sae.encode(x[t].float())
                out = sae.decode(f).double()
                error, variance = (x[t] - out).pow(2).sum(), (x[t] - mean).pow(2).sum()
                sums["error"] += float(error)
                sums["variance"] += float(variance)
                sums["square"] += float(x[t].pow(2).sum())
                sums["out"] += float(out.pow(2).sum())
                sums["product"] += float(x[t] @ out)
                sums["cosine"] += float(torch.cosine_similarity(x[t], out, dim=0))
                sums["norm"] += float(out.norm() / x[t].norm())
                sums["token"] += float(error / x[t].pow(2).sum())
                sums["legacy"] += float(1 - error / variance)
                sums["active"] += int((f > 0).sum())
                runs = {"plain": log_p, "spliced": log_q, "ablated": log_m, "zero": log_0}
                for name, log_probs in runs.items():
                    sums[name] -= float(log_probs[t, ids[t + 1]])
                sums["kl"] += float((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
    ce = {name: sums[name] / count for name in ("plain", "spliced", "ablated", "zero")}
    return {
        "fvu": sums["error"] / sums["variance"],
        "l0": sums["active"] / count,
        "kl": sums["kl"] / count,
        "ce_recovered": (ce["ablated"] - ce["spliced"]) / (ce["ablated"] - ce["plain"]),
        "ce_recovered_zero": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["plain"]),
        "ce_increase": ce["spliced"] - ce["plain"],
        "cosine": sums["cosine"] / count,
        "relative_norm": sums["norm"] / count,
        "shrinkage": sums["product"] / sums["out"],
        "token_error": sums["token"] / count,
        "ev_legacy": sums["legacy"] / count,
        "ev_about_zero": 1 - sums["error"] / sums["square"],
        **{f"ce_{name}": value for name, value in ce.items()},
        "tokens": count,
    }


@pytest.mark.parametrize(("family", "layer"), [("llama", 1), ("gpt2", 3), ("gemma2", 0)])
def test_figures_equal_a_slow_computation(family: str, layer: int, shared_lm: Shared) -> None:
    lm = shared_lm(family)
    sae = rough(lm, layer=layer)
    config = replace(CONFIG, tokens=150)
    found = metrics(sae, lm, config)
    expected = slow_figures(lm, sae, config)
    assert found["tokens"] == expected.pop("tokens") and found["layer"] == layer
    for name, value in expected.items():
        # float32 in batches against float64 sums one by one.
        assert found[name]["value"] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    assert 0.05 < found["fvu"]["value"] < 5 and found["kl"]["value"] > 0.01, "not a trivial case"


def test_log_probabilities_may_be_cut_into_pieces(
    shared_lm: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = shared_lm()
    whole = metrics(rough(lm), lm, CONFIG)
    monkeypatch.setattr(splicing, "_LOG_PROBS", 1)  # one context at a time
    pieces = metrics(rough(lm), lm, CONFIG)
    for name in FIGURES:
        assert pieces[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-4), name
        assert pieces[name]["low"] == pytest.approx(whole[name]["low"], rel=1e-3), name
    assert {**pieces, **{name: 0 for name in FIGURES}} == {**whole, **{name: 0 for name in FIGURES}}


def test_a_perfect_sae(shared_lm: Shared) -> None:
    lm = shared_lm()
    found = metrics(perfect(lm), lm, CONFIG)
    # x - x is 0 to the bit; what is left is nothing.
    assert found["fvu"]["value"] < 1e-12 and abs(found["kl"]["value"]) < 1e-9
    assert found["ce_recovered"]["value"] == pytest.approx(1.0)
    assert found["ce_spliced"]["value"] == pytest.approx(found["ce_plain"]["value"])
    assert found["l0"]["value"] == pytest.approx(lm.d_model) and found["dead_fraction"] == 0.0
    for name in ("cosine", "relative_norm", "shrinkage", "ev_legacy", "ev_about_zero"):
        assert found[name]["value"] == pytest.approx(1.0, abs=1e-6), name
    assert found["l0_quantiles"] == dict.fromkeys(("p05", "p25", "p50", "p75", "p95"), lm.d_model)


def test_the_mean_alone_explains_and_recovers_nothing(shared_lm: Shared) -> None:
    lm = shared_lm()
    ids = torch.cat([batch.token_ids for batch in contexts_for(lm, CONFIG)])
    keep = torch.cat([batch.keep for batch in contexts_for(lm, CONFIG)])
    with torch.inference_mode():
        states = lm.text_model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    mean = states[keep].double().mean(dim=0).float()
    zero = torch.zeros(6, lm.d_model)
    found = metrics(sae_of(lm, zero, zero, b_dec=mean), lm, CONFIG)
    assert found["fvu"]["value"] == pytest.approx(1.0, abs=1e-5)
    assert found["ce_recovered"]["value"] == pytest.approx(0.0, abs=1e-4)
    assert found["l0"]["value"] == 0.0 and found["dead_fraction"] == 1.0
    # A random model predicts no better for knowing the text: the two differ, that is all.
    assert abs(found["ce_ablated"]["value"] - found["ce_plain"]["value"]) > 0.01


def test_dead_means_never_on_this_text(shared_lm: Shared) -> None:
    lm = shared_lm()
    b_enc = torch.zeros(2 * lm.d_model)
    b_enc[:16] = -1e9
    found = metrics(perfect(lm, b_enc=b_enc), lm, CONFIG)
    assert found["dead_fraction"] == pytest.approx(16 / 64)


def test_isolated_documents_are_measured_as_if_alone(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    path = tmp_path / "short.jsonl"
    lines = [{"text": f"document {n} is about {n * n} herons and no more"} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = replace(TEXT, data=(str(path),), max_norm_ratio=1e9, context=64, isolate_documents=True)
    config = replace(CONFIG, text=text)
    found = metrics(rough(lm), lm, config)
    nats = rows = 0.0
    for batch in contexts_for(lm, config):
        for ids, keep, owners in zip(batch.token_ids, batch.keep, batch.document_ids, strict=True):
            for owner in owners.unique():
                inside = owners == owner
                alone = torch.log_softmax(lm.model(input_ids=ids[inside][None]).logits[0], dim=-1)
                scored = keep[inside][:-1]
                following = ids[inside][1:, None]
                nats -= float(alone[:-1].gather(1, following)[:, 0][scored].sum())
                rows += int(scored.sum())
                # Across a boundary a kept row has the next document's first token to predict.
                assert not keep[inside][-1] or inside.nonzero()[-1, 0] == len(ids) - 1
    assert found["tokens"] == rows
    assert found["ce_plain"]["value"] == pytest.approx(nats / rows, rel=1e-4)
    crossing = metrics(rough(lm), lm, replace(config, text=replace(text, isolate_documents=False)))
    assert abs(crossing["ce_plain"]["value"] - found["ce_plain"]["value"]) > 1e-4


def test_the_template_is_left_out_when_asked(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    path = tmp_path / "chat.jsonl"
    messages = [
        {"role": "user", "content": "where does a heron stand"},
        {"role": "assistant", "content": "in the water, on one leg"},
    ]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    text = replace(TEXT, data=(str(path),), epochs=40, max_norm_ratio=1e9)
    config = replace(CONFIG, tokens=10_000, text=text)
    found = metrics(rough(lm), lm, config)
    without = metrics(rough(lm), lm, replace(config, text=replace(text, exclude_template=True)))
    assert found["excluded"]["template"] == 0 < without["excluded"]["template"]
    assert without["excluded"]["special"] == found["excluded"]["special"]
    assert without["tokens"] < found["tokens"] - without["excluded"]["template"] / 2


def test_sinks_and_special_tokens_stay_as_they_are(fresh_lm: Shared) -> None:
    lm = fresh_lm()
    token = int(lm.tokenizer(" the")["input_ids"][0])
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[token] *= 300
    inputs: list[Tensor] = []
    lm.blocks[2].register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()))
    sae = rough(lm)
    found = metrics(sae, lm, CONFIG)
    batches = []
    contexts = open_contexts(lm, TEXT)
    runs = [inputs[at::4] for at in range(4)]
    for plain, spliced, ablated, zero in zip(*runs, strict=True):
        batch = contexts.next_batch(4)
        assert batch is not None
        batches.append(batch)
        out = ~batch.keep | (batch.token_ids == token)
        for changed in (spliced, ablated, zero):
            assert torch.equal(changed[out], plain[out])
            assert ((changed[~out] - plain[~out]).norm(dim=1) > 1e-3).all()
        torch.testing.assert_close(spliced[~out], sae.decode(sae.encode(plain[~out])))
        assert len(ablated[~out].unique(dim=0)) == 1
        assert not zero[~out].any()
    ids = torch.cat([batch.token_ids for batch in batches])
    special = torch.isin(ids, lm.special_ids)
    sinks = ids == token
    assert found["excluded"] == {
        "special": int(special.sum()), "template": 0, "sinks": int(sinks.sum())
    }  # fmt: skip
    assert found["excluded"]["sinks"] > 2 and found["excluded"]["special"] > 0
    assert found["tokens"] == int((~special & ~sinks)[:, :-1].sum())
    # One sink would hold nearly all of the variance.
    with_sinks = metrics(sae, lm, replace(CONFIG, text=replace(TEXT, max_norm_ratio=1e9)))
    assert with_sinks["excluded"]["sinks"] == 0
    assert abs(with_sinks["fvu"]["value"] - found["fvu"]["value"]) > 0.05


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_rows_that_training_keeps_are_measured(shared_lm: Shared, batch_size: int) -> None:
    lm, sae = shared_lm(), rough(shared_lm())
    # A ratio at which the running median decides about many rows.
    text = replace(TEXT, batch_size=batch_size, max_norm_ratio=1.2)
    stream = ActivationStream(lm, [resolve_site(lm, 1)], open_contexts(lm, text), text)
    rows = scored = 0
    while rows < 400:
        batch = stream.next_batch()
        assert batch is not None
        rows += len(batch.token_ids)
        scored += int((batch.positions < text.context - 1).sum())
    found = metrics(sae, lm, replace(CONFIG, text=text))
    assert found["excluded"] == stream.excluded and found["excluded"]["sinks"] > 50
    assert found["tokens"] == scored


def test_an_sae_of_centered_activations(shared_lm: Shared) -> None:
    """It reads and writes rows without their mean over d_model, which the model keeps."""
    lm = shared_lm("gpt2")
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    found = metrics(perfect(lm, metadata=metadata), lm, CONFIG)
    assert found["fvu"]["value"] < 1e-10 and abs(found["kl"]["value"]) < 1e-6
    assert found["ce_recovered"]["value"] == pytest.approx(1.0, abs=1e-4)
    # An SAE of nothing: all of the centered variance is left, and no more.
    zero = torch.zeros(2, lm.d_model)
    ids = torch.cat([batch.token_ids for batch in contexts_for(lm, CONFIG)])
    keep = torch.cat([batch.keep for batch in contexts_for(lm, CONFIG)])
    with torch.inference_mode():
        states = lm.text_model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    centered = states - states.mean(dim=2, keepdim=True)
    mean = centered[keep].mean(dim=0)
    found = metrics(sae_of(lm, zero, zero, metadata=metadata, b_dec=mean), lm, CONFIG)
    assert found["fvu"]["value"] == pytest.approx(1.0, abs=1e-4)


# --- intervals


def test_intervals_hold_the_value(shared_lm: Shared) -> None:
    lm = shared_lm()
    found = metrics(rough(lm), lm, CONFIG)
    for name in FIGURES:
        figure = found[name]
        assert figure["low"] < figure["value"] < figure["high"], name
    assert metrics(rough(lm), lm, CONFIG) == found, "seeded"
    assert metrics(rough(lm), lm, replace(CONFIG, bootstrap=50)) != found


def corpus(tmp_path: Path, documents: int, words: int) -> TextConfig:
    path = tmp_path / f"{documents}.jsonl"
    lines = [
        '{"text": "'
        + " ".join(f"{chr(97 + i % 26)}{j * (i + 3) % 17}" for j in range(words))
        + '"}'
        for i in range(documents)
    ]
    path.write_text("\n".join(lines))
    return replace(TEXT, data=(str(path),))


def test_documents_are_resampled_and_contexts_where_they_are_few(
    shared_lm: Shared, tmp_path: Path
) -> None:
    lm = shared_lm()
    many = metrics(rough(lm), lm, replace(CONFIG, text=corpus(tmp_path, 30, 12), tokens=900))
    assert many["documents"] > 20
    one = metrics(rough(lm), lm, replace(CONFIG, text=corpus(tmp_path, 1, 300), tokens=900))
    assert one["documents"] == 1
    for name in set(FIGURES) - {"ce_zero"}:  # this model gives zeros in, equal logits out
        assert one[name]["low"] < one[name]["high"], "one document alone would have no spread"


# --- beside another SAE


def test_against_another_seed(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    sae = rough(lm)
    order = torch.randperm(80)
    other = sae_of(
        lm, sae.W_enc.T[order], 3 * sae.W_dec[order], architecture="topk", k=12,
        b_enc=torch.full((80,), -1.0),
    )  # fmt: skip
    save_sae(tmp_path / "other", other.spec, **other.tensors())
    found = metrics(sae, lm, CONFIG, against=str(tmp_path / "other"))
    assert found["stability"]["source"] == str(tmp_path / "other")
    assert found["stability"]["matched_cosine"] == pytest.approx(1.0)
    assert metrics(sae, lm, CONFIG)["stability"] is None
    narrow = SAE(
        replace(sae.spec, d_model=8, d_sae=4, k=2), torch.zeros(8, 4), torch.zeros(4),
        torch.zeros(4, 8), torch.zeros(8), source="narrow",
    )  # fmt: skip
    with pytest.raises(UserError, match="`against` narrow writes rows of width 8"):
        metrics(sae, lm, CONFIG, against=narrow)


# --- bad input


def test_text_that_the_sae_was_trained_on(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    text = corpus(tmp_path, 12, 40)
    identity = open_contexts(lm, text).identity()
    python = open_contexts(lm, TEXT).identity()
    joined = open_contexts(lm, replace(text, data=(*text.data, "python-docs"))).identity()
    for trained_on, expected in (
        (None, None), (identity, True), (python, False), ([*python, *identity], True),
        (joined, True), ([], False),
    ):  # fmt: skip
        facts: dict[str, Any] = {"model": {"hash": lm.fingerprint}}
        if trained_on is not None:
            facts["text"] = trained_on
        sae = rough(lm, metadata={"saesteer": facts})
        found = metrics(sae, lm, replace(CONFIG, tokens=50, text=text))
        assert found["seen_in_training"] is expected


def test_what_cannot_be_measured(shared_lm: Shared, fresh_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    save_sae(tmp_path / "sae", rough(lm).spec, **rough(lm).tensors())
    found = metrics(str(tmp_path / "sae"), lm, replace(CONFIG, tokens=50))
    assert found["sae"]["source"] == str(tmp_path / "sae") and len(found["sae"]["sha256"]) == 64
    short = tmp_path / "short.txt"
    short.write_text("too short")
    cases: list[tuple[LanguageModel, dict[str, Any], str]] = [
        (lm, {"layer": 2}, "`layer` 2 conflicts"),
        (fresh_lm(seed=1), {}, "or `force`"),
        (lm, {"config": replace(CONFIG, text=replace(TEXT, data=(str(short),)))}, "fewer tokens"),
    ]
    for model, options, message in cases:
        with pytest.raises(UserError, match=message):
            metrics(rough(lm), model, **{"config": CONFIG, **options})
    assert metrics(rough(lm), fresh_lm(seed=1), CONFIG, force=True)["tokens"] > 300
