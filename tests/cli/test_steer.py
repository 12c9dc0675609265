"""`saesteer steer` on a tiny model."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import Cli, run_once

SMALL = ("--max-new-tokens", 5, "--dtype", "float32", "-q")


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_blocks_for_people(cli: Cli, model: Path, plan: Path) -> None:
    outcome = cli("steer", "--model", model, "--plan", plan, "-p", "The bus.\nIt is late.",
                  "-p", "- a list", "--baseline", *SMALL)  # fmt: skip
    assert outcome.status == 0, outcome.err
    first, second = outcome.out.strip().split("\n\n")
    assert first.startswith("prompt     The bus.\n           It is late.\nunsteered  ")
    assert "\nsteered    " in first
    assert "tokens touched, relative dose " in first
    assert second.startswith("prompt     - a list\n")


def test_json_lines_in_input_order(cli: Cli, model: Path, plan: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    texts = ["A long prompt that goes on for a while, longer than the next.", "Short.", "Then."]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    out = tmp_path / "results"
    words = ("steer", "--model", model, "--plan", plan / "plan.yaml", "--prompts", prompts)
    how = ("--scale", 2, "--batch-size", 2, "--baseline", "--json", "-o", out)
    outcome = cli(*words, *how, *SMALL)
    assert outcome.status == 0, outcome.err
    rows = rows_of(outcome.out)
    assert [row["prompt"] for row in rows] == texts
    for row in rows:
        assert set(row) == {
            "prompt", "completion", "baseline", "tokens_touched", "relative_dose"
        }  # fmt: skip
        assert row["tokens_touched"] >= 1
        assert row["relative_dose"] > 0
        assert "<|im" not in str(row["completion"])
    assert rows_of((out / "results.jsonl").read_text()) == rows
    assert json.loads((out / "run.json").read_text())["arguments"]["scale"] == 2


def test_without_baseline_there_is_none(cli: Cli, plan: Path) -> None:
    """The plan names its model."""
    (row,) = rows_of(cli("steer", "--plan", plan, "-p", "Hello", "--json", *SMALL).out)
    assert "baseline" not in row


def test_latents_by_number(cli: Cli, model: Path, sae: Path) -> None:
    words = ("steer", "--model", model, "--sae", sae, "-p", "Hello", "--json", *SMALL)
    (once,) = rows_of(cli(*words, "--latents", "3:2.5,9:-1").out)
    (twice,) = rows_of(cli(*words, "--latents", "3:5,9:-2", "--layer", 1).out)
    (scaled,) = rows_of(cli(*words, "--latents", "3:2.5,9:-1", "--alpha", 2).out)
    assert twice == scaled
    assert scaled["relative_dose"] > once["relative_dose"]
    (gone,) = rows_of(cli(*words, "--latents", "3,9", "--method", "ablate", "--scope", "all").out)
    assert gone["tokens_touched"] > 0


def test_a_plan_reads_its_sae_from_any_folder(
    cli: Cli, sae: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan was made with a relative --sae; what it names is found until it is moved."""
    (tmp_path / "here").mkdir()
    shutil.copytree(sae, tmp_path / "here" / "sae")
    monkeypatch.chdir(tmp_path / "here")
    ranked = cli("rank", "--sae", "sae", "--task", task, "--dtype", "float32", "-q", "-o", "plan",
                 "--by", "rate", "--read", "span", "--top", 3)  # fmt: skip
    assert ranked.status == 0, ranked.err
    monkeypatch.chdir(tmp_path)
    words = ("steer", "--plan", "here/plan", "-p", "Hello", "--method", "min", "--json", *SMALL)
    (found,) = rows_of(cli(*words).out)
    assert found["tokens_touched"] > 0
    (tmp_path / "here" / "sae").rename(tmp_path / "moved")
    assert "could not be opened" in (line := cli(*words).error(1)) and line.endswith("give --sae")
    assert rows_of(cli(*words, "--sae", "moved").out) == [found]


def test_another_sae_beside_a_plan_is_refused(
    cli: Cli, acts: Path, plan: Path, tmp_path: Path
) -> None:
    run_once("train", "--activations", acts, "--layer", 1, "--d-sae", 64, "--k", 4, "--seed", 7,
             "--tokens", 640, "--batch-tokens", 128, "-o", tmp_path / "other")  # fmt: skip
    words = ("steer", "--plan", plan, "--sae", tmp_path / "other", "-p", "Hello", *SMALL)
    for method in ("add", "set", "project"):
        how = ("--method", method)
        assert "is not the one the plan was made from" in cli(*words, *how).error(1)
        assert cli(*words, *how, "--force").status == 0


def test_an_edit_that_changes_nothing_is_a_warning(cli: Cli, model: Path, sae: Path) -> None:
    """At most 1e9 is what every latent is anyway."""
    words = ("steer", "--model", model, "--sae", sae, "-p", "Hello", *SMALL)
    idle = cli(*words, "--latents", "3:1e9,9:1e9", "--method", "max")
    assert idle.status == 0 and "relative dose 0" in idle.out
    (line,) = idle.err.splitlines()
    assert line.startswith("warning: --method max changed none of the ")
    assert cli(*words, "--latents", "3:1", "--method", "set").err == ""


def test_prompts_from_stdin(cli: Cli, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One.\nTwo.\n"))
    rows = rows_of(cli("steer", "--plan", plan, "--prompts", "-", "--json", *SMALL).out)
    assert [row["prompt"] for row in rows] == ["One.", "Two."]


def test_baseline_alone_is_the_unsteered_model(cli: Cli, model: Path, plan: Path) -> None:
    words = ("steer", "--model", model, "-p", "Hello", "--baseline", "--json", *SMALL)
    (alone,) = rows_of(cli(*words).out)
    (with_plan,) = rows_of(cli(*words, "--plan", plan).out)
    assert alone["completion"] == alone["baseline"] == with_plan["baseline"]
    assert alone["tokens_touched"] == 0
    assert "steered" not in cli(*words[:-4], *SMALL).out.replace("unsteered", "")


def test_chat_and_sampling(cli: Cli, plan: Path) -> None:
    words = ("steer", "--plan", plan, "-p", "Hello", "--json", *SMALL)
    (chat,), (plain,) = rows_of(cli(*words).out), rows_of(cli(*words, "--no-chat").out)
    assert chat["completion"] != plain["completion"]
    hot = (*words, "--temperature", 1.5, "--top-p", 0.9)
    (one,), (same,) = rows_of(cli(*hot, "--seed", 1).out), rows_of(cli(*hot, "--seed", 1).out)
    assert one == same


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-p", "x"], "nothing to steer with: give --plan FILE, or --sae DIR --latents ID:VALUE"),
        (["-p", "x", "--baseline", "--scale", "2"], "--scale needs --plan, or --sae"),
        (["-p", "x", "--plan", "a", "--sae", "b", "--latents", "3:1"], "exclude each other"),
        (["-p", "x", "--sae", "b"], "--sae and --latents belong together"),
        (["-p", "x", "--latents", "3:1"], "--sae and --latents belong together"),
        (["-p", "x", "--plan", "a", "--scale", "0"], "--scale 0 would steer nothing"),
        (["-p", "x", "--sae", "b", "--latents", "3:1", "--beta", "1"], "--beta needs a plan's mu"),
        (["-p", "x", "--plan", "a", "--site", "mlp_out"], "--site is for --latents"),
        (["--plan", "a"], "no prompt: give -p TEXT, or --prompts FILE"),
    ],
)
def test_wrong_usage(cli: Cli, words: list[str], says: str) -> None:
    assert says in cli("steer", "-q", *words).error(2)


def test_settings_that_mean_nothing(cli: Cli, model: Path, plan: Path, sae: Path) -> None:
    words = ("steer", "--model", model, "-p", "x", *SMALL)
    planned = (*words, "--plan", plan)
    assert "--scope must be one of" in cli(*planned, "--scope", "here").error(2)
    assert "--method must be one of" in cli(*planned, "--method", "push").error(2)
    assert "--unit must be one of" in cli(*planned, "--unit", "volt").error(2)
    assert "--layer 2 conflicts with --plan" in cli(*planned, "--layer", 2).error(2)
    assert "--temperature must be 0" in cli(*planned, "--temperature", -1).error(2)
    assert "--max-new-tokens must be at least 1" in cli(*planned, "--max-new-tokens", 0).error(2)
    by_hand = (*words, "--sae", sae)
    assert "--latents must be ID:VALUE" in cli(*by_hand, "--latents", "x:1").error(2)
    assert "--latents 3 has no value" in cli(*by_hand, "--latents", "3").error(2)
    assert "latent 64 is out of range" in cli(*by_hand, "--latents", "64:1").error(2)
    line = cli(*by_hand, "--latents", "3:0").error(2)
    assert "every dose is 0" in line and "change the values in --latents, or --scale" in line
    line = cli(*by_hand, "--latents", "3:1", "--layer", 2).error(2)
    assert "--layer 2 conflicts with --sae" in line


def test_a_plan_that_cannot_be_read(cli: Cli, plan: Path, tmp_path: Path) -> None:
    line = cli("steer", "--plan", tmp_path / "none", "-p", "x", "-q").error(1)
    assert f"--plan {tmp_path / 'none'}" in line
    for name in ("plan.yaml", "plan.safetensors"):
        content = (plan / name).read_bytes()
        (tmp_path / name).write_bytes(content if name == "plan.yaml" else content[:-16])
    line = cli("steer", "--plan", tmp_path, "-p", "x", "-q").error(1)
    assert f"--plan {tmp_path}" in line
    assert "damaged or cut short" in line


def test_a_plan_for_another_model(
    cli: Cli, plan: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    words = ("steer", "--plan", plan, "--model", tiny_model_dir("llama", seed=1), "-p", "x", *SMALL)
    line = cli(*words).error(1)
    assert "--plan was made for" in line
    assert "--force" in line
    assert cli(*words, "--force").status == 0


def test_an_sae_of_another_model(cli: Cli, sae: Path, tiny_model_dir: Callable[..., Path]) -> None:
    words = ("steer", "--sae", sae, "--latents", "3:1", "--model",
             tiny_model_dir("llama", seed=1), "-p", "x", *SMALL)  # fmt: skip
    line = cli(*words).error(1)
    assert "was trained on" in line
    assert cli(*words, "--force").status == 0


def test_touching_no_token_is_an_error(cli: Cli, plan: Path) -> None:
    """A prompt of one token has no position that the scope `prompt` covers but position 0."""
    line = cli("steer", "--plan", plan, "-p", "a", "--no-chat", "--scope", "prompt", *SMALL).error(
        1
    )
    assert "touched no token" in line
    assert "--scope" in line


def test_schedules_gates_and_further_plans(cli: Cli, model: Path, sae: Path, plan: Path) -> None:
    words = ("steer", "--model", model, "-p", "Hello", "--json", *SMALL)
    by_number = (*words, "--sae", sae, "--latents", "3:2.5,9:-1")
    (whole,) = rows_of(cli(*by_number).out)
    (short,) = rows_of(cli(*by_number, "--schedule", "first:2").out)
    assert (short["tokens_touched"], whole["tokens_touched"]) == (2, 5)
    closed = cli(*by_number, "--gate", "3 > 1e9")
    assert closed.status == 0, closed.err
    assert rows_of(closed.out)[0]["tokens_touched"] == 0
    wrong = cli(*by_number, "--gate", "3 is high")
    assert wrong.status == 2 and "--gate must be conditions" in wrong.err
    (once,) = rows_of(cli(*words, "--plan", plan).out)
    (twice,) = rows_of(cli(*words, "--plan", plan, "--also", plan).out)
    assert once["tokens_touched"] == twice["tokens_touched"]


def test_everything_that_is_printed_is_printed_on_a_terminal(
    on_terminal: Callable[..., tuple[int, str]], plan: Path, sae: Path
) -> None:
    words = ("steer", "--plan", plan, "--sae", sae, "-p", "Hello", "--baseline", "--explain")
    status, seen = on_terminal(*words, "--beside", "prompt", *SMALL[:-1])
    assert status == 0, seen
    for colour in (2, 1, 32, 33):
        assert f"\x1b[{colour}m" in seen
    status, seen = on_terminal(*words, "--beside", "nowhere", *SMALL[:-1])
    assert status == 1 and "\x1b[31merror:" in seen


def test_flags_are_those_of_further_plans_too(cli: Cli, plan: Path, tmp_path: Path) -> None:
    from saesteer.steering import Condition, load_plan, save_plan

    later = tmp_path / "later"
    save_plan(load_plan(plan).with_changes(layer=2), later)
    words = ("steer", "--plan", plan, "-p", "The bus.", "--json", *SMALL)
    (row,) = rows_of(cli(*words, "--also", later, "--scope", "last-prompt").out)
    assert row["tokens_touched"] == 1
    texts = set()
    for scale in (0.01, 3.0):
        both = (*words, "--also", later, "--scale", scale)
        (row,) = rows_of(cli(*both).out)
        save_plan(load_plan(plan).with_changes(scale=scale), tmp_path / "a")
        save_plan(load_plan(later).with_changes(scale=scale), tmp_path / "b")
        (by_hand,) = rows_of(
            cli("steer", "--plan", tmp_path / "a", "--also", tmp_path / "b", *words[3:]).out
        )
        assert row["completion"] == by_hand["completion"]
        assert row["relative_dose"] == by_hand["relative_dose"]
        texts.add(str(row["relative_dose"]))
    assert len(texts) == 2
    gated = load_plan(later)
    never = Condition(layer=1, weight=torch.zeros(gated.model.d_model), bias=-1.0)
    save_plan(gated.with_changes(when=never), tmp_path / "gated")
    assert "would decide for both" in cli(*words, "--also", tmp_path / "gated").error(2)
    alone = cli("steer", "--plan", tmp_path / "gated", *words[3:])
    assert (rows_of(alone.out)[0]["tokens_touched"], alone.status) == (0, 0)
    line = cli(*words, "--also", later, "--gate", "9999 > 1").error(1)
    assert "--gate names latent 9999, and --sae" in line
    assert "--layer is for one plan" in cli(*words, "--also", later, "--layer", 2).error(2)


def test_a_gigantic_dose_is_said(cli: Cli, model: Path, sae: Path) -> None:
    words = ("steer", "--model", model, "--sae", sae, "--latents", "3:1", "-p", "Hello", *SMALL)
    assert "warning: relative dose" in cli(*words, "--scale", "1e4").err
    assert "warning" not in cli(*words, "--scale", "0.1").err


def test_other_ways_beside_a_plan(cli: Cli, model: Path, plan: Path, tmp_path: Path) -> None:
    """A second plan, prompting and the unsteered model in one command."""
    other = shutil.copytree(plan, tmp_path / "other")
    words = ("steer", "--model", model, "--plan", plan, "-p", "Hello", "-p", "A bus.", *SMALL)
    ways = ("--beside", other, "--beside", "prompt", "--beside", "prompt:Say it twice.")
    rows = rows_of(cli(*words, *ways, "--baseline", "--json").out)
    for row in rows:
        others = row["beside"]
        assert isinstance(others, dict)
        assert list(others) == [str(other), "prompt", "prompt:Say it twice."]
        # The same plan says the same.
        assert others[str(other)]["completion"] == row["completion"]
        assert others[str(other)]["tokens_touched"] == row["tokens_touched"]
        assert others["prompt"]["tokens_touched"] == 0
    blocks = cli(*words, *ways).out
    assert "\nother      " in blocks and blocks.count("\nprompt     ") == 5
    assert "given twice" in cli(*words, *ways, "--beside", other).error(2)
    # The fixture's task is a file, so nothing says where its contents are.
    assert "late is not built in" in cli(*words, "--beside", "meandiff").error(2)


def test_a_dose_in_nats_is_found_and_kept(cli: Cli, plan: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("Where did the heron stand?\nWho?\n")
    words = ("steer", "--plan", plan, "-p", "Hello", *SMALL)
    out = tmp_path / "out"
    outcome = cli(*words, "--dose", "ce=0.2", "--dose-on", prompts, "--json", "-o", out)
    assert outcome.status == 0, outcome.err
    (row,) = rows_of(outcome.out)
    (again,) = rows_of(cli("steer", "--plan", out / "plan", "-p", "Hello", "--json", *SMALL).out)
    assert again == row
    from saesteer.steering import load_plan

    facts = load_plan(out / "plan").metrics["dose"]
    assert facts["measured"] == pytest.approx(0.2, rel=0.05)
    assert (facts["unit"], facts["asked"], facts["texts"]) == ("ce", 0.2, 2)
    assert "leave --scale out" in cli(*words, "--dose", "ce=0.2", "--scale", 2).error(2)
    assert "--dose-on is for --dose" in cli(*words, "--dose-on", prompts).error(2)
    for wrong in ("volt=1", "ce=0", "ce=-1"):
        assert "--dose must be ce=NATS or kl=NATS" in cli(*words, "--dose", wrong).error(2)
    assert "--dose ce=1000 is out of reach" in cli(
        *words, "--dose", "ce=1000", "--dose-on", prompts
    ).error(1)


def test_explain_shows_asked_and_measured_changes(cli: Cli, plan: Path, sae: Path) -> None:
    words = ("steer", "--plan", plan, "-p", "Hello", "--sae", sae, *SMALL)
    outcome = cli(*words, "--explain")
    assert outcome.status == 0, outcome.err
    head, *lines = outcome.out.split("change of each latent, ")[1].splitlines()
    assert head == "mean over the 5 tokens that were changed"
    assert lines[0].split() == ["latent", "before", "after", "asked", "measured", "on"]
    assert len(lines) == 4
    for line in lines[1:]:
        _, before, after, _, measured, *_ = line.split()
        assert float(after) - float(before) == pytest.approx(float(measured), abs=2e-3)
    assert "leave --json out" in cli(*words, "--explain", "--json").error(2)


def test_a_plan_of_several_parts(cli: Cli, plan: Path, tmp_path: Path) -> None:
    from saesteer.steering import load_plan, save_plan

    one = load_plan(plan)
    later = one.with_changes(layer=2, scope="generated", scale=0.5)
    save_plan(one.with_changes(parts=(*one.parts, *later.parts)), tmp_path / "both")
    words = ("steer", "--plan", tmp_path / "both", "-p", "Hello", *SMALL)
    (row,) = rows_of(cli(*words, "--json").out)
    (alone,) = rows_of(cli("steer", "--plan", plan, "-p", "Hello", "--json", *SMALL).out)
    assert row["tokens_touched"] == alone["tokens_touched"]
    assert row["completion"] != alone["completion"]
    refused = cli(*words, "--scale", 2)
    assert refused.status == 2
    assert "--scale is not the same in all parts of this plan" in refused.err
    assert cli(*words, "--method", "add-keep-norm").status == 0


def test_an_edit_beyond_float32_is_an_error(cli: Cli, model: Path, plan: Path) -> None:
    words = ("steer", "--model", model, "--plan", plan, "-p", "Hello", "--scale", "1e30", *SMALL)
    assert "the edit is longer than float32 can hold" in cli(*words).error(1)
