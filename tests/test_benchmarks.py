"""The scripts in benchmarks/ run, list every contender, and compare like with like."""

import csv
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from saesteer.kernels.ops import encode_topk, sparse_decode

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
STEP = "--d-model 24 --d-sae 96 --k 4 --batch 48 --rounds 1 --warmup 0 --device cpu".split()
OURS = "saesteer step"
OPS = "--size 24x96x4x48 --rounds 1 --warmup 0 --device cpu".split()
RIVALS = {
    "SAELens SAETrainer.step": "sae_lens",
    "dictionary_learning TopKTrainer.update": "dictionary_learning",
    "sparsify coder step, Adam": "sparsify",
}

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a script as running it would: with its folder on the path, until it leaves it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        # Not under its own name: a module called `kernels` would meet Hugging Face's.
        spec = importlib.util.spec_from_file_location(
            f"benchmarks_{name}", BENCHMARKS / f"{name}.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # dataclasses look their module up while the class is made.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    with torch.random.fork_rng(devices=[]):
        yield load
    # The rivals' script enters this package without executing it: not for other tests to find.
    for name in [name for name in sys.modules if name.split(".")[0] == "dictionary_learning"]:
        del sys.modules[name]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A copy of the page that the scripts rewrite."""
    copy = tmp_path / "performance.md"
    copy.write_text((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    return copy


def between(text: str, name: str) -> str:
    return text.split(f"<!-- begin {name} -->\n")[1].split(f"<!-- end {name} -->")[0]


# ---------------------------------------------------------------------------------------------
# what the scripts share


def test_contenders_take_turns_and_the_warm_up_does_not_count(load: Load) -> None:
    shared = load("side_by_side")
    calls: list[str] = []

    def contender(name: str) -> Any:
        return shared.Contender(
            lambda number: calls.append(f"{name}{number}"), "", lambda: calls.append("-")
        )

    timings = shared.take_turns(
        {"a": contender("a"), "b": contender("b")}, torch.device("cpu"), rounds=2, warmup=1
    )
    assert calls == ["-", "a0", "-", "b0", "-", "a1", "-", "b1", "-", "a2", "-", "b2"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 2, "b": 2}


def test_medians_percentiles_and_ratios(load: Load) -> None:
    shared = load("side_by_side")
    slow = shared.Timing((4.0, 8.0, 6.0, 10.0, 2.0))
    fast = shared.Timing((2.0, 2.0, 2.0, 2.0, 2.0))
    assert slow.median == 6.0
    assert slow.p20 == pytest.approx(3.6)  # 0.2 of the way through 4 intervals: 2 + 0.8 * 2
    assert slow.p80 == pytest.approx(8.4)
    assert slow.slowest_over_fastest == 5.0
    assert slow.over(fast) == pytest.approx({"ratio": 3.0, "ratio_p20": 1.8, "ratio_p80": 4.2})
    assert shared.percentile([7.0], 0.8) == 7.0


def test_only_the_part_between_the_marks_of_a_page_changes(load: Load, tmp_path: Path) -> None:
    shared = load("side_by_side")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n<!-- begin y -->\n")
    shared.write_page(page, "x", "new\n")
    shared.write_page(page, "x", "newer\n")
    text = "a\n<!-- begin x -->\nnewer\n<!-- end x -->\nb\n<!-- begin y -->\n"
    assert page.read_text() == text
    with pytest.raises(SystemExit, match="needs the lines '<!-- begin y -->' and"):
        shared.write_page(page, "y", "new\n")
    assert page.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_script_leaves_its_folder(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers would take kernels.py there for Hugging Face's package of that name.
    shared = load("side_by_side")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), "", "/elsewhere"])
    shared.leave_folder()
    assert sys.path == ["", "/elsewhere"]


# ---------------------------------------------------------------------------------------------
# train_step.py


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def test_a_training_step_beside_its_rivals(
    load: Load, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--json", "--csv", str(tmp_path / "results"), "--page", str(page)]
    load("train_step").main([*STEP, *flags])
    document = json.loads(capsys.readouterr().out)
    facts, rows = document["facts"], {row["contender"]: row for row in document["rows"]}
    assert {"device", "threads", "torch", "revision", "d_model", "batch"} <= set(facts)
    assert list(rows) == [OURS, *RIVALS, "x @ W_enc alone", "encode_topk alone"]
    for name, row in rows.items():
        if not installed(RIVALS.get(name, "torch")):
            assert row == {"contender": name, "status": "not installed", "given": ""}
            continue
        assert row["status"] == "ok", name
        assert row["tokens_per_second"] == pytest.approx(48e3 / row["median_ms"])
        ours = rows[OURS]["median_ms"]
        assert row["saesteer_times_as_fast"] == pytest.approx(row["median_ms"] / ours)
        assert "float32" in row["given"]
        if "alone" not in name:
            assert "AuxK off" in row["given"]

    with (tmp_path / "results" / "train_step-cpu.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["contender"] for row in written] == list(rows)
    assert {(row["d_sae"], row["revision"]) for row in written} == {("96", facts["revision"])}
    table = (tmp_path / "results" / "train_step-cpu.md").read_text()
    assert between(page.read_text(), "train_step-cpu") == table
    assert table.count("\n|") == 2 + len(rows)


def test_every_step_finds_the_same_number_of_dead_latents(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = load("train_step")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(48, 24, generator=generator) for _ in range(2)]
    seen: list[int] = []

    make_trainer = train_step.make_trainer

    def watched(*arguments: Any) -> Any:
        trainer, step = make_trainer(*arguments)

        def take(rows: torch.Tensor) -> None:
            seen.append(int(trainer.silence.dead.sum()))
            step(rows)

        return trainer, take

    monkeypatch.setattr(train_step, "make_trainer", watched)
    contender = train_step.ours(train_step.Job(24, 96, 4, batches, dead=10))
    seen.clear()
    for number in range(3):
        contender.before()
        contender.step(number)
    assert seen == [10, 10, 10]
    assert "10 dead" in contender.given


def test_the_dead_are_the_most_silent(load: Load) -> None:
    rivals = load("rivals")
    counter = torch.zeros(6)
    noise = torch.tensor([0.0, 3.0, 1.0, 5.0, 0.0, 2.0])
    restore = rivals.keep_dead(counter, 2, 9.0, lambda number: counter.add_(noise))
    counter.fill_(7.0)
    restore()
    assert counter.tolist() == [0.0, 9.0, 0.0, 9.0, 0.0, 0.0]
    untouched = torch.ones(3)
    rivals.keep_dead(untouched, 0, 9.0, lambda number: untouched.zero_())()
    assert untouched.tolist() == [1.0, 1.0, 1.0]


def test_with_auxk_every_contender_gets_dead_latents(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    load("train_step").main([*STEP, "--auxk", "--dead", "0.25", "--json"])
    rows = {row["contender"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for name in (OURS, *RIVALS):
        if rows[name]["status"] == "ok":
            assert "24 dead" in rows[name]["given"], name
    assert rows[OURS]["status"] == "ok"


def test_a_step_of_each_architecture(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    train_step = load("train_step")
    train_step.main([*STEP, "--arch", "topk,batchtopk,matryoshka,jumprelu", "--json"])
    rows = {row["contender"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [name.split(", ")[1] for name in rows] == ["topk", "batchtopk", "matryoshka", "jumprelu"]
    topk = rows[f"{OURS}, topk"]
    for row in rows.values():
        assert row["over_topk"] == pytest.approx(row["median_ms"] / topk["median_ms"])
        assert row["cpu_over_topk"] == pytest.approx(row["cpu_ms"] / topk["cpu_ms"])
    # Thresholds start where k latents an example are above them.
    assert "L0 4.0 at the start" in rows[f"{OURS}, jumprelu"]["given"]
    with pytest.raises(SystemExit):
        train_step.main([*STEP, "--arch", "topk", "--only", OURS])
    assert "leave one out" in capsys.readouterr().err


def test_a_rival_that_is_missing_or_broken_is_listed(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = load("train_step")

    def broken(job: object) -> None:
        raise RuntimeError("operator does not exist")

    monkeypatch.setitem(sys.modules, "sparsify", None)
    stand_ins = {
        "SAELens SAETrainer.step": broken,
        "dictionary_learning TopKTrainer.update": train_step.product,
    }
    monkeypatch.setattr(train_step, "CONTENDERS", train_step.CONTENDERS | stand_ins)
    train_step.main(STEP)
    out = capsys.readouterr().out.splitlines()
    lines = {line.split("  ")[0]: line for line in out}
    assert lines["sparsify coder step, Adam"].split()[4:6] == ["not", "installed"]
    assert "failed: RuntimeError" in lines["SAELens SAETrainer.step"]
    assert " x (" in lines["dictionary_learning TopKTrainer.update"]


def test_our_own_failure_is_no_row(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = load("train_step")

    def broken(job: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(train_step, "CONTENDERS", train_step.CONTENDERS | {OURS: broken})
    with pytest.raises(RuntimeError, match="ours"):
        train_step.main(STEP)


def test_one_by_one_our_own_failure_is_a_row(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU that is at hand for minutes one failure must not cost the other results."""
    train_step = load("train_step")

    def broken(job: object) -> None:
        raise torch.OutOfMemoryError("ours")

    monkeypatch.setattr(train_step, "CONTENDERS", train_step.CONTENDERS | {OURS: broken})
    train_step.main([*STEP, "--alone", "--json", "--only", f"{OURS};x @ W_enc alone"])
    ours, product = json.loads(capsys.readouterr().out)["rows"]
    assert ours == {"contender": OURS, "status": "failed: OutOfMemoryError", "given": ""}
    assert product["status"] == "ok" and product["median_ms"] > 0
    assert "saesteer_times_as_fast" not in product


def test_out_of_time_the_last_contenders_are_left_out(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = load("train_step")

    def slow(job: Any) -> Any:
        time.sleep(0.6)
        return train_step.product(job)

    monkeypatch.setattr(train_step, "CONTENDERS", {"slow": slow, "never": train_step.product})
    train_step.main([*STEP, "--json", "--seconds", "0.5"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == ["ok", "no time left"]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_dense_step_trains_a_topk_sae(load: Load, compiled: bool) -> None:
    dense = load("dense_step")
    W_enc, W_dec = torch.randn(24, 96), torch.randn(96, 24)
    b_enc, b_dec, x = torch.randn(96), torch.randn(24), torch.randn(48, 24)
    acts, indices = encode_topk(x - b_dec, W_enc.T.contiguous(), b_enc, 4)
    error = sparse_decode(acts, indices, W_dec, b_dec) - x
    fvu = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    # Sums of 96 float32 products in another order.
    torch.testing.assert_close(dense.dense_loss(x, W_enc, b_enc, W_dec, b_dec, 4), fvu)

    losses: list[float] = []
    dense_loss = dense.dense_loss

    def watched(*arguments: Any) -> torch.Tensor:
        loss: torch.Tensor = dense_loss(*arguments)
        losses.append(float(loss.detach()))
        return loss

    contender = dense.dense_step(dense.Job(24, 96, 4, [x]), compiled=compiled)
    if compiled:
        contender.step(0)
        assert "torch.compile" in contender.given
        return
    dense.dense_loss = watched
    for number in range(20):
        contender.step(number)
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------------------------------
# kernels.py


def test_every_op_beside_plain_pytorch(
    load: Load, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = load("kernels")
    kernels.main([*OPS, "--json", "--csv", str(tmp_path), "--page", str(page)])
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["rows"]
    measured = {row["op"].split(",")[0] for row in rows}
    left_out = {
        line.split()[2] for line in captured.err.splitlines() if line.startswith("not measured")
    }
    assert measured | left_out >= set(kernels.public_ops())
    assert "encode_topk" in measured and not measured & left_out
    assert {row["latents"] for row in rows if row["op"] == "sparse_decode"} == {"uniform", "zipf"}
    for row in rows:
        roofline = row["share_of_roofline"] * row["median_ms"]
        assert row["roofline_ms"] == pytest.approx(roofline) and roofline > 0
        assert row["times_as_fast"] == pytest.approx(row["torch_median_ms"] / row["median_ms"])
    assert between(page.read_text(), "kernels-cpu") == (tmp_path / "kernels-cpu.md").read_text()


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("latents", ["uniform", "zipf"])
@pytest.mark.parametrize(
    ("op", "compared"),
    [
        ("sparse_decode", 1),
        ("encode_above", 1),
        ("decode_mse", 3),
        ("decode_prefixes", 3),
        ("gather_dot", 1),
        ("sort_indices", 2),
        ("sparse_row_grads", 1),
        ("sparse_pair_grads", 2),
    ],
)
def test_an_op_and_its_counterpart_do_the_same(
    load: Load, op: str, compared: int, latents: str
) -> None:
    op_cases = load("op_cases")
    if not hasattr(op_cases.ops, op):
        pytest.skip(f"saesteer.kernels.ops has no {op}")
    operands = op_cases.make_operands((24, 96, 4, 48), latents, torch.float32, torch.device("cpu"))
    cases = list(op_cases.MAKERS[op](operands))
    assert cases
    for case in cases:
        if "capacity" in case.op:  # as many entries as fit, with fillers: tested with the op
            continue
        pairs = zip(flat(case.ours()), flat(case.torch()), strict=False)
        for _, (ours, theirs) in zip(range(compared), pairs, strict=False):
            # Sums of a few float32 products, taken in another order.
            torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5)


def test_drawn_latents_are_distinct_and_zipf_is_uneven(load: Load) -> None:
    op_cases = load("op_cases")
    most = {}
    for zipf in (False, True):
        generator = torch.Generator().manual_seed(0)
        drawn = op_cases.draw_latents(200, 96, 4, zipf=zipf, generator=generator)
        assert drawn.shape == (200, 4) and drawn.min() >= 0 and drawn.max() < 96
        assert bool((drawn.diff(dim=1) > 0).all())
        most[zipf] = int(drawn.flatten().bincount(minlength=96).max())
    # 800 draws of 96: about 8 each when even; the most frequent of Zipf's takes part in most rows.
    assert most[False] < 40 and most[True] > 80


def test_unknown_ops_are_named(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("kernels").main(["--only", "sparse_decode,nonsense"])
    assert "got nonsense" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# steering_overhead.py


def test_every_kind_of_steering_beside_its_rivals(
    load: Load,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overhead = load("steering_overhead")
    page = tmp_path / "steering.md"
    page.write_text("<!-- begin steering_overhead-cpu -->\n<!-- end steering_overhead-cpu -->\n")
    overhead.main([
        "--model", str(tiny_model_dir("llama")), "--dtype", "float32", "--batch", "3", "--tokens",
        "4", "--rounds", "1", "--warmup", "0", "--device", "cpu", "--json", "--csv", str(tmp_path),
        "--page", str(page),
    ])  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    rows = {row["contender"]: row for row in document["rows"]}
    assert list(rows) == ["unsteered", *overhead.OURS, *overhead.RIVALS]
    for name in overhead.OURS:
        row = rows[name]
        assert row["status"] == "ok" and 0 < row["hook_share"] < 1, name
        ratio = row["median_ms"] / rows["unsteered"]["median_ms"]
        assert row["over_unsteered_ratio"] == pytest.approx(ratio)
        assert row["hook_us_per_pass"] == pytest.approx(
            1e3 * row["hook_share"] * row["median_ms"] / 4
        )
    for name in overhead.RIVALS:
        # Missing, or it ran; one that fails with the libraries that are here is named, no more.
        assert rows[name]["status"] in ("ok", "not installed") or "failed" in rows[name]["status"]
    table = (tmp_path / "steering_overhead-cpu.md").read_text()
    assert between(page.read_text(), "steering_overhead-cpu") == table
    assert table.count("\n|") == 2 + len(rows)


def test_hooks_are_clocked_and_left_as_they_were(load: Load) -> None:
    rivals = load("steering_rivals")
    layer, clock = torch.nn.Linear(2, 2), rivals.HookClock()
    register = torch.nn.Module.register_forward_hook
    with clock.watching():
        handle = layer.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.nn.Module.register_forward_hook is register
    x = torch.zeros(1, 2)
    assert torch.equal(layer(x), layer.bias[None] + 1)
    assert clock.calls == 1 and clock.seconds > 0
    handle.remove()
    layer(x)
    assert clock.calls == 1


# ---------------------------------------------------------------------------------------------
# suites.py and gpu.py


def test_the_largest_error_of_every_test(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = load("suites")
    tests = tmp_path / "test_errors.py"
    tests.write_text(
        "import pytest, torch\n"
        "@pytest.mark.parametrize('off', [0.0, 0.25, 0.125])\n"
        "def test_close(off):\n"
        "    x = torch.full((4,), 2.0)\n"
        "    torch.testing.assert_close(x + 2 * off, x, rtol=0.2, atol=0)\n"
        "def test_equal():\n"
        "    assert torch.equal(torch.ones(1), torch.ones(1))\n"
        "def test_odd():\n"
        "    x = torch.tensor([float('nan'), float('inf'), 1.0])\n"
        "    torch.testing.assert_close(x, x.clone(), equal_nan=True)\n"
    )
    log = tmp_path / "log"
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    assert suites.run([str(tests)], log, 120) == "failed"
    close, equal, odd = suites.rows_of(log)
    assert (close["test"], close["passed"], close["failed"]) == ("test_errors::test_close", 2, 1)
    assert close["error"] == pytest.approx(0.25) and close["note"]
    assert (equal["passed"], equal["error"], odd["passed"], odd["error"]) == (1, None, 1, 0.0)


def test_the_suites_are_found(load: Load) -> None:
    suites = load("suites")
    assert [path.name for path in suites.suites()][:1] == ["triton_suite.py"]
    names = [path.name for path in suites.marked()]
    assert "test_sae_trainer.py" in names and "test_triton.py" not in names


@pytest.fixture
def gpu(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gpu.py with four parts: one that works, one that fails, one that hangs, one that works."""
    gpu = load("gpu")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, time\n"
        "name = sys.argv[sys.argv.index('--name') + 1]\n"
        "if 'fails' in name: sys.exit('no such kernel')\n"
        "if 'hangs' in name: time.sleep(60)\n"
        "facts = {'device': 'A GPU', 'revision': sys.argv[1], 'peak_gb': 1.5}\n"
        "print(json.dumps({'facts': facts, 'rows': [{'n': 7}]}, indent=2))\n"
    )

    def part(name: str, priority: int, smoke: str = "abc") -> Any:
        return gpu.Part(
            name, f"About {name}", str(script), smoke, smoke, 1.0, priority,
            lambda rows: f"n is {rows[0]['n']}",
        )  # fmt: skip

    parts = (part("first", 2), part("fails", 4), part("hangs", 3), part("last", 1))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "nowhere")
    gpu.part = part
    return gpu


def test_no_failure_stops_the_next_part(
    gpu: ModuleType, tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--smoke", "--csv", str(tmp_path), "--page", str(page)]
    with pytest.raises(SystemExit) as ended:
        gpu.main([*flags, "--json"])
    assert ended.value.code == 1
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [row["status"].partition(":")[0] for row in rows.values()] == [
        "ok", "failed", "failed", "ok",
    ]  # fmt: skip
    assert rows["first"]["result"] == "n is 7" and rows["first"]["peak_gb"] == 1.5
    assert rows["fails"]["result"] == "failed: no such kernel"
    assert "stopped after" in rows["hangs"]["result"]
    with (tmp_path / "gpu-cpu.csv").open(newline="") as file:
        assert [row["part"] for row in csv.DictReader(file)] == list(rows)
    assert between(page.read_text(), "gpu").startswith("device A GPU")

    # A later run of one part leaves what the others had.
    gpu.PARTS = (gpu.part("first", 2, smoke="def"), *gpu.PARTS[1:])
    gpu.main([*flags, "--only", "first"])
    section = between(page.read_text(), "gpu")
    lines = {line.split(" | ")[0]: line for line in section.splitlines()}
    assert " | def | " in lines["| first"] and " | abc | " in lines["| last"]

    page.write_text("<!-- begin gpu -->\n<!-- end gpu -->\n")
    gpu.main(["--page-of", "cpu", "--csv", str(tmp_path), "--page", str(page)])
    assert between(page.read_text(), "gpu") == section


def test_what_has_no_time_is_left_out_and_named(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, fails, hangs, last = gpu.PARTS
    # The last is more important and keeps its second; less than two thirds of one is too short.
    assert gpu.room_for(first, [hangs, last], 1.7, 8.0) == pytest.approx(0.7)
    assert gpu.room_for(first, [hangs, last], 1.6, 8.0) == 0
    gpu.main(["--device", "cpu", "--smoke", "--minutes", "0.0001", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == [] and set(found["left_out"]) == {"first", "fails", "hangs", "last"}
    assert found["left_out"]["last"].startswith("no time: it takes about 1 s")
    gpu.PARTS = (first, gpu.part("large", 5, smoke=""))
    gpu.main(["--device", "cpu", "--smoke", "--csv", str(tmp_path)])
    table = (tmp_path / "gpu-cpu.md").read_text()
    assert "n is 7" in table and "left out: a smoke run takes one shape" in table


@pytest.mark.parametrize("minutes", [8.0, 4.0, 3.0])
def test_a_short_run_measures_what_matters_most(load: Load, minutes: float) -> None:
    """Were every part to take as long as it says."""
    gpu = load("gpu")
    remaining, chosen = 60 * minutes, []
    for number, part in enumerate(gpu.PARTS):
        if room := gpu.room_for(part, gpu.PARTS[number + 1 :], remaining, minutes):
            chosen.append(part)
            remaining -= min(room, part.seconds_for(minutes))
    left = [part.priority for part in gpu.PARTS if part not in chosen]
    assert {1, 2, 3, 4, 5}.isdisjoint(left)
    assert minutes < 8.0 or left in ([], [11])


def test_without_a_gpu_only_a_smoke_run_starts(gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--device cpu --smoke proves this script"):
        gpu.main(["--device", "cpu"])


def test_a_smoke_run_of_everything_that_a_cpu_can(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--smoke", "--json"]
    done = subprocess.run([*command, "--csv", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    parts = {row["part"]: row["result"] for row in found["rows"]}
    measured = {"rates", "suites", "step-576", "ops-S1", "harvest", "steering"}
    # Triton, without which there are no suites, is not everywhere.
    assert set(parts) | {"suites"} == measured and all(parts.values())
    assert "times as long: " in parts["step-576"] and "PyTorch, dense" in parts["step-576"]
    assert "failed" not in " ".join(parts.values()).replace("0 failed", "")
    assert found["left_out"]["graph"] == "a CPU has no CUDA graphs"
    assert {path.name for path in tmp_path.glob("*.md")} >= {f"{part}-cpu.md" for part in parts}


# ---------------------------------------------------------------------------------------------
# as programs


@pytest.mark.parametrize(
    "script",
    [
        "train_step.py",
        "kernels.py",
        "steering_overhead.py",
        "harvest.py",
        "compiled.py",
        "predictions.py",
        "memory.py",
        "latents.py",
        "rates.py",
        "suites.py",
        "gpu.py",
    ],
)
def test_the_scripts_start(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--csv DIR" in done.stdout


def test_make_gpu_hands_its_arguments_on() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\ngpu: env-dev\n")[1].split("\n\n")[0]
    assert recipe.endswith("benchmarks/gpu.py $(ARGS)")


def test_make_bench_writes_every_table_of_the_page() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("\nbench: env-dev\n")[1].split("\n\n")[0]
    text = (ROOT / "docs" / "performance.md").read_text()
    for name, command in {
        "train_step-cpu": "train_step.py --device cpu $(RESULTS)",
        "train_step_auxk-cpu": "train_step.py --device cpu --auxk $(RESULTS)",
        "train_step_arch-cpu": "train_step.py --device cpu $(ARCHS) $(RESULTS)",
        "kernels-cpu": "kernels.py --device cpu $(RESULTS)",
    }.items():
        assert command in recipe
        assert between(text, name) is not None
    assert between(text, "gpu")
    assert text.count("<!-- begin ") == 5
