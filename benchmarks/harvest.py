"""Tokens per second out of a language model: saesteer, the bare forward pass, and other toolkits.

    python benchmarks/harvest.py                   # SmolLM2-135M at a quarter, half and full depth
    python benchmarks/harvest.py --layer 14 --rounds 7

Everything runs in one process on one loaded model, taking turns round by round, so that a machine
whose speed drifts slows all of them; what to quote is the ratio of medians. Where other programs
use the CPU as well, the ratio by CPU time (of all threads of this process) says more than the
clock. "bare" is the same model cut after the block that is read, on batches of token ids that were
prepared before, without a hook. Every other contender also reads and tokenises its text and hands
out what its users get:

    harvest to shards   kept rows written to disk, hashes included
    live batches        training batches out of the shuffle buffer
    live train          the same, and a TopK SAE of 8 x d_model trained on them
    SAELens HF          ActivationsStore.next_batch, model by AutoModelForCausalLM
    SAELens             the same, model converted for its default backend (TransformerLens)
    sparsify            its Trainer's pass: the whole base model, a hook that flattens
    dictionary_learning ActivationBuffer, out_batch_size as here

Toolkits that are not installed, or that do not run with the installed transformers, are named and
left out. Absolute figures mean nothing on another machine.
"""

import argparse
import contextlib
import io
import json
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints.background import BackgroundWriter
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.hooks import resolve_site
from saesteer.sae.models import LanguageModel, load_model
from saesteer.sae.producer import Producer
from saesteer.sae.sources import BatchStream, LiveSource
from saesteer.sae.stream import ActivationStream, open_activations
from saesteer.sae.topk import InputScale
from saesteer.sae.trainer import SAETrainer, Variant

BATCH_TOKENS = 2048
Round = Callable[[], int]
"""Does some work and returns for how many tokens."""


class Bench:
    """What all contenders share."""

    def __init__(self, lm: LanguageModel, layer: int, batch_size: int, context: int) -> None:
        self.lm = lm
        self.point = resolve_site(lm, layer)
        self.layer = self.point.layer
        self.text = TextConfig(batch_size=batch_size, context=context, epochs=1000)
        self.folder = Path(tempfile.mkdtemp(prefix="harvest-benchmark-"))
        self.cleanup = contextlib.ExitStack()
        self.documents = [str(d) for d in open_corpus_texts()]

    def stream(self) -> ActivationStream:
        return open_activations(self.lm, [self.point], self.text, replies_folder=self.folder)

    def batches(self) -> BatchStream:
        source = LiveSource(self.stream())
        return BatchStream(
            source, self.lm.d_model, tokens=10**9, batch_tokens=BATCH_TOKENS,
            buffer_tokens=4 * BATCH_TOKENS, dtype=self.lm.dtype, seed=0,
        )  # fmt: skip


def open_corpus_texts() -> list[str]:
    from saesteer.sae.corpora import PythonDocs

    return PythonDocs().topics


def bare(bench: Bench) -> Round:
    contexts = bench.stream().contexts
    model, whole = bench.lm.text_model, bench.lm.blocks
    name = bench.lm.blocks_path.rpartition(".")[2]

    def run() -> int:
        tokens = 0
        setattr(model, name, whole[: bench.layer + 1])
        try:
            with torch.inference_mode():
                for _ in range(2):
                    batch = prepared[len(seen) % len(prepared)].to(bench.lm.device)
                    seen.append(0)
                    model(input_ids=batch, use_cache=False)
                    tokens += batch.numel()
        finally:
            setattr(model, name, whole)
        return tokens

    prepared = [contexts.next_batch(bench.text.batch_size).token_ids for _ in range(4)]  # type: ignore[union-attr]
    seen: list[int] = []
    return run


def to_shards(bench: Bench) -> Round:
    stream = bench.stream()
    writer = ShardWriter(
        bench.folder / "shards", layers=[bench.layer], sites=["resid_post"],
        d_model=bench.lm.d_model, dtype=bench.lm.dtype, facts={"model": bench.lm.name},
        shard_tokens=8000,
    )  # fmt: skip
    background = BackgroundWriter(writer, 8000)

    def run() -> int:
        tokens = 0
        for _ in range(4):
            batch = stream.next_batch()
            assert batch is not None
            background.add(batch.activations, batch.token_ids, stream.state_dict())
            tokens += len(batch.token_ids)
        background.checkpoint()  # nothing of its work falls into the others' turns
        return tokens

    return run


def live_batches(bench: Bench) -> Round:
    batches = bench.batches()
    batches.fill()

    def run() -> int:
        for _ in range(4):
            batches.next_batch()
        return 4 * BATCH_TOKENS

    return run


def live_train(bench: Bench) -> Round:
    batches, d_model = bench.batches(), bench.lm.d_model
    config = TrainConfig(d_sae=(8 * d_model,), tokens=10**9)
    trainer = SAETrainer(
        Variant(bench.point.key, 8 * d_model, 32, 0), config, slice(0, d_model),
        InputScale.of(batches.fill()), bench.lm.device,
    )  # fmt: skip

    producer = Producer(batches, bench.lm.device)
    producer.__enter__()
    held = contextlib.ExitStack()
    held.enter_context(producer.paused())  # while the others have their turn

    bench.cleanup.callback(producer.__exit__, None, None, None)
    bench.cleanup.callback(held.close)

    def run() -> int:
        before = producer.ahead
        held.close()
        for _ in range(8):
            batch = producer.next_batch()
            assert batch is not None
            trainer.update(trainer.backward(batch))
        held.enter_context(producer.paused())
        # What was made counts, taken or not: the passes for it were on this contender's clock.
        return (8 + producer.ahead - before) * BATCH_TOKENS

    return run


def sae_lens(bench: Bench, model: Any, hook: str) -> Round:
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"text": bench.documents}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=bench.text.context,
        d_in=bench.lm.d_model,
        n_batches_in_buffer=20,
        total_training_tokens=1,
        store_batch_size_prompts=bench.text.batch_size,
        train_batch_size_tokens=BATCH_TOKENS,
        prepend_bos=True,
        normalize_activations="none",
        device=bench.lm.device,
        dtype=str(bench.lm.dtype).removeprefix("torch."),
    )
    store.next_batch()

    def run() -> int:
        return sum(len(store.next_batch()) for _ in range(4))

    return run


def sae_lens_hf(bench: Bench) -> Round:
    from sae_lens.load_model import HookedProxyLM

    name = f"{bench.lm.blocks_path}.{bench.layer}"
    proxy = HookedProxyLM(bench.lm.model, bench.lm.tokenizer, hook_names=[name])
    return sae_lens(bench, proxy, name)


def sae_lens_default(bench: Bench) -> Round:
    """TransformerLens knows models by Hub name; here its own conversion of Llama is called."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    given = bench.lm.model.config
    if given.model_type != "llama":
        raise RuntimeError("only Llama-like models are converted here")
    rope = getattr(given, "rope_parameters", None) or {}
    cfg = HookedTransformerConfig(
        d_model=given.hidden_size, n_layers=given.num_hidden_layers, d_mlp=given.intermediate_size,
        d_head=given.hidden_size // given.num_attention_heads, n_heads=given.num_attention_heads,
        n_key_value_heads=given.num_key_value_heads, n_ctx=bench.text.context,
        d_vocab=given.vocab_size, act_fn="silu", eps=given.rms_norm_eps,
        normalization_type="RMS", final_rms=True, positional_embedding_type="rotary",
        gated_mlp=True,
        rotary_adjacent_pairs=False, rotary_dim=given.hidden_size // given.num_attention_heads,
        rotary_base=rope.get("rope_theta", getattr(given, "rope_theta", 10_000)),
        original_architecture="LlamaForCausalLM", dtype=bench.lm.dtype,
        device=str(bench.lm.device), default_prepend_bos=False,
    )  # fmt: skip
    hooked = HookedTransformer(cfg, bench.lm.tokenizer, move_to_device=False)
    hooked.load_state_dict(convert_llama_weights(bench.lm.model, cfg), strict=False)
    hooked.to(bench.lm.device, print_details=False)
    ids = torch.randint(1000, 2000, (1, 16), device=bench.lm.device)
    hook = f"blocks.{bench.layer}.hook_resid_post"
    with torch.inference_mode():
        theirs = hooked.run_with_cache(ids, names_filter=hook)[1][hook].float()
        ours = bench.lm.model(ids, output_hidden_states=True).hidden_states[1].float()
        ours = ours if bench.layer == 0 else _at(bench, ids)
    off = float((theirs - ours)[:, 1:].norm() / ours[:, 1:].norm())
    if off > 0.1:
        raise RuntimeError(f"its conversion gives other activations (off by {off:.0%})")
    return sae_lens(bench, hooked, hook)


def _at(bench: Bench, ids: torch.Tensor) -> torch.Tensor:
    from saesteer.sae.hooks import run_to

    return run_to(bench.lm, [bench.point], input_ids=ids)[bench.point.key].float()


def sparsify(bench: Bench) -> Round:
    """The part of `sparsify.Trainer.fit` before its SAE: the whole base model under a hook."""
    import sparsify as _  # noqa: F401
    from datasets import Dataset
    from sparsify.data import chunk_and_tokenize

    rows = chunk_and_tokenize(
        Dataset.from_dict({"text": bench.documents}), bench.lm.tokenizer,
        max_seq_len=bench.text.context, num_proc=1,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(rows, batch_size=bench.text.batch_size)
    base = bench.lm.text_model

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()

    def run() -> int:
        tokens = 0
        got: list[torch.Tensor] = []
        hook = bench.point.module.register_forward_hook(
            lambda module, inputs, outputs: got.append(
                (outputs[0] if isinstance(outputs, tuple) else outputs).flatten(0, 1)
            )
        )
        with torch.no_grad():
            for _ in range(2):
                ids = next(batches)["input_ids"].to(bench.lm.device)
                base(ids)
                tokens += ids.numel()
        hook.remove()
        return tokens

    return run


def dictionary_learning(bench: Bench) -> Round:
    from dictionary_learning import ActivationBuffer
    from nnsight import LanguageModel as Traced

    traced = Traced(bench.lm.model, tokenizer=bench.lm.tokenizer)

    def texts() -> Iterator[str]:
        while True:
            yield from bench.documents

    module = traced
    for part in f"{bench.lm.blocks_path}.{bench.layer}".split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    buffer = ActivationBuffer(
        texts(), traced, module, d_submodule=bench.lm.d_model, n_ctxs=64,
        ctx_len=bench.text.context, refresh_batch_size=bench.text.batch_size,
        out_batch_size=BATCH_TOKENS, device=str(bench.lm.device),
    )  # fmt: skip
    next(buffer)

    def run() -> int:
        return sum(len(next(buffer)) for _ in range(4))

    return run


CONTENDERS: dict[str, Callable[[Bench], Round]] = {
    "bare": bare,
    "harvest to shards": to_shards,
    "live batches": live_batches,
    "live train": live_train,
    "SAELens HF": sae_lens_hf,
    "SAELens": sae_lens_default,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}


def measure(bench: Bench, names: list[str], rounds: int) -> dict[str, Any]:
    runs: dict[str, Round] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            with quiet():
                runs[name] = CONTENDERS[name](bench)
                runs[name]()  # warm up
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            runs.pop(name, None)
            if name == "bare":
                raise
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronise()
            started, worked = time.perf_counter(), time.process_time()
            with quiet():
                tokens = run()
            synchronise()
            speeds[name].append(tokens / (time.perf_counter() - started))
            work[name].append((time.process_time() - worked) / tokens)
    median = {name: statistics.median(found) for name, found in speeds.items()}
    seconds = {name: statistics.median(found) for name, found in work.items()}
    rows = {
        name: {
            "tokens_per_second": median[name],
            "fastest_over_slowest": max(found) / min(found),
            "share_of_bare": median[name] / median["bare"],
            "share_by_cpu_time": seconds["bare"] / seconds[name],
        }
        for name, found in speeds.items()
    }
    return {"layer": bench.layer, "results": rows, "left_out": absent}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layer", type=int, help="one block (default: quarter, half, full depth)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="names with commas between them; bare always runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lm = load_model(args.model)
    n = lm.n_layers
    layers = [args.layer] if args.layer is not None else [n // 4 - 1, n // 2 - 1, n - 1]
    chosen = args.only.split(",") if args.only else list(CONTENDERS)
    names = ["bare", *(name for name in chosen if name != "bare")]
    facts = {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "batch": (args.batch_size, args.context),
        "rounds": args.rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }
    found = []
    if not args.json:
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for layer in layers:
        bench = Bench(lm, layer, args.batch_size, args.context)
        with bench.cleanup:
            result = measure(bench, names, args.rounds)
        shutil.rmtree(bench.folder)
        found.append(result)
        if args.json:
            continue
        print(f"layer {result['layer']} of {n}{'':18}tokens/s   spread  of bare  by CPU time")
        for name, row in result["results"].items():
            print(
                f"  {name:28}{row['tokens_per_second']:>8,.0f}{row['fastest_over_slowest']:>8.2f}x"
                f"{row['share_of_bare']:>8.0%}{row['share_by_cpu_time']:>12.0%}"
            )
        for name, reason in result["left_out"].items():
            print(f"  {name:28}left out ({reason})")
    if args.json:
        print(json.dumps({**facts, "layers": found}, indent=2))


if __name__ == "__main__":
    main()
