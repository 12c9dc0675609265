"""`trace`: by which tokens, heads and routes of one forward pass an answer's logit came about.

In the frozen network the traced logit m is affine in the embeddings E, so one backward is exact:

    m = sum_t <dm/dE_t, E_t> + biases          mass of tokens
    <dm/dz, z>                                 mass that passes through a head
    A_ts <dm/dz_t, v_s>                        the part of it that the head read at token s

and a route, which hops from token to token by heads while MLPs and the stream carry it on, has the
mass of the product of its frozen matrices. Routes over all tokens add up to m, but for biases.
m is the answer's logit minus the wrong one's, or minus the mean of the vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.patching.sites import Edit
from saesteer.mechanisms.reading_config import TraceConfig
from saesteer.mechanisms.routes.frozen import FrozenNetwork
from saesteer.mechanisms.routes.pieces import Pieces
from saesteer.mechanisms.routes.trace_result import Route, Trace, TraceComparison
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts
from saesteer.sae.text.prompts import encode_prompt

Hop = tuple[int, int, int, int]
"""Block, head, the token that reads, the token that is read."""


def trace(
    model: str | LanguageModel,
    prompt: str,
    answer: str | None = None,
    config: TraceConfig | None = None,
    *,
    wrong: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> Trace:
    """Account for the logit of one answer.

    Args:
        answer: what follows the prompt, its leading space included; None for the model's own next
            token.
        wrong: an answer whose logit is subtracted; None subtracts the vocabulary's mean.

    Raises:
        UsageError: a family whose heads cannot be told apart.
        UserError: an answer that cannot be told from the wrong one; a family that cannot be frozen.
        NonFiniteError: NaN or infinity in the model.
    """
    config = config or TraceConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    began = time.perf_counter()
    if answer is None:
        if wrong is not None:
            raise UsageError("`wrong` without `answer`: give both, or neither")
        ids, other = encode_prompt(lm, prompt, chat=config.chat).token_ids, None
        net = FrozenNetwork(lm, ids)
        given = int(net.logits.argmax())
    else:
        pair = Pair(prompt, prompt, answer, wrong)
        (encoded,), _ = encode_pairs(lm, [pair], chat=config.chat, allow_copies=True)
        ids, given, other = encoded.clean, encoded.answer, encoded.wrong
        net = FrozenNetwork(lm, ids)
    account = take_account(net, _score(net, given, other))
    routes, lost = follow(net, account, config, progress)
    return Trace(
        model=model_facts(lm) | {"n_layers": lm.n_layers},
        config=config,
        prompt=prompt,
        tokens=tuple(lm.tokenizer.convert_ids_to_tokens(ids)),
        answer=lm.tokenizer.decode([given]),
        wrong=None if other is None else lm.tokenizer.decode([other]),
        logit=account.logit,
        biases=account.biases,
        token_mass=account.tokens,
        stream_mass=account.stream,
        mlp_mass=account.mlps,
        head_mass=account.writes,
        read_mass=account.reads,
        routes=tuple(routes),
        lost=lost,
        seconds=time.perf_counter() - began,
    )


def compare_traces(
    model: str | LanguageModel,
    pairs: str | Sequence[Pair],
    config: TraceConfig | None = None,
    *,
    at: str = "instruction",
    n: int = 40,
    device: str = "auto",
    dtype: str = "float32",
    drop: bool = False,
    progress: Progress = no_progress,
) -> TraceComparison:
    """Through which heads the tokens of a named position reach the answer, in the clean prompts
    and in the corrupt ones, whose answer is the wrong one.

    Heads are compared by the mass that they read at those tokens: a sign test over groups, adjusted
    by Benjamini and Hochberg over all heads. Masses are no interventions: patch the heads that come
    out.

    Raises UserError for pairs without `wrong` or without that position, and as `trace`.
    """
    config = config or TraceConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    listed = load_pairs(pairs, n=n, seed=config.seed) if isinstance(pairs, str) else list(pairs)
    began = time.perf_counter()
    encoded, dropped = encode_pairs(lm, listed, chat=config.chat, drop=drop)
    masses: list[list[np.ndarray]] = [[], []]
    logits: list[list[float]] = [[], []]
    for number, pair in enumerate(encoded):
        progress("tracing", number, len(encoded), "pairs")
        if pair.wrong is None or f"{at}-first" not in pair.places:
            lacks = "no wrong answer" if pair.wrong is None else f"no position {at!r}"
            raise UserError(f"pair {number + 1} has {lacks}: traces of two tasks need both")
        first, last = pair.places[f"{at}-first"], pair.places[f"{at}-last"]
        for side, ids in enumerate((pair.clean, pair.corrupt)):
            net = FrozenNetwork(lm, ids)
            ends = (pair.answer, pair.wrong) if side == 0 else (pair.wrong, pair.answer)
            account = take_account(net, _score(net, *ends))
            masses[side].append(account.reads[:, :, first[side] : last[side] + 1].sum(-1))
            logits[side].append(account.logit)
    progress("tracing", len(encoded), len(encoded), "pairs")
    return TraceComparison(
        model=model_facts(lm) | {"n_layers": lm.n_layers},
        config=config,
        at=at,
        clean=np.stack(masses[0]),
        corrupt=np.stack(masses[1]),
        logits=(float(np.mean(logits[0])), float(np.mean(logits[1]))),
        groups=tuple(pair.group for pair in encoded),
        dropped=tuple(dropped),
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, eq=False)
class Account:
    """Masses of one pass, float64."""

    logit: float
    biases: float
    """m of the frozen network with all embeddings 0."""
    tokens: np.ndarray
    """`[T]`."""
    stream: np.ndarray
    """`[L + 1, T]`: of the residual stream before each block, and after the last."""
    mlps: np.ndarray
    """`[L, T]`."""
    writes: np.ndarray
    """`[L, H, T]`, by the token that a head writes to."""
    reads: np.ndarray
    """`[L, H, T]`, by the token that it reads."""
    top: Tensor
    """dm by the stream after the last block at the last token, `[d_model]`."""


def _score(net: FrozenNetwork, answer: int, wrong: int | None) -> Tensor:
    """The weights of m on the logits, `[vocabulary]`: they add up to 0."""
    weights = torch.zeros_like(net.logits)
    weights[answer] = 1
    if wrong is None:
        return weights - 1 / len(weights)
    weights[wrong] -= 1
    return weights


def take_account(net: FrozenNetwork, weights: Tensor) -> Account:
    """All masses of m = weights . logits, from one forward and one backward."""
    lm, kept = net.lm, dict[tuple[int, str], Tensor]()

    def keep(place: tuple[int, str]) -> Edit:
        return lambda values: kept.update({place: values})

    sites = ("resid_post", "mlp_out", "pattern", "v", "z")
    edits = {(layer, site): keep((layer, site)) for layer in range(lm.n_layers) for site in sites}
    edits[0, "resid_pre"] = keep((0, "resid_pre"))
    start = net.embeddings.clone().requires_grad_(True)
    with torch.enable_grad():
        logits = net.run(start, edits)
        m = (weights * logits).sum()
        wanted = [place for place in edits if place[1] not in ("pattern", "v")]
        found = torch.autograd.grad(m, [start, *(kept[place] for place in wanted)])
    grads = dict(zip(wanted, (grad[0].double() for grad in found[1:]), strict=True))

    def mass(layer: int, site: str) -> np.ndarray:
        values = kept[layer, site][0].detach().double()
        return np.asarray((grads[layer, site] * values).sum(-1).cpu().numpy())

    reads = []
    for layer in range(lm.n_layers):
        pattern = kept[layer, "pattern"][0].detach().double()
        v = kept[layer, "v"][0].detach().double()
        read_at = torch.einsum("hts,thd->hsd", pattern, grads[layer, "z"])
        reads.append((read_at * v).sum(-1).cpu().numpy())
    blocks = range(lm.n_layers)
    with torch.no_grad():
        biases = float((weights * net.run(torch.zeros_like(start))).sum())
    return Account(
        logit=float(m.detach()),
        biases=biases,
        tokens=np.asarray((found[0][0] * start[0]).detach().double().sum(-1).cpu().numpy()),
        stream=np.stack([mass(0, "resid_pre"), *(mass(layer, "resid_post") for layer in blocks)]),
        mlps=np.stack([mass(layer, "mlp_out") for layer in blocks]),
        writes=np.stack([mass(layer, "z").T for layer in blocks]),
        reads=np.stack(reads),
        top=grads[lm.n_layers - 1, "resid_post"][-1].to(net.embeddings),
    )


def follow(
    net: FrozenNetwork, account: Account, config: TraceConfig, progress: Progress = no_progress
) -> tuple[list[Route], float]:
    """Routes from the answer back to the embeddings, the largest first, and the mass of those that
    were dropped on the way (by size, so that what cancels counts).

    Layer by layer, each route is continued by every head and source token or by none; the `beam`
    of largest mass are kept. The stream and the MLP at a token carry a route on together.
    """
    lm = net.lm
    pieces = Pieces(net)
    least = config.tau * abs(account.logit)
    hops: list[tuple[Hop, ...]] = [()]
    at = [net.ids.shape[1] - 1]
    vectors = account.top[None]
    lost = 0.0
    for layer in reversed(range(lm.n_layers)):
        if not hops:
            break
        progress("following routes", lm.n_layers - 1 - layer, lm.n_layers, "blocks")
        piece = pieces[layer]
        tokens = torch.tensor(at, device=lm.device)
        on, into = piece.back(vectors, tokens)
        here = (on * piece.stream[tokens]).sum(-1).double()
        # [routes, H, source]: what each head brought to the route's token.
        read = piece.pattern[:, tokens].transpose(0, 1) * torch.einsum(
            "khd,hsd->khs", into, piece.v
        )
        masses = torch.cat([here, read.double().flatten()])
        order = masses.abs().argsort(descending=True)
        chosen = order[: config.beam]
        chosen = chosen[masses[chosen].abs() >= least]
        lost += float(masses.abs().sum() - masses[chosen].abs().sum())
        same = [int(i) for i in chosen if i < len(at)]
        moved = [int(i) - len(at) for i in chosen if i >= len(at)]
        shape = read.shape[1:]
        places = [tuple(map(int, np.unravel_index(i, (len(at), *shape)))) for i in moved]
        new = [on[same]]
        if places:
            route, head, source = (torch.tensor(one) for one in zip(*places, strict=True))
            weight = piece.pattern[head, tokens[route], source][:, None]
            new.append(piece.back_through_v(weight * into[route, head], head, source))
        vectors = torch.cat(new)
        hops = [hops[i] for i in same] + [
            (*hops[i], (layer, head, at[i], source)) for i, head, source in places
        ]
        at = [at[i] for i in same] + [source for _, _, source in places]
    progress("following routes", lm.n_layers, lm.n_layers, "blocks")
    if not hops:
        return [], lost
    final = (vectors * pieces[0].stream[torch.tensor(at, device=lm.device)]).sum(-1)
    routes = [Route(h, t, float(m)) for h, t, m in zip(hops, at, final, strict=True)]
    return sorted(routes, key=lambda route: -abs(route.mass)), lost
