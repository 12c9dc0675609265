"""Runs of several processes, forked from one that has imported everything.

`test_several_processes.py` starts it.

A program, because pytest's own process has threads that a fork would lose. It prints one JSON
document: what each case has found.
"""

import argparse
import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from saesteer.checkpoints import state_saver
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_json, read_jsonl
from saesteer.checkpoints.locks import folder_lock
from saesteer.checkpoints.run_state import has_state, load_state
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.config import JumpReLUConfig, TextConfig, TrainConfig
from saesteer.sae.model.language_model import load_model
from saesteer.sae.runs.processes import join_processes
from saesteer.sae.training import auxiliary_loss
from saesteer.sae.training.architectures import architecture_named
from saesteer.sae.training.input_scale import InputScale, PlacedRows
from saesteer.sae.training.sae_trainer import SAETrainer, Variant
from saesteer.sae.verbs.train import train

HERE = (1, "resid_post")
THERE = (2, "resid_post")
WIDTH = 8
D_SAE = 32
ROWS = 32
STEPS = 8

SHARED: dict[str, Any] = {
    "tokens": 100 * ROWS,
    "batch_tokens": ROWS,
    "lr": 1e-2,
    "warmup_steps": 2,
    # Some latents are soon dead, so that the auxiliary loss takes part.
    "dead_after_tokens": 2 * ROWS,
}

CASES: dict[str, dict[str, Any]] = {
    "topk": {"k": (3,)},
    "abstopk": {"k": (3,)},
    "batchtopk": {"k": (3,)},
    "batchtopk clipped, in pieces": {"k": (3,), "clip_norm": 0.05, "micro_batch_tokens": 16},
    "matryoshka": {"k": (3,), "prefixes": (3, 10, D_SAE)},
    "jumprelu": {"l0": (4.0,), "jumprelu": JumpReLUConfig(pre_act_loss=1e-3)},
    "jumprelu by steps": {
        "l0": (4.0,),
        "jumprelu": JumpReLUConfig(penalty="tanh", to_input=True, log_threshold=True),
    },
    "gemma-scope-2": {"l0": (4.0,), "prefixes": (3, 10, D_SAE)},
    "standard": {"l0": (4.0,)},
    "gated": {"l0": (4.0,)},
    "transcoder": {"k": (3,), "to_layer": 2},
    "skip-transcoder": {"k": (3,), "to_layer": 2},
    "crosscoder": {"k": (3,)},
}


def fork(work: Callable[[], Any], environment: Mapping[str, str], result: Path) -> int:
    """The id of a child that leaves what `work` returns, or its error, in a file."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    status = 1
    try:
        result.write_bytes(pickle.dumps(work()))
        status = 0
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        result.write_bytes(pickle.dumps(error if isinstance(error, Exception) else str(error)))
    finally:
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def a_store(port: int) -> Iterator[None]:
    """The store that torchrun keeps for its processes."""
    pid = os.fork()
    if pid == 0:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        while store:
            time.sleep(60)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def together(world: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns in each of some processes that torchrun might have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder, a_store(int(port)):
        results = [Path(folder) / str(rank) for rank in range(world)]
        pids = [
            fork(
                work,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                },
                results[rank],
            )
            for rank in range(world)
        ]
        for pid in pids:
            os.waitpid(pid, 0)
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in results]


# --- one SAE, in float64 ---


auxiliary_loss.MOST_AUX = 3  # fewer than are dead, so that they are chosen


def batches() -> list[Tensor]:
    """The same rows for all: two places side by side, the second made of the first."""
    rng = torch.Generator().manual_seed(3)
    directions = torch.randn(20, WIDTH, generator=rng)
    mixing = torch.randn(WIDTH, WIDTH, generator=rng) / WIDTH**0.5
    made = []
    for _ in range(STEPS):
        amounts = torch.rand(ROWS, 20, generator=rng)
        rows = (amounts * (amounts > 0.85)) @ directions
        made.append(torch.cat([rows, (rows @ mixing).relu()], dim=1))
    return made


def trainer_of(case: str, mesh: Any = None) -> SAETrainer:
    name = case.split(" ")[0]
    config = TrainConfig(arch=name, **SHARED, **CASES[case])
    kind = architecture_named(name)
    reads = (HERE, THERE) if name == "crosscoder" else (HERE,)
    writes = (THERE,) if kind.transcodes else reads
    architecture = kind.from_config(config)[0].at_width(D_SAE)
    architecture = architecture.at_places([WIDTH] * len(reads), [WIDTH] * len(writes))
    sample = batches()[0]
    scales = {
        HERE: InputScale.of(sample[:, :WIDTH]),
        THERE: InputScale.of(sample[:, WIDTH:]),
    }
    variant = Variant(reads, writes, D_SAE, architecture, 0)
    trainer = SAETrainer(variant, config, scales, torch.device("cpu"), mesh)
    return in_float64(trainer)


def in_float64(trainer: SAETrainer) -> SAETrainer:
    optimiser: Any = trainer.optimiser
    if trainer.mesh is None:
        optimiser.parameters = {n: p.double() for n, p in optimiser.parameters.items()}
    else:
        optimiser._whole = {n: p.double() for n, p in optimiser.whole.items()}
        optimiser.parameters = {n: optimiser._own(n, p) for n, p in optimiser.whole.items()}
    for moments in (optimiser.exp_avg, optimiser.exp_avg_sq):
        moments.update({name: moment.double() for name, moment in moments.items()})
    trainer.buffers = {name: buffer.double() for name, buffer in trainer.buffers.items()}
    return trainer


def trained(case: str, mesh: Any = None) -> dict[str, Any]:
    """The state after some steps, the log, and what calibration says."""
    trainer = trainer_of(case, mesh)
    columns = PlacedRows.columns_of([HERE, THERE], WIDTH)
    across = trainer.across
    size = trainer.config.micro_batch_tokens or ROWS
    for batch in batches():
        pieces = [piece.tensor_split(across.row_parts) for piece in batch.split(size)]
        own = torch.cat([parts[across.row_part] for parts in pieces])
        trainer.step(trainer.forward(PlacedRows(own, columns)))
    found: dict[str, Any] = {n: t.clone() for n, t in trainer.state_dict().items()}
    found["logged"] = trainer.take_log()
    if trainer.architecture.calibrates:
        # An odd number of rows, which cannot be shared out equally.
        rows = PlacedRows(batches()[-1][:-1], columns).part(across.row_part, across.row_parts)
        x, _ = trainer._scaled({p: rows.at(p) for p in (HERE, THERE)}, torch.float64)
        found["calibrated"] = trainer.architecture.calibrate(
            trainer.parameters, trainer.buffers, x, across
        )
    return found


def in_meshes(shards: list[int]) -> dict[str, dict[str, Any]]:
    from saesteer.sae.training.mesh.mesh import Mesh

    processes = join_processes(60)
    found = {}
    for parts in shards:
        mesh = Mesh(processes, parts, torch.device("cpu"))
        for case in CASES:
            found[f"{processes.world} processes, {parts} shards: {case}"] = trained(case, mesh)
    return found


def difference(a: Any, b: Any) -> float:
    """Largest difference of two states, by tensor relative to its largest value."""
    worst = 0.0
    for name, value in a.items():
        if isinstance(value, dict):
            worst = max(worst, difference(value, b[name]))
        else:
            x, y = (torch.as_tensor(v).double() for v in (value, b[name]))
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)))
    return worst


def steps_of_all(worlds: Mapping[int, list[int]]) -> dict[str, float]:
    """For each architecture and mesh: by how much it differs from one process."""
    alone = {case: trained(case) for case in CASES}
    found = {}
    for world, shards in worlds.items():
        results = together(world, lambda shards=shards: in_meshes(shards))
        if isinstance(results[0], Exception):
            raise results[0]
        for name, state in results[0].items():
            found[name] = difference(alone[name.partition(": ")[2]], state)
    return found


# --- whole runs ---


def run(folder: Path, config: TrainConfig, source: str, **options: Any) -> dict[str, Any]:
    """What a run has written, without timings."""
    train(folder, config, activations=source, device="cpu", **options)
    return written(folder)


def written(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "run.json")
    tensors, meta = load_state(folder)
    return {
        "weights": (folder / "sae_weights.safetensors").read_bytes(),
        "state": {name: tensor.clone() for name, tensor in tensors.items()},
        "stream": meta["stream"],
        "steps": [row["step"] for row in read_jsonl(folder / "metrics.jsonl")],
        "fvu": [row["fvu"] for row in read_jsonl(folder / "metrics.jsonl")],
        "heldout": record["sae"].get("fvu_heldout"),
        "mesh": record.get("mesh"),
        "excluded": record["excluded"],
    }


def runs(source: str, worlds: list[tuple[int, int]]) -> dict[str, Any]:
    """Runs from shards with different numbers of processes, and one that goes on with another."""
    config = TrainConfig(
        arch="batchtopk",
        layers=(1,),
        d_sae=(48,),
        k=(4,),
        tokens=2048,
        batch_tokens=64,
        buffer_tokens=512,
        checkpoint_every=256,
        keep_states=20,
        rank_timeout=60,
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        one = run(place / "one", config, source)
        for world, parts in worlds:
            own = replace(config, latent_shards=parts)
            label = f"{world} processes, {parts} shards"
            folder = place / label
            made = together(world, lambda f=folder, c=own: run_quietly(f, c, source))
            if isinstance(made[0], Exception):
                raise made[0]
            many = written(folder)
            found[label] = compared(one, many)
            # As if stopped in the middle: the states after it are taken away.
            back_to(folder, 1024)
            again = place / "again"
            shutil.copytree(folder, again)
            together(world, lambda c=own, f=again: run_quietly(f, c, source, resume=True))
            found[label]["same bytes when resumed"] = same(many, written(again))
            shutil.rmtree(again)
            train(folder, config, activations=source, device="cpu", resume=True)
            found[label]["on one process"] = compared(one, written(folder))
    return found


def run_quietly(folder: Path, config: TrainConfig, source: str, **options: Any) -> int:
    return len(train(folder, config, activations=source, device="cpu", **options))


def back_to(folder: Path, tokens: int) -> None:
    """Make an earlier state the newest, as after a kill."""
    pointer = json.loads((folder / "state" / "latest.json").read_text())
    entries = [pointer, *pointer["earlier"]]
    kept = [e for e in entries if e["meta"]["step"] * 64 <= tokens]
    newest = {"schema_version": 1, **kept[0], "earlier": kept[1:]}
    (folder / "state" / "latest.json").write_text(json.dumps(newest))


def compared(one: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    buffers = ("batches/rows", "batches/pending", "batches/incoming", "batches/rng")
    return {
        "same data": all(torch.equal(one["state"][n], many["state"][n]) for n in buffers)
        and one["stream"] == many["stream"],
        "same steps": one["steps"] == many["steps"],
        "same excluded": one["excluded"] == many["excluded"],
        "fvu": [one["fvu"][-1], many["fvu"][-1]],
        "heldout": [one["heldout"], many["heldout"]],
        "mesh": many["mesh"],
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs have written the same bytes."""
    equal = all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])
    return equal and all(a[key] == b[key] for key in ("weights", "stream", "steps", "fvu"))


# --- live ---


def live(model: str) -> dict[str, Any]:
    """A run live from a model, by one process and by two."""
    config = TrainConfig(
        layers=(1,),
        d_sae=(64,),
        k=(4,),
        tokens=1024,
        batch_tokens=64,
        buffer_tokens=256,
        rank_timeout=60,
        text=TextConfig(context=32, batch_size=2, epochs=50, max_norm_ratio=1.3),
    )
    lm = load_model(model, device="cpu")

    def quietly(folder: Path) -> int:
        return len(train(folder, config, model=lm, device="cpu"))

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        # Before this process opens the corpus: children would share its place in the file.
        made = together(2, lambda: quietly(place / "two"))
        if isinstance(made[0], Exception):
            raise made[0]
        quietly(place / "one")
        one, two = written(place / "one"), written(place / "two")
    rows = [state["state"]["batches/rows"].double() for state in (one, two)]
    return {
        "steps": [one["steps"], two["steps"]],
        "fvu": [one["fvu"][-1], two["fvu"][-1]],
        "heldout": [one["heldout"], two["heldout"]],
        "rows": [list(part.shape) for part in rows],
    }


# --- how runs end ---


def ends(source: str, model: str) -> dict[str, Any]:
    """What each process says, for each way to end, and the step of the state that is left."""
    config = TrainConfig(
        layers=(1,),
        d_sae=(48,),
        k=(4,),
        tokens=64 * 4000,
        batch_tokens=64,
        buffer_tokens=512,
        checkpoint_every=64,
        rank_timeout=20,
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        # Children inherit what is compiled here.
        run(Path(place) / "one", replace(config, tokens=64 * 20), source)

    def case(name: str, spoil: Callable[[int], None], **options: Any) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            given = {"activations": source, "config": config, **options}
            started = time.monotonic()
            said = together(2, lambda: ended(folder, spoil, **given))
            step = load_state(folder)[1]["step"] if has_state(folder) else 0
            found[name] = {
                "said": [[type(one).__name__, str(one)] for one in said],
                "step": step,
                "seconds": time.monotonic() - started,
                "leftovers": sorted(path.name for path in folder.glob(".*")),
            }

    def at_step(step: int, rank: int, work: Callable[[Any], Any]) -> Callable[[int], None]:
        """Do something to the trainer of one process before a step."""

        def spoil(own: int) -> None:
            forward = SAETrainer.forward

            def spoilt(self: SAETrainer, batch: PlacedRows) -> Any:
                if own == rank and self.steps_taken == step:
                    work(self)
                return forward(self, batch)

            SAETrainer.forward = spoilt  # type: ignore[method-assign]

        return spoil

    def not_a_number(trainer: SAETrainer) -> None:
        trainer.parameters["b_enc"].fill_(torch.inf)

    def full_disk(own: int) -> None:
        def save(*args: Any, **options: Any) -> None:
            raise UserError("cannot write the state: no space left on device")

        state_saver.save_state = save

    def unreadable(own: int) -> None:
        if own == 1:
            read = ShardReader.shard
            times = iter(range(1, 1000))

            def shard(self: ShardReader, *args: Any) -> Any:
                if next(times) > 3:
                    raise UserError("shard 2 is damaged")
                return read(self, *args)

            ShardReader.shard = shard  # type: ignore[method-assign,assignment]

    case("killed", at_step(40, 1, lambda trainer: os.kill(os.getpid(), signal.SIGKILL)))
    case("first killed", at_step(40, 0, lambda trainer: os.kill(os.getpid(), signal.SIGKILL)))
    case("not a number", at_step(40, 1, not_a_number))
    case("full disk", full_disk)
    case("unreadable", unreadable)
    case("stopped", at_step(40, 1, lambda trainer: os.kill(os.getpid(), signal.SIGINT)))
    case("not to be shared", lambda own: None, config=replace(config, d_sae=(49,)))
    lm = load_model(model, device="cpu")
    text = TextConfig(context=32, batch_size=2, epochs=1, max_norm_ratio=1.3, data=(__file__,))
    ending = replace(config, text=text, buffer_tokens=256)
    case("text ends", lambda own: None, config=ending, activations=None, model=lm)
    with tempfile.TemporaryDirectory() as place, folder_lock(Path(place)):
        said = together(2, lambda: ended(Path(place), lambda own: None, config, source))
        found["in use"] = {"said": [[type(one).__name__, str(one)] for one in said]}
    return found


def ended(
    folder: Path,
    spoil: Callable[[int], None],
    config: TrainConfig,
    activations: str | None,
    **source: Any,
) -> Any:
    spoil(int(os.environ["RANK"]))
    try:
        return train(folder, config, activations=activations, device="cpu", **source)
    except UserError as error:
        return error


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["steps", "runs", "live", "ends"])
    parser.add_argument("--source", default="")
    parser.add_argument("--model", default="")
    parser.add_argument("--more", action="store_true", help="four processes, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: Any
    match args.what:
        case "steps":
            found = steps_of_all({2: [1, 2], 4: [1, 2, 4]} if args.more else {2: [1, 2]})
        case "runs":
            more = [(4, 1), (4, 2), (4, 4), (2, 2)] if args.more else []
            found = runs(args.source, [(2, 1), *more])
        case "live":
            found = live(args.model)
        case _:
            found = ends(args.source, args.model)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
