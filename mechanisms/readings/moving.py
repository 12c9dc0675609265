"""`move_centroids`: states go from one label's centroid to another's. Does the answer follow?

h <- h - c_k + c_k' at one position of one layer; a switch is an output f_k'(x), what the other task
answers to the same input. At the position `query` or `last`, where states are split by input too,
centroids are those of label and input; elsewhere of the label alone.
"""

import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.states import StateRow, answer_ids, batches, read_states
from saesteer.mechanisms.reading_config import ProbeConfig
from saesteer.mechanisms.readings.clustering import centroids
from saesteer.mechanisms.readings.probe_result import Moves
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel, as_language_model, uncompiled
from saesteer.sae.runs.facts import model_facts
from saesteer.steering.evaluation.intervals import wilson

_BY_INPUT = ("query", "last")


def move_centroids(
    model: str | LanguageModel,
    rows: Sequence[StateRow],
    config: ProbeConfig | None = None,
    *,
    at: Sequence[str] = ("instruction", "last"),
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> Moves:
    """Switch rate by layer and position over the rows of split `train`, beside a random shift of
    equal norm (`config.draws` of them).

    Raises UserError for rows without answers, or where all labels answer the same.
    """
    config = config or ProbeConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    began = time.perf_counter()
    own = [row for row in rows if row.split == "train"]
    ids = answer_ids(lm, own)
    drawn = random.Random(config.seed)
    chosen, targets = [], []
    for number, (row, answers) in enumerate(zip(own, ids, strict=True)):
        true = answers.get(row.label)
        others = [label for label, token in answers.items() if token != true]
        if true is not None and others:
            chosen.append(number)
            targets.append(drawn.choice(others))
    if not chosen:
        raise UserError(
            "`states` have no answers that differ between labels: a move shows only where the "
            "other task would answer something else"
        )
    states = read_states(lm, own, at, site="resid_post", chat=config.chat)
    noise = torch.Generator().manual_seed(config.seed)
    found = []
    for name in at:
        for layer in range(lm.n_layers + 1):
            progress("moving states", layer, lm.n_layers + 1, f"layers at {name}")
            values = states.at[name][:, layer].numpy()
            by_input = name in _BY_INPUT
            keys = [(row.label, row.input if by_input else "") for row in own]
            centres = centroids(values, own, keys)
            usable = [
                (i, target) for i, target in zip(chosen, targets, strict=True)
                if (target, keys[i][1]) in centres
            ]  # fmt: skip
            shift = torch.from_numpy(
                np.stack([centres[t, keys[i][1]] - centres[keys[i]] for i, t in usable])
            )
            picked = [i for i, _ in usable]
            wanted = torch.tensor([ids[i][target] for i, target in usable])
            before = torch.tensor([ids[i][own[i].label] for i in picked])
            places = [states.places[name][i] for i in picked]
            some = [states.ids[i] for i in picked]
            moved = _answers(lm, some, places, layer, shift)
            switched = int((moved == wanted).sum())
            by_chance = []
            for _ in range(config.draws):
                other = torch.randn(shift.shape, generator=noise)
                other *= shift.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
                random_answers = _answers(lm, some, places, layer, other)
                by_chance.append(float((random_answers == wanted).double().mean()))
            low, high = wilson(switched, len(picked))
            found.append(
                {
                    "at": name,
                    "layer": layer,
                    "n": len(picked),
                    "switched": switched / len(picked),
                    "low": low,
                    "high": high,
                    "kept": float((moved == before).double().mean()),
                    "random": float(np.mean(by_chance)),
                }
            )
    return Moves(
        model=model_facts(lm) | {"n_layers": lm.n_layers}, config=config, rows=tuple(found),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


@torch.no_grad()
def _answers(
    lm: LanguageModel, ids: Sequence[list[int]], places: Sequence[int], layer: int, shift: Tensor
) -> Tensor:
    """The next token of each row when `shift` `[rows, d_model]` is added at its place."""
    point = (
        resolve_site(lm, 0, "resid_pre")
        if layer == 0
        else resolve_site(lm, layer - 1, "resid_post")
    )
    given = torch.empty(len(ids), dtype=torch.int64)
    for own, batch in batches(ids, lm.pad_id):
        row, where = torch.arange(len(own)), torch.tensor([places[i] for i in own])

        def add(
            h: Tensor, row: Tensor = row, where: Tensor = where, own: list[int] = own
        ) -> Tensor:
            h = h.clone()
            h[row, where] += shift[own].to(h)
            return h

        with hooked(point, add):
            out = uncompiled(lm.model)(input_ids=batch.to(lm.device), use_cache=False).logits
        given[own] = out[row, [len(ids[i]) - 1 for i in own]].argmax(-1).cpu()
    return given
