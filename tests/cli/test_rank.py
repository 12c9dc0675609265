"""`saesteer rank` on a tiny model."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from saesteer.steering import load_plan

from .conftest import Cli

SMALL = ("--by", "rate", "--read", "span", "--dtype", "float32", "-q")


def test_table(cli: Cli, model: Path, sae: Path, task: Path) -> None:
    outcome = cli("rank", "--model", model, "--sae", sae, "--task", task, *SMALL, "--top", 3)
    assert outcome.status == 0, outcome.err
    what, header, *rows, chance, filters, alike, shared, one, two, used = outcome.out.splitlines()
    assert what.startswith("late at layer 1 (resid_post), by rate, read span, ")
    assert header.split() == ["rank", "latent", "score", "on+", "on-", "mu", "sigma", "lens"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    scores = [float(row.split()[2]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert "'" in rows[0]  # lens tokens, their blanks visible
    assert " latents differ at a false discovery rate of 0.05 (mcnemar)" in chance
    assert filters.startswith("latents that each filter finds: dense ")
    assert filters.endswith("; dropped: none")
    assert alike.startswith("agreement by rate (Jaccard@15 / Spearman): variants ")
    assert shared.startswith("top 15 shared with those by other scores (Jaccard): saif ")
    assert one.startswith("with shuffled labels (20 times): best rate ")
    assert two.startswith("  latents that differ (mcnemar) ")
    assert used == "ranked with 4 of 6 contents (of the train split); 0 attention sinks left out"
    assert outcome.err.startswith("warning: ranked with 4 of 6 contents, which is few")


def test_plan_files_and_json(cli: Cli, model: Path, sae: Path, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    words = ("rank", "--model", model, "--sae", sae, "--task", task, *SMALL, "-o", out)
    dose = ("--top", 2, "--scale", 1.5, "--beta", -0.5, "--scope", "first:3")
    found = cli(*words, *dose, "--json").json()
    assert sorted(path.name for path in out.iterdir()) == [
        "plan.safetensors", "plan.yaml", "ranking.html", "ranking.json", "run.json",
        "scores.safetensors",
    ]  # fmt: skip
    page = (out / "ranking.html").read_text()
    assert "Ranking: late" in page
    assert all(f"latent {row['id']}" in page for row in found["latents"])
    assert found == json.loads((out / "ranking.json").read_text())
    assert found["plan"] == str(out / "plan.yaml")
    scores = load_file(out / "scores.safetensors")
    for row in found["latents"]:
        for name, value in row["scores"].items():
            assert float(scores[name][row["id"]]) == pytest.approx(value)
    assert set(found["latents"][0]["scores"]) >= {"saif", "auroc", "welch", "mi", "corr"}
    plan = load_plan(out)
    assert (plan.scale, plan.beta, plan.scope, plan.layer) == (1.5, -0.5, "first:3", 1)
    assert [row["id"] for row in found["latents"]] == list(plan.ids)
    assert yaml.safe_load((out / "plan.yaml").read_text())["task"]["name"] == "late"
    assert f"--out {out} exists and is not empty" in cli(*words).error(2)
    assert cli(*words, "--force", "--top", 1).status == 0
    assert len(load_plan(out).latents) == 1


def test_reads_replies(cli: Cli, model: Path, sae: Path, task: Path) -> None:
    found = cli("rank", "--sae", sae, "--task", task, "--read", "reply", "--max-new-tokens", 4,
                "--all-replies", "--dtype", "float32", "-q", "--json").json()  # fmt: skip
    assert (found["by"], found["read"]) == ("rate", "reply")
    passed, answered = found["replies_used"]
    assert passed == answered == 8  # four train contents, two wordings


def test_an_instruction_in_own_words(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    contents = tmp_path / "contents.txt"
    contents.write_text("\n".join(f"The {i} trains were late." for i in range(2, 9)))
    found = cli("rank", "--sae", sae, "--instruction", "Answer in French.", "--contents", contents,
                *SMALL, "--rank-contents", 2, "--json").json()  # fmt: skip
    assert found["task"]["name"] == "custom"
    assert found["positives"] == 2
    assert found["contents_used"] == [2, 7]
    assert found["excluded"] == {"sinks": 0}


def test_a_list_without_splits_is_said_to_be_half_used(cli: Cli, sae: Path, tmp_path: Path) -> None:
    contents = tmp_path / "contents.txt"
    words = ("rank", "--sae", sae, "--instruction", "Answer in French.", "--contents", contents)
    for lines, used, few in ((19, 10, False), (18, 9, True)):
        contents.write_text("\n".join(f"The {i} trains were late." for i in range(lines)))
        outcome = cli(*words, *SMALL)
        assert f"\nranked with {used} of {lines} contents (of the train split); " in outcome.out
        warning = f"warning: ranked with {used} of {lines} contents, which is few"
        assert (warning in outcome.err) == few
        assert len(outcome.err.splitlines()) == few


def test_a_task_of_ones_own_is_steered_after_its_instruction(
    cli: Cli, sae: Path, task: Path, tmp_path: Path
) -> None:
    contents = tmp_path / "contents.txt"
    contents.write_text("\n".join(f"The {i} trains were late." for i in range(8)))
    own = ("--instruction", "Say it in French.", "--contents", contents)
    for name, what, wording in (
        ("own", own, "Say it in French."), ("file", ("--task", task), "Reply in French.")
    ):  # fmt: skip
        out = tmp_path / name
        assert cli("rank", "--sae", sae, *what, *SMALL, "-o", out).status == 0
        assert wording in yaml.safe_load((out / "plan.yaml").read_text())["task"]["instructions"]
        steered = cli("steer", "--plan", out, "-p", f"A bus.\n{wording}", "--scope",
                      "after-instruction", "--max-new-tokens", 3, "-q", "--json")  # fmt: skip
        assert steered.json()["tokens_touched"] > 3  # the end of the turn too


def test_explain(cli: Cli, sae: Path, task: Path) -> None:
    words = ("rank", "--sae", sae, "--task", task, *SMALL, "--top", 1)
    _, one, other, _ = cli(*words, "--explain", "3,0").out.split("\n\n")
    for report, latent in ((one, 3), (other, 0)):
        title, *lines = report.splitlines()
        assert title.startswith(f"latent {latent} (")
        keys = [line.split()[0] for line in lines]
        assert keys[:4] == ["lens", "with", "when", "elsewhere"]
        assert "chance" in keys
        scores = next(line for line in lines if line.split()[0] == "scores")
        assert all(f" {name} " in scores for name in ("saif", "paired-t", "auroc", "mi"))
    found = cli(*words, "--explain", "--json").json()
    assert found["shuffled"]["shuffles"] == 20 and found["overlap"]["rate"] == 1.0
    assert found["explain"][0]["shuffled"]["p"] <= 1
    best = found["latents"][0]["id"]
    report = cli(*words, "--explain", best).out.split("\n\n")[1]
    assert "\n  shuffled   rate " in report and report.count(" for all latents at once") == 1
    without = cli(*words, "--shuffles", 0, "--explain", "--json").json()
    assert without["shuffled"] is None and "shuffled" not in without["explain"][0]
    assert "--shuffles must be at least 0" in cli(*words, "--shuffles", -1).error(2)
    assert [row["id"] for row in found["explain"]] == [found["latents"][0]["id"]]
    assert "--explain 64 is out of range" in cli(*words, "--explain", 64).error(2)


def test_filters_take_latents_out(cli: Cli, sae: Path, task: Path) -> None:
    words = ("rank", "--sae", sae, "--task", task, *SMALL, "--top", 64, "--json")
    kept = cli(*words).json()
    flagged = {row["id"] for row in kept["latents"] if "dense" in row["filters"]}
    assert flagged and len(flagged) == kept["filters"]["dense"] < len(kept["latents"])
    found = cli(*words, "--drop", "dense").json()
    wanted = [row["id"] for row in kept["latents"] if row["id"] not in flagged]
    assert [row["id"] for row in found["latents"]] == wanted
    assert found["dropped"] == ["dense"]
    (latent,) = cli(*words, "--explain", next(iter(flagged))).json()["explain"]
    assert "of plain text's tokens" in latent["filters"]["dense"]


def test_fused_and_the_road_to_causal(cli: Cli, sae: Path, task: Path) -> None:
    small = ("--all-replies", "--candidates", 6, "--max-new-tokens", 4, "--effect-contents", 3)
    words = ("rank", "--sae", sae, "--task", task, *SMALL, *small)
    found = cli(*words, "--by", "fused", "--explain", "--json").json()
    assert {"lens", "effect", "atp", "output", "fused"} <= set(found["explain"][0]["scores"])
    assert [row["score"] for row in found["latents"]] == sorted(
        (row["score"] for row in found["latents"]), reverse=True
    )
    # Whatever a tiny random model says has a word in it, steered or not, and passes the check.
    says = cli(*words, "--by", "causal", "--shortlist", 2, "--causal-contents", 2,
               "--doses", "0.5").error(1)  # fmt: skip
    assert "no latent of 2 on the shortlist makes more answers pass than the unsteered 2 " in says


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([], 2, "--task NAME, or --instruction TEXT with --contents FILE: give one, got neither"),
        (["--task", "french", "--instruction", "x"], 2, "got both"),
        (["--instruction", "x"], 2, "--instruction and --contents belong together"),
        (["--task", "french", "--contents", "x"], 2, "belong together"),
        (["--task", "klingon"], 2, "unknown task 'klingon': --task takes a built-in name (bullets"),
        (["--task", "none.yaml"], 1, "no such file: none.yaml"),
        (["--instruction", "x", "--contents", "none.txt"], 1, "--contents: no such file"),
        (["--task", "french", "--by", "luck"], 2, "--by must be one of saif, rate, logodds"),
        (["--task", "french", "--read", "first"], 2, "--read must be one of last, template"),
        (["--task", "french", "--drop", "odd"], 2, "--drop must be one of dense, template"),
        (["--task", "french", "--doses", "0.3,x"], 2, "--doses must be a number, got 'x'"),
        (["--task", "french", "--position", "mid"], 2, "--position must be one of post, pre"),
        (["--task", "french", "--by", "saif", "--read", "reply"], 2, "--by saif compares"),
        (["--task", "french", "--rank-contents", "0"], 2, "--rank-contents must be at least 1"),
        (["--task", "french", "--top", "0"], 2, "--top must be at least 1, got 0"),
        (["--task", "french", "--method", "push"], 2, "--method must be one of add, add-keep-norm"),
        (["--task", "french", "--unit", "volt"], 2, "--unit must be one of raw, sigma"),
        (["--task", "french", "--scope", "some"], 2, "--scope must be one of generation"),
    ],
)
def test_refused_before_the_model_is_loaded(
    cli: Cli, sae: Path, tmp_path: Path, words: list[str], status: int, says: str
) -> None:
    line = cli("rank", "--model", "no-such/model", "--sae", sae, "-q", "-o", tmp_path / "plan",
               *words).error(status)  # fmt: skip
    assert says in line
    assert not (tmp_path / "plan").exists()


def test_sae_is_needed_and_has_to_fit(cli: Cli, model: Path, task: Path, sae: Path) -> None:
    assert "--sae is missing" in cli("rank", "--task", task, "-q").error(2)
    line = cli("rank", "--sae", sae, "--model", model, "--task", task, *SMALL,
               "--layer", 3).error(2)  # fmt: skip
    assert "--layer 3 conflicts with --sae" in line
