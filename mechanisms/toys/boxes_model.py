"""A base and a tuned model, trained here: which thing is in the box that is asked for?

A Llama of two blocks learns scenes of 2 to 4 boxes and is then trained on with 5 to 7: a true pair
of a base and a fine-tuned model, small enough to look into, that does better at what the base did.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.files import write_json, write_text
from saesteer.mechanisms.config import ToyConfig
from saesteer.mechanisms.data.pairs import write_pairs
from saesteer.mechanisms.toys.hand_built import (
    GROUPS,
    LETTERS,
    THINGS,
    WORDS,
    hand_built_scenes,
    word_tokenizer,
    write_desiderata,
)
from saesteer.sae.config import Progress, no_progress

BASE_BOXES, TUNED_BOXES = (2, 3, 4), (5, 6, 7)
_IDS = {word: number for number, word in enumerate(WORDS)}
_IGNORED = -100


def train_boxes(
    out: str | Path,
    config: ToyConfig | None = None,
    *,
    scenes: int = 200,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train both models; write `base/`, `tuned/`, `scenes.jsonl` (seven boxes), `groups.yaml`,
    `masks/` and `toy.json` into a folder, and return what toy.json holds: the accuracy of each by
    boxes.

    Raises NonFiniteError when a loss is NaN or infinite.
    """
    config = config or ToyConfig()
    folder = Path(out)
    torch.manual_seed(config.seed)
    model, tokenizer = _new_model(config), word_tokenizer()
    drawn = random.Random(config.seed)
    accuracy = {}
    for name, boxes, steps in (
        ("base", BASE_BOXES, config.steps), ("tuned", TUNED_BOXES, config.tuning_steps)
    ):  # fmt: skip
        _train(model, boxes, steps, config, drawn, partial(progress, f"training {name}"))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        accuracy[name] = {n: _accuracy(model, n, seed=1) for n in (*BASE_BOXES, *TUNED_BOXES)}
    document = {"schema_version": 1, "kind": "boxes", "accuracy": accuracy, "scenes_each": 200}
    write_text(folder / "scenes.jsonl", write_pairs(hand_built_scenes(scenes, 2, boxes=7)))
    write_text(folder / "groups.yaml", GROUPS)
    write_desiderata(folder, scenes, 3, boxes=7)
    write_json(folder / "toy.json", document)
    return document


def _new_model(config: ToyConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=config.d_model, intermediate_size=2 * config.d_model,
            num_hidden_layers=config.blocks, num_attention_heads=config.heads,
            num_key_value_heads=config.heads // 2, max_position_embeddings=64,
            bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _rows(
    boxes: Sequence[int], batch: int, queries: int, drawn: random.Random
) -> tuple[Tensor, Tensor]:
    """Token ids and labels of one batch: a scene of one size, then boxes asked for with their
    things; only the things count."""
    size = drawn.choice(boxes)
    ids, labels = [], []
    for _ in range(batch):
        letters, things = drawn.sample(LETTERS, size), drawn.sample(THINGS, size)
        scene = ["boxes"]
        for place in range(size):
            scene += [","] * bool(place) + [letters[place], things[place]]
        marks = [_IGNORED] * len(scene)
        for _ in range(queries):
            asked = drawn.randrange(size)
            scene += [".", letters[asked], things[asked]]
            marks += [_IGNORED, _IGNORED, _IDS[things[asked]]]
        ids.append([_IDS[word] for word in scene])
        labels.append(marks)
    return torch.tensor(ids), torch.tensor(labels)


def _train(
    model: Any,
    boxes: Sequence[int],
    steps: int,
    config: ToyConfig,
    drawn: random.Random,
    progress: Callable[[int, int, str], None],
) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    warmup = min(50, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / warmup)
    )
    for step in range(steps):
        ids, labels = _rows(boxes, config.batch, config.queries, drawn)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
        )
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss of step {step} is {float(loss)}: lower `lr`")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            progress(step + 1, steps, f"steps, loss {float(loss):.3f}")
    model.eval()


@torch.no_grad()
def _accuracy(model: Any, boxes: int, seed: int) -> float:
    """Share of 200 scenes whose thing comes first of the vocabulary."""
    pairs = hand_built_scenes(200, seed, boxes)
    ids = torch.tensor([[_IDS[word] for word in pair.clean.split()] for pair in pairs])
    given = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
    right = torch.tensor([_IDS[str(pair.answer).strip()] for pair in pairs])
    return float((given == right).double().mean())
