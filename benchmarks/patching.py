"""Patching every attention head at the last token: our engine, its slow twin, and rivals.

    python benchmarks/patching.py                          # SmolLM2-135M: 30 blocks of 9 heads
    python benchmarks/patching.py --rounds 5 --only "saesteer engine;one by one, hooks"

Each contender puts z of every head of a corrupt prompt into a clean one of equal length, one head
at a time, and returns the answer's logit minus the wrong one's, from the same weights in one
process; they take turns. `off` is the largest difference from patching one by one. Both runs that
give the values are inside the time. With `--every 10` those that patch one by one do every tenth
head, and times are compared by the patch. A rival that is missing is listed as `not installed`.
"""

import argparse
import copy
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from random_model import load
from side_by_side import (
    Contender,
    add_flags,
    add_only,
    begin,
    choose,
    deliver,
    facts,
    measured,
    quiet,
    say,
    take_turns,
    why_not,
)
from torch import Tensor

from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs
from saesteer.mechanisms.data.pairs import load_pairs
from saesteer.mechanisms.patching.engine import PatchEngine, single
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, make_nodes, read_values
from saesteer.sae.model.attention import head_tap, heads
from saesteer.sae.model.language_model import LanguageModel, wrap_model

ENGINE, TWIN = "saesteer engine", "one by one, hooks"
Run = Callable[[], Tensor]


class Grid:
    """One pair of prompts and the nodes to patch."""

    def __init__(self, lm: LanguageModel, pair: EncodedPair, every: int = 1) -> None:
        self.lm, self.pair = lm, pair
        self.nodes: list[Node] = make_nodes(lm, ["z"])[::every]
        self.last = len(pair.clean) - 1
        self.ids = torch.tensor([pair.clean], device=lm.device)
        self.source = torch.tensor([pair.corrupt], device=lm.device)

    def difference(self, logits: Tensor) -> Tensor:
        """Answer minus wrong, of rows of logits."""
        return logits[..., self.pair.answer].double() - logits[..., self.pair.wrong].double()


def copied(lm: LanguageModel) -> LanguageModel:
    """A model of a rival's own: some replace its modules."""
    return wrap_model(copy.deepcopy(lm.model), lm.tokenizer, lm.name)


def engine(grid: Grid) -> tuple[Run, str]:
    def run() -> Tensor:
        found = torch.empty(len(grid.nodes), dtype=torch.float64)
        at = [grid.last] * len(grid.nodes)
        with head_tap(grid.lm) as tap:
            values, _ = read_values(
                grid.lm, grid.pair.corrupt, list(zip(grid.nodes, at, strict=True)), tap
            )
            prompt = PatchEngine(grid.lm, grid.pair.clean, tap)
            for rows, logits in prompt.run(single(grid.nodes, at, values)):
                found[list(rows)] = grid.difference(logits).cpu()
        return found

    return run, f"saesteer {version('saesteer')}"


def one_by_one(grid: Grid) -> tuple[Run, str]:
    def run() -> Tensor:
        at = [grid.last] * len(grid.nodes)
        values, _ = read_values(grid.lm, grid.pair.corrupt, list(zip(grid.nodes, at, strict=True)))
        sets = single(grid.nodes, at, values)
        with head_tap(grid.lm):
            rows = [grid.difference(patched_logits(grid.lm, grid.pair.clean, s)) for s in sets]
        return torch.stack(rows).cpu()

    return run, f"saesteer {version('saesteer')}, a whole pass a patch"


def transformer_lens(grid: Grid) -> tuple[Run, str]:
    import pandas
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(
        grid.lm.model.config._name_or_path or grid.lm.name,
        hf_model=grid.lm.model, tokenizer=grid.lm.tokenizer, device=str(grid.lm.device),
    )  # fmt: skip
    layout = heads(grid.lm)
    index = [(n.layer, grid.last, n.head) for n in grid.nodes]
    frame = pandas.DataFrame(index, columns=["layer", "pos", "head"])

    def run() -> Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(
                grid.source, names_filter=lambda name: name.endswith("attn.hook_z")
            )

            def setter(values: Tensor, where: Any, corrupt: Any) -> Tensor:
                _, position, head = where
                new = corrupt.view(1, -1, layout.n_heads, layout.d_head)
                values = values.clone()
                view = values.view(1, -1, layout.n_heads, layout.d_head)
                view[:, position, head] = new[:, position, head]
                return values

            found = patching.generic_activation_patch(
                bridge, grid.ids, cache, lambda logits: grid.difference(logits[0, -1]), setter,
                "z", index_df=frame,
            )  # fmt: skip
        return torch.as_tensor(found).double().cpu()

    return run, f"transformer-lens {version('transformer-lens')}, its patching module on a bridge"


def nnsight(grid: Grid, rows: int = 1) -> tuple[Run, str]:
    from nnsight import LanguageModel as Traced

    traced: Any = Traced(grid.lm.model, tokenizer=grid.lm.tokenizer)
    width = heads(grid.lm).d_head
    layers = range(grid.lm.n_layers)
    path = grid.lm.blocks_path.split(".")

    def blocks(model: Any) -> Any:
        for name in path:
            model = getattr(model, name)
        return model

    def run() -> Tensor:
        found = []
        with torch.no_grad():
            with traced.trace(grid.source):
                stored = list().save()
                for i in layers:
                    stored.append(blocks(traced)[i].self_attn.o_proj.input[:, -1])
            for node in grid.nodes:
                part = slice(node.head * width, (node.head + 1) * width)  # type: ignore[operator]
                value = stored[node.layer][:, part]
                with traced.trace(grid.ids):
                    blocks(traced)[node.layer].self_attn.o_proj.input[:, -1, part] = value
                    logits = traced.lm_head.output[:, -1].save()
                found.append(grid.difference(logits[0]))
        return torch.stack(found).cpu()

    return run, f"nnsight {version('nnsight')}, a trace a patch"


CONTENDERS: dict[str, Callable[[Grid], tuple[Run, str]]] = {
    ENGINE: engine,
    TWIN: one_by_one,
    "TransformerLens patching": transformer_lens,
    "nnsight trace": nnsight,
}

COLUMNS = {
    "contender": lambda row: row["contender"],
    "status": lambda row: row["status"],
    "patches": measured(lambda row: str(row["patches"])),
    "seconds": measured(lambda row: f"{row['median_ms'] / 1e3:.2f}"),
    "p20 to p80": measured(lambda row: f"{row['p20_ms'] / 1e3:.2f} to {row['p80_ms'] / 1e3:.2f}"),
    "ms a patch": measured(lambda row: f"{row['patch_ms']:.1f}"),
    "times the engine, a patch": measured(
        lambda row: f"{row['ratio']:.1f} ({row['ratio_p20']:.1f} to {row['ratio_p80']:.1f})"
    ),
    "off": measured(lambda row: f"{row['off']:.1g}"),
    "given": lambda row: row.get("given", ""),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, name="patching", rounds=3)
    add_only(parser)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, or random:SHAPE")
    parser.add_argument("--pairs", default="boxes:3", help="the first pair of equal length is used")
    parser.add_argument(
        "--every", type=int, default=1, help="one by one: every N-th head (default 1: all)"
    )
    args = parser.parse_args(argv)
    device = begin(args)
    names = choose(args.only, CONTENDERS, CONTENDERS)
    lm = load(args.model, device, dtype="float32")
    encoded, _ = encode_pairs(lm, load_pairs(args.pairs, n=20), drop=True)
    grid = Grid(lm, next(pair for pair in encoded if pair.equal_length))
    few = Grid(lm, grid.pair, args.every)
    expected = one_by_one(few)[0]()
    ready: dict[str, Contender] = {}
    rows: list[dict[str, Any]] = []
    off: dict[str, float] = {}
    for name, make in names.items():
        say(f"preparing {name}")
        try:
            with quiet():
                if name == ENGINE:
                    run, given = make(grid)
                    found = run()[:: args.every]
                else:
                    run, given = make(
                        few if name == TWIN else Grid(copied(lm), few.pair, args.every)
                    )
                    found = run()
                off[name] = float((found - expected).abs().max())
            if off[name] > 1e-2:
                raise RuntimeError(f"its effects differ by up to {off[name]:.3g}")
        except Exception as error:
            if name in (ENGINE, TWIN):
                raise
            rows.append({"contender": name, "status": why_not(error)})
            continue
        ready[name] = Contender(lambda number, run=run: run(), given)  # type: ignore[misc]
    with quiet():
        timings = take_turns(ready, device, rounds=args.rounds, warmup=args.warmup)
    for name, timing in timings.items():
        ratio = timing.over(timings[ENGINE]) if ENGINE in timings else {}
        rows.append(
            {"contender": name, "status": "ok", "given": ready[name].given, "off": off[name],
             "ratio": float("nan"), "ratio_p20": float("nan"), "ratio_p80": float("nan"),
             **timing.columns(), **ratio}
        )  # fmt: skip
    for row in rows:
        if row["status"] == "ok":
            row["patches"] = len(grid.nodes if row["contender"] == ENGINE else few.nodes)
            row["patch_ms"] = row["median_ms"] / row["patches"]
            share = len(grid.nodes) / row["patches"]
            row |= {key: row[key] * share for key in ("ratio", "ratio_p20", "ratio_p80")}
    rows.sort(key=lambda row: row.get("patch_ms", float("inf")))
    shape = {"blocks": lm.n_layers, "heads": heads(lm).n_heads, "tokens": len(grid.pair.clean)}
    deliver(args, device, facts(device, shape), rows, COLUMNS)


if __name__ == "__main__":
    main()
