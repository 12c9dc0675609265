"""Symbolic instructions: a model learns tasks that only patterns of symbols tell apart.

Each task maps five shared inputs to outputs. Its templates are patterns of three anchors with up
to two fillers after each; a sequence is an instruction, an input, its output:

    a3 f1 a17 f0 f6 a9 x2 y5

The task's name is never shown. Held out of training: some strings of fillers, for every template
one input (other templates of the task show it), and of one more template all inputs but a few.
After Liang et al., "Transformer-based causal language models perform clustering" (2402.12151),
whose sizes are not public: these are ours.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.files import write_json, write_text
from saesteer.mechanisms.data.states import StateRow, write_states
from saesteer.mechanisms.reading_config import SymbolsConfig
from saesteer.mechanisms.toys.hand_built import word_tokenizer
from saesteer.sae.config import Progress, no_progress

ANCHORS = tuple(f"a{i}" for i in range(24))
FILLERS = tuple(f"f{i}" for i in range(8))
INPUTS = tuple(f"x{i}" for i in range(5))
OUTPUTS = tuple(f"y{i}" for i in range(12))
WORDS = ("<pad>", "<unk>", *ANCHORS, *FILLERS, *INPUTS, *OUTPUTS)
SPLITS = ("train", "fillers", "inputs", "templates")
"""Trained on (with other fillers of the same kind), and the three kinds that are held out."""

_IDS = {word: number for number, word in enumerate(WORDS)}
_IGNORED = -100


@dataclass(frozen=True)
class Symbols:
    """The tasks of one seed."""

    outputs: tuple[tuple[int, ...], ...]
    """Task -> output of each input."""
    templates: tuple[tuple[tuple[int, int, int], ...], ...]
    """Task -> anchors of its templates, the one with few inputs last."""
    shown: int

    def is_held_out(self, template: int, task: int, given: int) -> str | None:
        """The split of a template with an input, where it is held out: inputs or templates."""
        if template == len(self.templates[task]) - 1:
            return "templates" if (given + task) % len(INPUTS) >= self.shown else None
        return "inputs" if given == (template + task) % len(INPUTS) else None


def make_symbols(config: SymbolsConfig) -> Symbols:
    """Tasks and templates, drawn by the seed: outputs of a task differ, triples of anchors are
    used once."""
    drawn = random.Random(config.seed)
    outputs = tuple(
        tuple(drawn.sample(range(len(OUTPUTS)), len(INPUTS))) for _ in range(config.tasks)
    )
    used: set[tuple[int, ...]] = set()

    def triple() -> tuple[int, int, int]:
        while True:
            a, b, c = drawn.sample(range(len(ANCHORS)), 3)
            if (a, b, c) not in used:
                used.add((a, b, c))
                return a, b, c

    templates = tuple(
        tuple(triple() for _ in range(config.templates + 1)) for _ in range(config.tasks)
    )
    return Symbols(outputs, templates, config.shown)


def instruction(drawn: random.Random, anchors: Sequence[int], *, held_out: bool) -> list[str]:
    """One instance of a template, whose fillers are held out of training or not."""
    while True:
        fillers = [drawn.choices(FILLERS, k=drawn.randint(0, 2)) for _ in anchors]
        if (zlib.crc32(" ".join(map("".join, fillers)).encode()) % 5 == 0) == held_out:
            break
    words = []
    for anchor, own in zip(anchors, fillers, strict=True):
        words += [ANCHORS[anchor], *own]
    return words


def symbol_states(symbols: Symbols, n: int, seed: int) -> list[StateRow]:
    """`n` prompts of each split, with what every task would answer."""
    drawn = random.Random(seed)
    rows = []
    for split in SPLITS:
        cells = [cell for cell in _cells(symbols) if cell[3] == split] if split != "fillers" else [
            cell for cell in _cells(symbols) if cell[3] == "train"
        ]  # fmt: skip
        drawn.shuffle(cells)
        for place in range(n if cells else 0):
            task, template, given, _ = cells[place % len(cells)]
            words = instruction(
                drawn, symbols.templates[task][template], held_out=split == "fillers"
            )
            head = " ".join(words)
            text = f"{head} {INPUTS[given]}"
            answers = {
                f"task {k}": OUTPUTS[outputs[given]] for k, outputs in enumerate(symbols.outputs)
            }
            rows.append(
                StateRow(
                    text=text, label=f"task {task}", group=f"task {task} template {template}",
                    input=INPUTS[given], split=split, answers=answers,
                    positions={"instruction": (0, len(head)),
                               "query": (len(head) + 1, len(text))},
                )
            )  # fmt: skip
    return rows


def _cells(symbols: Symbols) -> Iterator[tuple[int, int, int, str]]:
    for task, templates in enumerate(symbols.templates):
        for template in range(len(templates)):
            for given in range(len(INPUTS)):
                yield task, template, given, symbols.is_held_out(template, task, given) or "train"


def train_instructions(
    out: str | Path,
    config: SymbolsConfig | None = None,
    *,
    states: int = 200,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train the model; write `steps/<number>` for each checkpoint, `states.jsonl` (prompts of each
    split, for `probe`) and `toy.json` into a folder, and return what toy.json holds: accuracy of
    each split by checkpoint.

    Raises NonFiniteError when a loss is NaN or infinite.
    """
    config = config or SymbolsConfig()
    folder = Path(out)
    symbols = make_symbols(config)
    torch.manual_seed(config.seed)
    model, tokenizer = _new_model(config), word_tokenizer(WORDS)
    rows = symbol_states(symbols, states, config.seed + 1)
    pool = [cell for cell in _cells(symbols) if cell[3] == "train"]
    drawn = random.Random(config.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    accuracy: dict[str, dict[str, float]] = {}
    for step in range(config.steps + 1):
        if step % config.every == 0 or step == config.steps:
            model.eval()
            name = f"{step:05d}"
            model.save_pretrained(folder / "steps" / name)
            tokenizer.save_pretrained(folder / "steps" / name)
            accuracy[name] = _accuracy(model, rows)
            model.train()
        if step == config.steps:
            break
        loss = _loss(model, _batch(symbols, pool, config, drawn), config.loss)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss of step {step} is {float(loss.detach())}: lower `lr`")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 20 == 0 or step == config.steps - 1:
            progress("training", step + 1, config.steps, f"steps, loss {float(loss.detach()):.3f}")
    document = {
        "schema_version": 1, "kind": "instructions", "settings": asdict(config),
        "accuracy": accuracy, "states_each": states,
    }  # fmt: skip
    write_text(folder / "states.jsonl", write_states(rows))
    write_json(folder / "toy.json", document)
    return document


def _new_model(config: SymbolsConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=config.d_model,
            intermediate_size=2 * config.d_model, num_hidden_layers=config.blocks,
            num_attention_heads=config.heads, num_key_value_heads=config.heads,
            max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def _batch(
    symbols: Symbols,
    pool: Sequence[tuple[int, int, int, str]],
    config: SymbolsConfig,
    drawn: random.Random,
) -> list[list[int]]:
    rows = []
    for _ in range(config.batch):
        task, template, given, _ = drawn.choice(pool)
        words = instruction(drawn, symbols.templates[task][template], held_out=False)
        words += [INPUTS[given], OUTPUTS[symbols.outputs[task][given]]]
        rows.append([_IDS[word] for word in words])
    return rows


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _loss(model: Any, rows: Sequence[Sequence[int]], what: str) -> Tensor:
    ids = _padded(rows)
    labels = torch.full_like(ids, _IGNORED)
    for number, row in enumerate(rows):
        start = len(row) - 1 if what == "output" else 1
        labels[number, start : len(row)] = ids[number, start : len(row)]
    # Nothing attends to what comes later, so padding at the end needs no mask.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
    )


@torch.no_grad()
def _accuracy(model: Any, rows: Sequence[StateRow]) -> dict[str, float]:
    """Share of prompts of each split whose output comes first of the vocabulary."""
    encoded = [[_IDS[word] for word in row.text.split()] for row in rows]
    logits = model(input_ids=_padded(encoded), use_cache=False).logits
    right: dict[str, list[bool]] = {}
    for number, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
        given = int(logits[number, len(ids) - 1].argmax())
        right.setdefault(row.split, []).append(given == _IDS[row.answers[row.label]])
    return {split: sum(found) / len(found) for split, found in right.items()}
