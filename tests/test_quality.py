"""quality.py and defaults.py run, go on where they were stopped, and compare in pairs."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from saesteer.sae.measuring.figures import OF_ROWS
from saesteer.sae.synthetic.config import SyntheticConfig
from saesteer.sae.verbs.synthesise import synthesise

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a script as running it would: with its folder on the path, until it leaves it."""
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        path = BENCHMARKS / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    with torch.random.fork_rng(devices=[]):
        yield load
    for name in set(sys.modules) - before:
        if name.startswith("benchmarks_") or (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, ModuleType], list[str]]:
    """Runs of our own trainer in this process, which is seconds quicker; returns those made."""

    def train_here(quality: ModuleType, ours: ModuleType) -> list[str]:
        made: list[str] = []

        def train_all(program: str, jobs: list[str], args: object) -> str:
            made.extend(Path(job).parent.name for job in jobs)
            ours.main(jobs)
            return ""

        monkeypatch.setattr(quality, "train_all", train_all)
        return made

    return train_here


def test_smoke(
    load: Load,
    train_here: Callable[[ModuleType, ModuleType], list[str]],
    tmp_path: Path,
) -> None:
    quality, ours = load("quality"), load("quality_ours")
    made = train_here(quality, ours)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin quality -->\n<!-- end quality -->\nafter\n")
    work = tmp_path / "work"
    words = [
        "--smoke",
        "--work",
        str(work),
        "--csv",
        str(tmp_path / "out.csv"),
        "--page",
        str(page),
    ]
    rows = quality.main(words)
    # Two architectures, a sweep of two rates with one seed, and the better with another.
    assert len(rows) == 6 == len(made)
    for row in rows:
        assert 0 < row["fvu"] < 0.9 and row["l0"] == pytest.approx(3, abs=0.3)
        assert 0 < row["f1"] < 1 and 0 < row["mcc"] < 1
        curve = [tuple(map(float, part.split(":"))) for part in row["curve"].split(";")]
        assert [seconds for seconds, _ in curve] == sorted(seconds for seconds, _ in curve)
        assert curve[-1][1] < curve[0][1], "training helps"
    topk = [row for row in rows if row["arch"] == "topk"]
    assert all(row["fvu"] == row["fvu_stored"] for row in topk), "no threshold to choose"
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "### synthetic, topk" in text and "| saesteer " in text
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 7
    # A second call finds everything done; a run that was cut off is made again.
    quality.main(words)
    assert len(made) == 6
    gone = work / made[0]
    (gone / "row.json").unlink()
    (gone / "done.json").unlink()
    quality.main(words)
    assert made[6:] == [gone.name]


def test_paired_intervals(load: Load, tmp_path: Path) -> None:
    page = load("quality_page")
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, object]]] = {"ours": [], "theirs": []}
    hard = rng.random(60) + 0.5  # contexts differ much more than the tools do
    for tool, factor in (("ours", 0.98), ("theirs", 1.0)):
        for seed in range(3):
            row = {"data": "d", "arch": "a", "tool": tool, "rate": "1", "seed": seed}
            sums = np.zeros((60, len(OF_ROWS)))
            sums[:, OF_ROWS.index("error")] = factor * hard * (1 + 0.002 * rng.random(60))
            sums[:, OF_ROWS.index("variance")] = 5.0
            folder = tmp_path / f"d_a_{tool}_1_{seed}"
            folder.mkdir()
            np.save(folder / "sums.npy", sums)
            rows[tool].append(row)
    value, low, high = page.paired_interval(rows["ours"], rows["theirs"], tmp_path)
    assert value == pytest.approx(-0.02, abs=1e-3)
    assert -0.022 < low < value < high < -0.018, "pairs take out what contexts have in common"


def test_seconds_until_a_figure_is_reached(load: Load) -> None:
    page = load("quality_page")
    row = {"curve": "1:0.5;2:0.3;4:0.2"}
    assert page.seconds_to(row, 0.3) == pytest.approx(2.0)
    assert page.seconds_to(row, 0.25) == pytest.approx(3.0)
    assert page.seconds_to(row, 0.75) == pytest.approx(0.5)
    assert page.seconds_to(row, 0.1) is None


def test_everyone_gets_the_same_batches(load: Load) -> None:
    rivals, rows = load("quality_rivals"), load("rows")
    values = torch.arange(50.0)[:, None]
    theirs = torch.cat(list(rivals.batches(values, 7, 16, seed=4)))
    own = rows.Rows(values, torch.arange(50))
    assert torch.equal(theirs, torch.cat(list(own.batches(7, 16, seed=4))))
    assert sorted(theirs[:50, 0].tolist()) == list(range(50)), "an epoch holds every row once"
    assert not torch.equal(theirs[:50], theirs[50:100])
    assert sum(rivals.group_sizes(1000)) == 1000


def test_the_rate_rises_and_falls(load: Load) -> None:
    schedule = load("quality_rivals").schedule
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[79] == 1.0
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


def test_a_tool_with_another_environment(load: Load, tmp_path: Path) -> None:
    quality = load("quality")
    python, environment = quality.environment_of("sparsify", {"sparsify": tmp_path})
    assert python == sys.executable and environment["PYTHONPATH"].startswith(str(tmp_path))
    (tmp_path / "python").touch()
    assert quality.environment_of("x", {"x": tmp_path / "python"})[0] == str(tmp_path / "python")


def test_a_tool_that_fails_is_told_and_left_out(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = load("quality")
    monkeypatch.setattr(quality, "train_all", lambda *args: "No module named 'sparsify'")
    rows = quality.main(["--smoke", "--work", str(tmp_path)])
    assert rows == []
    assert "synthetic_topk_saesteer_default_0 failed: No module" in capsys.readouterr().err


def test_defaults(load: Load, tmp_path: Path) -> None:
    config = SyntheticConfig(d_model=8, features=20, roots=0)
    synthesise(tmp_path / "rows", config, tokens=1000)
    words = ["--activations", str(tmp_path / "rows"), "--held-out", str(tmp_path / "rows"),
             "--csv", str(tmp_path / "table.csv"), "--d-sae", "16", "--k", "2", "--steps", "8",
             "--batch", "64", "--held-out-rows", "200", "--name", "small"]  # fmt: skip
    defaults = load("defaults")
    defaults.main([*words, "--lr", "0,1e-3"])
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == 3 and table[1].startswith("small,topk,16,2,8,64,0.0,1.0,")
    defaults.main([*words, "--lr", "0,1e-3,1e-2"])
    again = (tmp_path / "table.csv").read_text().splitlines()
    assert again[:3] == table and len(again) == 4, "what is known is not run again"
    fvu = [float(line.split(",")[12]) for line in again[1:]]
    assert fvu[2] < fvu[1], "a rate of 1e-3 is too slow for eight steps"


def test_jobs_are_files_that_say_everything(load: Load, tmp_path: Path) -> None:
    quality = load("quality")
    seen: list[dict[str, object]] = []

    def train_all(program: str, jobs: list[str], args: object) -> str:
        seen.extend(json.loads(Path(job).read_text()) for job in jobs)
        return "stopped"

    quality.train_all = train_all
    quality.main(["--smoke", "--work", str(tmp_path)])
    assert {job["lr"] for job in seen} == {None, 0.01}
    assert all(Path(str(job["rows"])).is_absolute() for job in seen)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
def test_what_saelens_trained_is_measured_as_it_is(load: Load, arch: str) -> None:
    """The form in which all tools' SAEs are measured gives SAELens' own reconstruction."""
    pytest.importorskip("sae_lens")
    quality, rivals = load("quality"), load("quality_rivals")
    d_sae = 64
    # With all latents kept, choosing over the batch is the same as a threshold of 0.
    job = {"arch": arch, "d_sae": d_sae, "k": 5 if arch == "topk" else d_sae, "steps": 6,
           "batch": 32, "lr": 1e-2, "seed": 0}  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(32, 12, generator=rng) + 1
    torch.manual_seed(0)
    step, export, _ = rivals.sae_lens(job, x)
    for _ in range(6):
        step(x)
    kept = {name: tensor.detach().clone() for name, tensor in export().items()}
    kept["threshold"] = torch.tensor(0.0)
    factor = 0.25  # their rows are a quarter as long as those that are measured
    ours = quality.as_sae(kept, factor, job)
    trained = step.__self__.sae
    with torch.no_grad():
        expected = trained.decode(trained.encode(x)) / factor
        found = ours.decode(ours.encode(x / factor))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - x / factor).square().mean()) > 1e-3
