"""What became of the sites of each causal family of transformers, and the page that says so.

`python -m tests.sae.model.family_sites` writes the table of docs/sites.md again.
"""

import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.hooks import HookPoint, capture, hooked, resolve_site, run_to
from saesteer.sae.model.isolation import prove_isolation
from saesteer.sae.model.language_model import LanguageModel, wrap_model

from .tiny_families import NOT_BUILT, tiny_config

PAGE = Path(__file__).resolve().parents[3] / "docs" / "sites.md"
INNER = ("attn_out", "mlp_out", "resid_mid")
IDS = torch.arange(40).reshape(2, 20) * 11 % 250 + 5
LAYER = 1
ALLOWED = 1e-4
"""Of what is added: sums of three are not added in the model's order."""


@dataclass
class Tried:
    """One family."""

    refused: str = ""
    """Why it cannot be read at all, or has no residual stream."""
    sites: dict[str, str] = field(default_factory=dict)
    """By site: the module relative to the block, or why there is none."""
    isolates: bool = False


def causal_families() -> list[str]:
    """The families that AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(kind: str) -> Any:
    """A tiny random model of one family, whose parameters are all generic. Raises what it likes."""
    import transformers

    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(tiny_config(kind))
    assert sum(parameter.numel() for parameter in whole.parameters()) < 500_000
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def try_family(kind: str) -> Tried:
    """Build a family and try its sites. Raises AssertionError where one is not what it says."""
    try:
        lm = wrap_model(build(kind), None, kind)
        residual = [resolve_site(lm, LAYER, site) for site in ("resid_pre", "resid_post")]
    except UserError as error:
        if "such as " in str(error):
            _follow_advice(lm, str(error))
        return Tried(refused=str(error))
    tried = Tried()
    points = list(residual)
    for site in INNER:
        try:
            points.append(resolve_site(lm, LAYER, site))
            tried.sites[site] = points[-1].module_path.removeprefix(f"{lm.blocks_path}.{LAYER}.")
        except UserError as error:
            tried.sites[site] = _reason(str(error))
    _check_sums(lm, points)
    _check_edit(lm, residual[1])
    try:
        prove_isolation(lm)
        tried.isolates = True
    except UserError as error:
        assert "does not work with" in str(error)
    return tried


def _reason(message: str) -> str:
    """Why a site was refused; the advice works, because resid_post was resolved."""
    assert "\n" not in message and "use resid_post, resid_pre or a module path" in message
    found = re.search(r" of \S+ \((.*)\): use ", message)
    return "none: " + (found[1] if found else "no module's output leads there")


def _follow_advice(lm: LanguageModel, message: str) -> None:
    path = message.partition("such as ")[2]
    point = resolve_site(lm, LAYER, path)
    values = run_to(lm, [point], input_ids=IDS)[point.key]
    assert values.shape == (*IDS.shape, lm.d_model)


def _check_sums(lm: LanguageModel, points: list[HookPoint]) -> None:
    with torch.inference_mode():
        with capture(points) as at:
            lm.text_model(input_ids=IDS, use_cache=False)
        stored = run_to(lm, points, input_ids=IDS)
    at = {site: values for (_, site), values in at.items()}
    assert all(values.shape == (*IDS.shape, lm.d_model) for values in at.values())
    assert all(torch.equal(stored[LAYER, site], values) for site, values in at.items())
    if {"attn_out", "resid_mid"} <= set(at):
        assert _off(at["resid_pre"] + at["attn_out"], at["resid_mid"], at["attn_out"]) < ALLOWED
    if {"mlp_out", "resid_mid"} <= set(at):
        assert _off(at["resid_mid"] + at["mlp_out"], at["resid_post"], at["mlp_out"]) < ALLOWED
    elif "mlp_out" in at:
        sum_ = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        assert _off(sum_, at["resid_post"], at["mlp_out"]) < ALLOWED


def _off(found: Tensor, expected: Tensor, added: Tensor) -> float:
    return float((found - expected).norm() / added.norm())


def _check_edit(lm: LanguageModel, point: HookPoint) -> None:
    """An edit reaches the next block as it is, and nothing before it."""
    step = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    below, above = resolve_site(lm, 0), lm.blocks[LAYER + 1 :]
    with torch.inference_mode():
        with capture([below, point]) as seen:
            before = lm.text_model(input_ids=IDS, use_cache=False)[0].clone()
        plain = dict(seen)
        with hooked(point, lambda h: h + step), capture([below, point]) as seen:
            after = lm.text_model(input_ids=IDS, use_cache=False)[0].clone()
    assert torch.equal(seen[below.key], plain[below.key])
    assert torch.equal(seen[point.key], plain[point.key] + step)
    assert len(above) and not torch.equal(before, after)


def written() -> str:
    """The tables of the page."""
    rows, refused, without = [], [], []
    for kind in causal_families():
        if kind in NOT_BUILT:
            without.append(f"| {kind} | {NOT_BUILT[kind][0]} |")
            continue
        tried = try_family(kind)
        (refused if tried.refused else rows).append(page_line(kind, tried))
    return "\n".join(
        [
            "| family | `attn_out` | `mlp_out` | `resid_mid` (input of) | isolates documents |",
            "| --- | --- | --- | --- | --- |", *rows, "",
            inspect.cleandoc(REFUSED), "", "| family | reason |", "| --- | --- |", *refused, "",
            inspect.cleandoc(WITHOUT), "", "| family | reason |", "| --- | --- |", *without, "",
        ]
    )  # fmt: skip


REFUSED = """
    ## Families that are refused

    Their blocks pass no one row of the model's width for each token, or nothing runs on text alone.
    Each is refused in one line before anything is read or written, with a module path inside the
    block that can be read instead, where there is one.
"""
WITHOUT = """
    ## Families that could not be built

    The slow test builds them too, and expects these errors.
"""


def page_line(kind: str, tried: Tried) -> str:
    """A family's row in one of the first two tables."""
    if tried.refused:
        return f"| {kind} | {_refusal(kind, tried.refused)} |"
    cells = [
        f"`{found}`" if not found.startswith("none: ") else _short(found.removeprefix("none: "))
        for found in (tried.sites[site] for site in INNER)
    ]
    return f"| {kind} | {' | '.join(cells)} | {'yes' if tried.isolates else 'no'} |"


def _short(reason: str) -> str:
    """A reason of `find_site` in a few words, as the page explains them."""
    for said, words in (
        ("run in parallel", "parallel"), ("has no batch dimension", "no batch dimension"),
        ("is multiplied by", "scaled"), ("goes into other modules", "set aside"),
        ("another attention", "two attentions"), (" after it", "more is added"),
    ):  # fmt: skip
        if said in reason:
            return words
    return "none"


def _refusal(kind: str, message: str) -> str:
    """What the message says, without the name of the made-up model."""
    message = re.sub(rf"\b(of )?{re.escape(kind)}( cannot)?\b", r"\2", message)
    message = message.partition("; give")[0].partition(": name their")[0]
    return " ".join(message.split()).replace(" :", ":").replace("|", "\\|")


def main() -> None:
    head = PAGE.read_text().partition("| family |")[0]
    PAGE.write_text(head + written())


if __name__ == "__main__":
    main()
