"""What is wrong with a command line is said before the language model is opened."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints import model_files

from .conftest import Cli, Outcome


class Opened(Exception):
    """The model was asked for."""


@pytest.fixture
def run(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, acts: Path,
        sae: Path, plan: Path, task: Path) -> Callable[[str], Outcome]:  # fmt: skip
    """Run a command line in a folder of good and bad inputs, where no model can be opened."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Opened("the model was opened")

    monkeypatch.setattr(model_files, "resolve_model", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("words and more words")
    Path("fields.jsonl").write_text('{"body": "words"}\n')
    Path("rows.json").write_text('[{"text": "words"}]')
    Path("prompts.txt").write_text("Hello\n")
    Path("half.jsonl").write_text('{"prompt": "a \\ud83d b"}\n')
    Path("contents.txt").write_text("one\ntwo\nthree\n")
    for used in ("used", "no-sae", "no-plan"):
        Path(used).mkdir()
        Path(used, "kept").write_text("kept")
    Path("broken-plan").mkdir()
    Path("broken-plan", "plan.yaml").write_text("schema_version: 1\n")
    Path("ifeval.jsonl").write_text('{"prompt": "x"}\n')
    good = {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    Path("good.jsonl").write_text(json.dumps(good))
    names = {"MODEL": model, "ACTS": acts, "SAE": sae, "PLAN": plan, "TASK": task}

    def run_line(line: str) -> Outcome:
        return cli(*(names.get(word, word) for word in shlex.split(line)))

    return run_line


HARVEST = "harvest --model MODEL --layer 1 -o new "
TRAIN = "train --model MODEL --layer 1 -o new "
METRICS = "metrics --sae SAE "
RANK = "rank --sae SAE --task TASK "
STEER = "steer --plan PLAN -p Hello "
LATENTS = "steer --sae SAE -p Hello "
SWEEP = "sweep --plan PLAN --task TASK "
SWEEP_SAE = "sweep --sae SAE --task TASK "
EVALUATE = "evaluate --plan PLAN --task TASK "
DOCTOR = "doctor --sae SAE "

_TEXT = [
    ("--data none.txt", "does not exist"),
    ("--data fields.jsonl", "it has: body"),
    ("--data rows.json", "is a JSON file, not JSON lines"),
    ("--data wikitext", "write hf:wikitext"),
    ("--data hf:a:b:c:d", "must read hf:DATASET"),
    ("--context 1", "--context must be at least 2"),
    ("--batch-size -1", "--batch-size"),
    ("--max-norm-ratio 0", "--max-norm-ratio"),
    ("--bos sometimes", "--bos must be one of auto, always, never"),
]
_LIVE = [
    ("--replies frensh", "did you mean french?"),
    ("--replies-share 2", "--replies-share"),
    ("--epochs 0", "--epochs must be at least 1"),
    ("--tokens 0", "--tokens must be at least 1"),
    ("--site resid_pots", "did you mean resid_post?"),
    ("--site blocks.1.hook_mlp_out", "is called mlp_out here: give that and --layer 1"),
    ("--device gpu", "--device must be auto, cpu, cuda or cuda:N"),
    ("--dtype int8", "--dtype must be"),
    ("--quantize 2bit", "--quantize must be one of 8bit, 4bit"),
    ("-o used", "is not empty"),
]
_ANSWERING = [
    ("--temperature -1", "--temperature must be 0 (greedy) or more"),
    ("--top-p 0", "--top-p must be in (0, 1]"),
    ("--top-p 2", "--top-p must be in (0, 1]"),
    ("--batch-size 0", "--batch-size must be at least 1"),
]
CASES: dict[str, list[tuple[str, str]]] = {
    HARVEST: [
        *_TEXT, *_LIVE,
        ("--store-dtype int8", "--store-dtype must be"),
        ("--shard-tokens 0", "--shard-tokens"),
        ("--layer 1,1", "twice"),
    ],
    TRAIN: [
        *_TEXT, *_LIVE,
        ("--arch tpok", "did you mean topk?"),
        ("--k 0", "--k must be at least 1"),
        ("--d-sae 8 --k 9", "--k"),
        ("--lr -1", "--lr must be"),
        ("--moments int8", "--moments must be"),
        ("--decay-share 2", "--decay-share"),
        ("--batch-tokens 0", "--batch-tokens"),
        ("--auxk -1", "--auxk"),
        ("--init-seed 0,0", "--init-seed names 0 twice"),
    ],
    "train -o new --activations ": [
        ("none", "none"),
        ("used", "used"),
        ("ACTS --layer 2", "layer 2"),
        ("ACTS --data good.txt", "--data needs --model"),
        ("ACTS --d-sae 8 --k 9", "--k"),
    ],
    "metrics --data good.txt --sae ": [
        ("none", "--sae none does not exist"),
        ("no-sae", "--sae no-sae"),
        ("SAE -o used", "is not empty"),
    ],
    METRICS: [
        *_TEXT,
        ("--tokens 0", "--tokens must be at least 2"),
        ("--site resid_pots", "did you mean resid_post?"),
        ("--layer 3", "conflicts with"),
    ],
    "rank --task TASK --sae ": [("none", "none does not exist"), ("no-sae", "--sae no-sae")],
    "rank --sae SAE --task ": [("frensh", "did you mean french?"), ("none.yaml", "none.yaml")],
    "rank --sae SAE --instruction Rhyme --contents ": [
        ("none.txt", "no such file: none.txt"),
        ("rows.json", "is no .jsonl or .txt file"),
    ],
    RANK: [
        ("--by lens2", "did you mean lens?"),
        ("--read spam", "did you mean span?"),
        ("--position posst", "did you mean post?"),
        ("--pool men", "did you mean mean?"),
        ("--drop dens", "did you mean dense?"),
        ("--method ad", "did you mean add?"),
        ("--unit sigam", "did you mean sigma?"),
        ("--scope generatoin", "did you mean generation?"),
        ("--top 0", "--top must be at least 1"),
        ("--explain 64", "--explain 64 is out of range: the SAE has latents 0..63"),
        ("--rank-contents 0", "--rank-contents"),
        ("--shuffles -1", "--shuffles"),
        ("--max-fdr 2", "--max-fdr"),
        ("--batch-size 0", "--batch-size"),
        ("--max-new-tokens 0", "--max-new-tokens"),
        ("--temperature -1", "--temperature"),
        ("--top-p 2", "--top-p"),
        ("--doses 0", "--doses"),
        ("--layer 3", "conflicts with"),
        ("-o used", "is not empty"),
    ],
    "steer -p Hello --plan ": [
        ("none", "none"),
        ("no-plan", "no-plan"),
        ("broken-plan", "broken-plan"),
    ],
    "steer --plan PLAN ": [
        ("--prompts none.txt", "--prompts none.txt does not exist"),
        ("--prompts rows.json", "is no .jsonl or .txt file"),
        ("--prompts half.jsonl", "half of a surrogate pair"),
        ("-p ''", "a prompt is empty"),
        ("--baseline", "no prompt"),
    ],
    STEER: [
        *_ANSWERING,
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("--method ad", "did you mean add?"),
        ("--unit sigam", "did you mean sigma?"),
        ("--scope generatoin", "did you mean generation?"),
        ("--schedule constnat", "did you mean constant?"),
        ("--gate 64>1 --sae SAE", "--gate reads latent 64"),
        ("--gate nonsense", "--gate"),
        ("--also none", "none"),
        ("--beside none", "none"),
        ("--beside meandiff", "late is not built in"),
        ("--replies-tokens 9", "give --beside meandiff with it"),
        ("--beside meandiff --replies-count 0", "--replies-count must be at least 1"),
        ("--beside meandiff --replies-top-p 2", "--replies-top-p"),
        ("--beside prompt --beside prompt", "given twice"),
        ("--dose ce=0.1 --dose-on none.txt", "--dose-on none.txt does not exist"),
        ("--dose volt=1", "--dose must be ce=NATS or kl=NATS"),
        ("--sae none", "none does not exist"),
        ("--layer 3", "conflicts with"),
        ("-o used", "is not empty"),
    ],
    LATENTS: [
        ("--latents 64:1", "64"),
        ("--latents 3", "--latents"),
        ("--latents x:1", "--latents"),
        ("--latents 3:1 --scope generatoin", "did you mean generation?"),
        ("--latents 3:1 --method ad", "did you mean add?"),
        ("--latents 3:1 --site resid_pots", "did you mean resid_post?"),
        ("--latents 3:1 --layer 3", "conflicts with"),
    ],
    "sweep --task TASK --plan ": [("none", "none"), ("no-plan", "no-plan")],
    "sweep --plan PLAN --task ": [("frensh", "did you mean french?"), ("none.yaml", "none.yaml")],
    "sweep --task TASK --sae ": [("none", "none does not exist"), ("no-sae", "--sae no-sae")],
    SWEEP: [
        *_ANSWERING,
        ("--grid betta=1", "did you mean beta?"),
        ("--grid scope=generatoin", "did you mean generation?"),
        ("--grid k=0", "--grid k must be at least 1"),
        ("--rounds 0:1", "--rounds"),
        ("--budget volt=1", "kl"),
        ("--budget kl=0", "--budget"),
        ("-o used", "is not empty"),
    ],
    SWEEP_SAE: [
        ("--grid by=lens2", "did you mean lens?"),
        ("--grid read=spam", "did you mean span?"),
        ("--grid position=posst", "did you mean post?"),
    ],
    "evaluate --task TASK --plan ": [("none", "none"), ("no-plan", "no-plan")],
    "evaluate --plan PLAN --task ": [("frensh", "did you mean french?"), ("none.yaml", "none.y")],
    EVALUATE: [
        *_ANSWERING,
        ("--controls promt", "did you mean prompt?"),
        ("--n 0", "--n must be at least 1"),
        ("--seeds 0,0", "--seeds names 0 twice"),
        ("--random-draws 0", "--random-draws must be at least 1"),
        ("--split tset", "did you mean test?"),
        ("--sae none", "none does not exist"),
        ("--ifeval none.jsonl", "none.jsonl"),
        ("--ifeval ifeval.jsonl", "lacks prompt or instruction_id_list"),
        ("--ifeval ifeval.jsonl --max-new-tokens 0", "--max-new-tokens"),
        ("--ifeval good.jsonl", "IFEval has no instruction like the task 'late'"),
        ("--ifeval good.jsonl --ifeval-only startend:quotation", "no IFEval row is left"),
        ("--judge nonsense --judge-model x", "--judge"),
        ("-o used", "is not empty"),
    ],
    "convert --to new --from ": [
        ("none", "none"),
        ("no-sae", "no-sae"),
        ("SAE --format sealens", "did you mean saelens?"),
        ("SAE --format gguf", "--format gguf is not for an SAE"),
        ("PLAN --format saelens", "--format saelens is not for a plan"),
        ("PLAN --as-scope al", "did you mean all?"),
        ("none --format plan --model MODEL", "none"),
        ("no-sae --format plan --model MODEL", "no-sae"),
    ],
    "doctor --sae ": [("none", "none does not exist"), ("no-sae", "--sae no-sae")],
    DOCTOR: [
        ("--tokens 0", "--tokens must be at least 1"),
        ("--context 0", "--context"),
        ("--batch-size 0", "--batch-size"),
        ("--site resid_pots", "did you mean resid_post?"),
        ("-o used", "is not empty"),
    ],
    "reproduce ": [
        ("none", "none"), ("used", "used"), ("ACTS --activations none", "this run is a harvest"),
    ],
    "demo --model MODEL ": [
        ("--task frensh -o new", "did you mean french?"),
        ("-o used", "is not empty"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "says"),
    [(start + rest, says) for start, rows in CASES.items() for rest, says in rows],
)
def test_wrong_inputs_are_refused_first(
    line: str, says: str, run: Callable[[str], Outcome]
) -> None:
    outcome = run(line)
    assert outcome.status in (1, 2), outcome.out + outcome.err
    assert "opened" not in outcome.err, outcome.err
    error = outcome.err.splitlines()[-1]
    assert error.startswith("error: ") and "unexpected" not in error and says in error
