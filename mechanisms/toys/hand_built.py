"""A model of two blocks whose weights are set by hand, so that its circuit is known exactly.

It reads scenes such as `boxes F apple , G pear . F` and continues with the thing in box F. The
residual stream has one-hot parts: [current word | previous word | output], each as wide as the
vocabulary. Head (0,0) attends to the token before and copies its word into `previous`; head (1,1)
looks for the token whose `previous` is its own `current` and copies that token's word into
`output`, which alone is unembedded. The other heads write nothing. The rotary base is so large
that only plane 0 turns, by one radian a token: a score cos(distance - 1) finds the token before.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import write_text
from saesteer.mechanisms.data.desiderata import DESIDERATA, draw_scenes
from saesteer.mechanisms.data.pairs import Pair, write_pairs
from saesteer.sae.model.language_model import LanguageModel, wrap_model

LETTERS = tuple("ABCDEFGHIJKLMNOP")
THINGS = (
    "apple", "ball", "bell", "book", "bottle", "bread", "cake", "card", "clock", "coat", "coin",
    "cup", "drum", "key", "lamp", "map", "pear", "ring", "rose", "shell", "stone",
)  # fmt: skip
WORDS = ("<pad>", "<unk>", "boxes", ",", ".", *LETTERS, *THINGS)
BOXES = 5
MOVER, FETCHER, SPARE, DECOY = (0, 0), (1, 1), (1, 2), (0, 1)
"""(block, head) of the circuit's two heads, of a copy of the second, and of one that looks like the
first and is not read."""

_SHARP = 1000.0  # cos(6) is .96: the seventh token before still scores 40 less than the first
_MATCH = 40.0
_LOGIT = 10.0

GROUPS = """\
# The circuit from its end: which heads write the answer, and which feed those.
- {name: fetcher, at: last, to: logits}
- {name: mover, at: object, to: fetcher, by: k}
"""


def hand_built(
    out: str | Path,
    *,
    scenes: int = 200,
    seed: int = 0,
    redundant: bool = False,
    decoy: bool = False,
) -> Path:
    """Write `model/`, `scenes.jsonl`, `groups.yaml` and `masks/` into a folder, and return it.

    `redundant` adds head (1,2), a copy of (1,1): either alone keeps the answer likely, so
    patching one head at a time finds neither, and patching both finds them. `decoy` adds head
    (0,1), which copies the word before, as (0,0) does, into a part that nothing reads: it holds
    the answer's label as well, and has no effect.
    """
    if scenes < 1:
        raise UsageError(f"`scenes` must be at least 1, got {scenes}")
    folder = Path(out)
    lm = hand_built_model(redundant=redundant, decoy=decoy)
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    write_text(folder / "scenes.jsonl", write_pairs(hand_built_scenes(scenes, seed)))
    write_text(folder / "groups.yaml", GROUPS)
    write_desiderata(folder, scenes, seed)
    return folder


def write_desiderata(folder: Path, n: int, seed: int, boxes: int = BOXES) -> None:
    """Write `masks/object.jsonl` and its like: pairs for masks, see `desiderata`."""
    (folder / "masks").mkdir(exist_ok=True)
    for kind in DESIDERATA:
        pairs = hand_built_desiderata(kind, n, seed, boxes)
        write_text(folder / "masks" / f"{kind}.jsonl", write_pairs(pairs))


def hand_built_model(*, redundant: bool = False, decoy: bool = False) -> LanguageModel:
    """The model with its word-level tokenizer, in float32. With `decoy` the stream has a fourth
    part, which only that head writes and nothing reads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    v = len(WORDS)
    config = LlamaConfig(
        vocab_size=v, hidden_size=(3 + decoy) * v, intermediate_size=3, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, head_dim=v + 2 + v % 2, rms_norm_eps=1e-12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e60}, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        model.model.embed_tokens.weight[:, :v] = torch.eye(v)
        _set_mover(model.model.layers[MOVER[0]].self_attn, MOVER[1], config, writes=1)
        if decoy:
            _set_mover(model.model.layers[DECOY[0]].self_attn, DECOY[1], config, writes=3)
        for head in (FETCHER, SPARE) if redundant else (FETCHER,):
            _set_fetcher(model.model.layers[head[0]].self_attn, head[1], config, 2 + decoy)
        norm = _norm_of(3 + decoy, config)
        model.lm_head.weight[:, 2 * v : 3 * v] = _LOGIT * torch.eye(v) * norm
    return wrap_model(model.eval(), word_tokenizer(), "hand-built")


def _norm_of(ones: int, config: Any) -> float:
    """Root mean square of a stream with so many ones: what the norm divides by."""
    return math.sqrt(ones / config.hidden_size)


def _set_mover(attention: Any, head: int, config: Any, writes: int) -> None:
    """Attend to the token before; current word of that token -> part `writes` of the stream."""
    v, dh = config.vocab_size, config.head_dim
    at, norm = head * dh, _norm_of(1, config)
    size = math.sqrt(_SHARP * math.sqrt(dh)) * norm
    # Dimensions 0 and dh/2 turn together: q points one radian back from where k points.
    attention.q_proj.weight[at, :v] = size * math.cos(1)
    attention.q_proj.weight[at + dh // 2, :v] = -size * math.sin(1)
    attention.k_proj.weight[at, :v] = size
    attention.v_proj.weight[at : at + v, :v] = torch.eye(v) * norm
    attention.o_proj.weight[writes * v : (writes + 1) * v, at : at + v] = torch.eye(v)


def _set_fetcher(attention: Any, head: int, config: Any, ones: int) -> None:
    """Attend where `previous` is the own current word; current word of that token -> output.
    `ones` is how many parts of the stream are one-hot by then."""
    v, dh = config.vocab_size, config.head_dim
    at, norm = head * dh, _norm_of(ones, config)
    still = at + _still_dimensions(v, dh)
    size = math.sqrt(_MATCH * math.sqrt(dh)) * norm
    attention.q_proj.weight[still, torch.arange(v)] = size
    attention.k_proj.weight[still, torch.arange(v, 2 * v)] = size
    attention.v_proj.weight[at : at + v, :v] = torch.eye(v) * norm
    attention.o_proj.weight[2 * v : 3 * v, at : at + v] = torch.eye(v)


def _still_dimensions(v: int, dh: int) -> Tensor:
    """`v` dimensions of a head that rotation leaves alone: all but 0 and dh/2."""
    return torch.tensor([i for i in range(dh) if i not in (0, dh // 2)][:v])


def word_tokenizer(vocabulary: Sequence[str] = WORDS) -> Any:
    """One token a word, split at blanks. `<pad>` and `<unk>` must be in the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", model_max_length=64
    )


def hand_built_scenes(n: int, seed: int, boxes: int = BOXES) -> list[Pair]:
    """Pairs of scenes of some boxes, five if not said. The corrupt one has other things and
    letters, and asks for a letter that is in neither. Positions `object` and `label`, at the same
    place in both."""
    drawn = random.Random(seed)
    pairs = []
    for number in range(n):
        letters = drawn.sample(LETTERS, 2 * boxes + 1)
        things = drawn.sample(THINGS, 2 * boxes)
        asked = drawn.randrange(boxes)
        clean, spans = _scene(letters[:boxes], things[:boxes], asked, letters[asked])
        corrupt, others = _scene(letters[boxes:-1], things[boxes:], asked, letters[-1])
        pairs.append(
            Pair(
                clean, corrupt, f" {things[asked]}", f" {things[(asked + 1) % boxes]}",
                {name: (spans[name], others[name]) for name in spans}, f"scene {number}", 1 / boxes,
            )
        )  # fmt: skip
    return pairs


def hand_built_desiderata(kind: str, n: int, seed: int, boxes: int = BOXES) -> list[Pair]:
    """Pairs for a mask: base, source, and what the base should answer; see `desiderata`."""
    drawn = random.Random(seed)
    pairs = []
    for number in range(n):
        base, source, wanted = draw_scenes(kind, boxes, LETTERS, THINGS, drawn)
        (clean, spans), (corrupt, others) = (
            _scene(list(one.labels), list(one.things), one.asked, one.labels[one.asked])
            for one in (base, source)
        )
        places = {name: (spans[name], others[name]) for name in spans}
        pairs.append(Pair(clean, corrupt, f" {wanted}", f" {base.answer}", places,
                          f"scene {number}"))  # fmt: skip
    return pairs


def _scene(
    letters: list[str], things: list[str], asked: int, query: str
) -> tuple[str, dict[str, tuple[int, int]]]:
    text, spans = "boxes", {}
    for place, (letter, thing) in enumerate(zip(letters, things, strict=True)):
        text += f"{' ,' if place else ''} {letter}"
        if place == asked:
            spans["label"] = (len(text) - 1, len(text))
        text += f" {thing}"
        if place == asked:
            spans["object"] = (len(text) - len(thing), len(text))
    return f"{text} . {query}", spans
