"""Two processes share a corpus: nothing twice, nothing left out, and no hang when one dies."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_json
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.runs.processes import ALONE, Processes, join_processes
from saesteer.sae.verbs.harvest import harvest

TEXT = TextConfig(context=24, batch_size=4, seed=5, max_norm_ratio=1.2)
CONFIG = HarvestConfig(
    layers=(1, 3), tokens=3001, text=TEXT, shard_tokens=300, keep_positions=True, rank_timeout=60
)

# Each process harvests; rank 1 kills itself once `die_at` tokens are stored.
_CHILD = """
import os, signal, sys
from pathlib import Path
from saesteer.checkpoints.errors import UserError
from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.verbs.harvest import harvest

model, out, config, die_at, resume = sys.argv[1:]

def progress(stage, done, total, note):
    if os.environ["RANK"] == "1" and int(die_at) and done >= int(die_at):
        os.kill(os.getpid(), signal.SIGKILL)

try:
    found = harvest(model, out, eval(config), device="cpu", dtype="float32",
                    resume=resume == "resume", progress=progress)
except UserError as error:
    print(f"error: {error}")
    sys.exit(1)
print(f"stored {found['tokens']}")
"""


def run_two(
    model: Path, out: Path, config: HarvestConfig, *, die_at: int = 0, resume: bool = False
) -> list[tuple[int, str]]:
    """Exit status and output of both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(model), str(out), repr(config), str(die_at), "resume" if resume else "new"]
    children = []
    for rank in range(2):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        children.append(
            subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, *words],
                env={**os.environ, **names, **where},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    outputs = [child.communicate(timeout=120)[0] for child in children]
    return [(child.returncode, text) for child, text in zip(children, outputs, strict=True)]


def rows(folder: Path) -> list[tuple[Any, ...]]:
    """Context, position, token and activations of every row, in the order of the corpus."""
    reader = ShardReader(folder)
    reader.verify()
    found = []
    for index in range(len(reader)):
        columns = reader.columns(index)
        both = [reader.shard(index, *place)[0] for place in reader.places]
        for at in range(reader.shard_tokens[index]):
            key = [int(columns[name][at]) for name in ("contexts", "positions", "token_ids")]
            found.append((*key, *(values[at].tolist() for values in both)))
    return sorted(found)


def test_two_processes_store_what_one_does_also_after_one_of_them_died(
    tiny_model_dir: Any, tmp_path: Path
) -> None:
    model = tiny_model_dir("llama")
    alone = harvest(str(model), tmp_path / "one", CONFIG, device="cpu", dtype="float32")
    expected = rows(tmp_path / "one")
    assert len(expected) == 3001 and alone["excluded"]["sinks"] > 100

    out = tmp_path / "two"
    (status, said), (killed, _) = run_two(model, out, CONFIG, die_at=1500)
    assert (status, killed) == (1, -9), said
    assert "process 0 of 2 lost another one" in said and "`resume`" in said
    begun = read_json(out / "manifest.json")
    assert begun["complete"] is False and begun["processes"] == 2
    with pytest.raises(UserError, match="was begun with 2 processes, now there are 1"):
        harvest(str(model), out, CONFIG, device="cpu", dtype="float32", resume=True)

    # The other one may have been further when it saw the death: both go back to a common place.
    resumed = run_two(model, out, CONFIG, resume=True)
    assert [status for status, _ in resumed] == [0, 0], resumed
    assert all("stored 3001" in text for _, text in resumed)
    assert rows(out) == expected
    manifest = read_json(out / "manifest.json")
    assert manifest["complete"] and manifest["processes"] == 2
    # Counted over all contexts that were read, of which the last batch of two has more.
    assert 0 <= manifest["excluded"]["sinks"] - alone["excluded"]["sinks"] < 4 * 24
    left = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert left == {"manifest.json", *(entry["file"] for entry in manifest["shards"])}
    assert {context % 2 for context, *_ in expected} == {0, 1}


def test_alone_an_exchange_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([3, 1])
    assert ALONE.gather(values) == [values]
    assert torch.equal(ALONE.interleave(values, 5, 0), values)
    ALONE.wait_for_first()
    ALONE.same("text", "a")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of some scheduler: without a rank it is not torchrun
    assert join_processes(60) == ALONE


def test_interleaving_is_the_order_of_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has contexts 0, 2, 4 and rank 1 has 1 and 3, of at most four each."""
    everybody = [torch.tensor([0, 2, 4]), torch.tensor([1, 3])]
    padded = [torch.tensor([0, 2, 4, -1]), torch.tensor([1, 3, -1, -1])]

    def gather(self: Processes, values: Any) -> list[Any]:
        assert torch.equal(values, padded[self.rank])
        return padded

    monkeypatch.setattr(Processes, "gather", gather)
    for rank, own in enumerate(everybody):
        found = Processes(rank, 2).interleave(own, 4, -1)
        assert found.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]


def test_processes_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value + 1])
    with pytest.raises(UserError, match="processes of torchrun see different text"):
        Processes(0, 2).same("text", "a")
