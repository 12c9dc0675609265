"""The export that Neuronpedia's bulk import takes.

A folder `MODEL/LAYER-SET/` with one JSON object a line in `release.jsonl`, `model.jsonl`,
`sourceset.jsonl` and `source.jsonl`, and gzipped batches in `features/`, `activations/` and
`explanations/`, with the fields of Neuronpedia's tables
(docs.neuronpedia.org/api-and-data/exports; the tables are those of its `neuronpedia-utils`).
"""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saesteer.checkpoints.durable import writing
from saesteer.checkpoints.errors import UsageError
from saesteer.sae.reading.card import LatentCard, short
from saesteer.sae.reading.describe import OFFLINE
from saesteer.sae.reading.result import Latents

BATCH = 1024
"""Latents in a file."""
_SITES = {"resid_post": "res", "resid_pre": "res", "resid_mid": "res-mid", "mlp_out": "mlp",
          "attn_out": "att"}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What the export calls things on Neuronpedia. Empty names are made from the SAE."""

    np_model: str = ""
    """Id of the model there, such as gemma-2-2b."""
    np_set: str = ""
    """Id of the source set, without the layer: such as gemmascope-res-16k."""
    np_creator: str = "unknown"
    """Who made the SAE."""

    def __post_init__(self) -> None:
        for name in ("np_model", "np_set"):
            value = getattr(self, name)
            if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
                raise UsageError(
                    f"`{name}` must be letters, digits, dots, dashes and underscores, got {value!r}"
                )


class NeuronpediaExport:
    """Takes cards, and writes the export batch by batch."""

    def __init__(self, folder: Path, found: Latents, names: Names) -> None:
        facts = found.facts
        self._found = found
        self._made = datetime.now(UTC).isoformat(timespec="seconds")
        width = facts["sae"]["d_sae"]
        size = f"{width // 1024}k" if width >= 1024 else str(width)
        site = _SITES.get(facts["site"], re.sub(r"[^A-Za-z0-9]+", "-", facts["site"]))
        self.model = names.np_model or _id(facts["model"]["name"])
        self.set = names.np_set or f"saesteer-{site}-{size}"
        self.source = f"{facts['layer']}-{self.set}"
        self.folder = folder / self.model / self.source
        self.folder.mkdir(parents=True, exist_ok=True)
        self._creator = _id(names.np_creator)
        self._batch = self._count = 0
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._clear()
        self._write_head(names)

    def add(self, card: LatentCard, row: Mapping[str, Any]) -> None:
        """Add a latent; `row` is `card.row()`."""
        self._rows["features"].append(self._feature(card))
        contexts = [(context, None) for context in row["top"]]
        contexts += [(one, part) for part in row["quantiles"] for one in part["contexts"]]
        share = 1 / max(1, len(row["quantiles"]))
        for context, part in contexts:
            self._rows["activations"].append(self._activation(card.id, context, part, share))
        for one in card.descriptions:
            if one.by != OFFLINE:
                self._rows["explanations"].append(
                    {
                        **self._about(card.id),
                        "id": self._number(),
                        "description": one.text,
                        "authorId": self._creator,
                        "embedding": None,
                        "triggeredById": None,
                        "typeName": None,
                        "explanationModelName": one.by,
                        "notes": _score(one.detection),
                        "createdAt": self._made,
                    }
                )
        if len(self._rows["features"]) == BATCH:
            self._flush()

    def close(self) -> None:
        """Write the last batch."""
        if self._rows["features"]:
            self._flush()

    def _clear(self) -> None:
        self._rows = {"features": [], "activations": [], "explanations": []}

    def _flush(self) -> None:
        for name, rows in self._rows.items():
            if rows:
                path = self.folder / name / f"batch-{self._batch}.jsonl.gz"
                path.parent.mkdir(exist_ok=True)
                with writing(path):
                    # No time in the header: the same rows are the same bytes.
                    path.write_bytes(gzip.compress(_lines(rows), compresslevel=5, mtime=0))
        self._batch += 1
        self._clear()

    def _number(self) -> str:
        """An id of 25 characters that no other row of this export has."""
        self._count += 1
        stamp = int(datetime.fromisoformat(self._made).timestamp())
        return f"c{stamp:010x}{self._count:014x}"

    def _about(self, latent: int) -> dict[str, Any]:
        return {"modelId": self.model, "layer": self.source, "index": str(latent)}

    def _feature(self, card: LatentCard) -> dict[str, Any]:
        found, strongest = self._found, max(card.max, 0.0)
        vector = found.direction(card.id).tolist()
        return {
            **self._about(card.id),
            "creatorId": self._creator,
            "createdAt": self._made,
            "maxActApprox": short(strongest),
            "hasVector": True,
            "vector": [float(f"{value:.6g}") for value in vector],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": short(strongest),
            "hookName": found.facts["hook_name"],
            "topkCosSimIndices": [one.id for one in card.near],
            "topkCosSimValues": [short(one.value) for one in card.near],
            "neuron_alignment_indices": [],
            "neuron_alignment_values": [],
            "neuron_alignment_l1": [],
            "correlated_neurons_indices": [],
            "correlated_neurons_pearson": [],
            "correlated_neurons_l1": [],
            "correlated_features_indices": [],
            "correlated_features_pearson": [],
            "correlated_features_l1": [],
            "neg_str": [one.token for one in card.lens_down],
            "neg_values": [short(one.logit) for one in card.lens_down],
            "pos_str": [one.token for one in card.lens_up],
            "pos_values": [short(one.logit) for one in card.lens_up],
            "frac_nonzero": card.density,
            # Two lists of the same length: the middle of each bin, and its firings.
            "freq_hist_data_bar_heights": [count for _, _, count in card.histogram],
            "freq_hist_data_bar_values": [
                short((low * high) ** 0.5) for low, high, _ in card.histogram
            ],
            "logits_hist_data_bar_heights": [],
            "logits_hist_data_bar_values": [],
            "decoder_weights_dist": [],
            "sourceSetName": self.set,
        }

    def _activation(
        self,
        latent: int,
        context: Mapping[str, Any],
        part: Mapping[str, Any] | None,
        share: float,
    ) -> dict[str, Any]:
        values = context["acts"]
        most = max(values)
        return {
            **self._about(latent),
            "id": self._number(),
            "tokens": context["tokens"],
            "maxValue": most,
            "maxValueTokenIndex": values.index(most),
            "minValue": min(values),
            "values": values,
            "creatorId": self._creator,
            "createdAt": self._made,
            "dataSource": None,
            "dataIndex": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            # The strongest contexts have -1, as in SAEDashboard's files.
            "binMin": -1 if part is None else part["low"],
            "binMax": -1 if part is None else part["high"],
            "binContains": -1 if part is None else share,
            "qualifyingTokenIndex": context["index"],
        }

    def _write_head(self, names: Names) -> None:
        facts, made, who = self._found.facts, self._made, self._creator
        name = names.np_creator
        common = {"creatorId": who, "createdAt": made, "visibility": "PUBLIC"}
        title = f"SAE of {facts['model']['name']}, {facts['hook_name']}"
        heads: dict[str, dict[str, Any]] = {
            "release": {
                **common,
                "name": self.set,
                "description": title,
                "descriptionShort": title,
                "creatorName": name,
                "creatorNameShort": name,
                "creatorEmail": None,
                "urls": [],
                "isNewUi": False,
                "featured": False,
                "defaultSourceSetName": self.set,
                "defaultSourceId": self.source,
                "defaultUmapSourceIds": [],
            },
            "model": {
                **common,
                "id": self.model,
                "instruct": bool(re.search(r"(?i)instruct|chat|-it\b", self.model)),
                "displayNameShort": self.model,
                "displayName": self.model,
                "tlensId": None,
                "dimension": facts["model"]["d_model"],
                "defaultSourceSetName": self.set,
                "defaultSourceId": self.source,
                "inferenceEnabled": False,
                "layers": facts["model"]["n_layers"],
                "neuronsPerLayer": 0,
                "owner": "",
                "updatedAt": made,
                "website": None,
            },
            "sourceset": {
                **common,
                "modelId": self.model,
                "name": self.set,
                "hasDashboards": True,
                "description": f"{facts['site']}, {facts['sae']['d_sae']:,} latents",
                "type": facts["sae"]["architecture"],
                "creatorName": name,
                "creatorEmail": None,
                "urls": [],
                "releaseName": self.set,
                "defaultOfModelId": None,
                "defaultRange": 1,
                "defaultShowBreaks": True,
                "showDfa": False,
                "showCorrelated": False,
                "showHeadAttribution": False,
                "showUmap": False,
            },
            "source": {
                **common,
                "id": self.source,
                "modelId": self.model,
                "setName": self.set,
                "hasDashboards": True,
                "inferenceEnabled": False,
                "inferenceHosts": [],
                "saelensConfig": None,
                "saelensRelease": None,
                "saelensSaeId": None,
                "hfRepoId": None,
                "hfFolderId": None,
                "defaultOfModelId": None,
                "hasUmap": False,
                "hasUmapLogSparsity": False,
                "hasUmapClusters": False,
                "num_prompts": facts["contexts"],
                "num_tokens_in_prompt": facts["context"],
                "dataset": ",".join(self._found.config.text.data),
                "notes": None,
            },
        }
        for kind, row in heads.items():
            path = self.folder / f"{kind}.jsonl"
            with writing(path):
                path.write_bytes(_lines([row]))


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _id(name: str) -> str:
    """A name as Neuronpedia's ids are: the last part of a path, of letters, digits and dashes."""
    last = name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.").lower() or "unknown"


def _score(judged: Any) -> str | None:
    if judged is None or judged.score is None:
        return None
    return f"detection (balanced accuracy on held-out windows): {judged.score:.3f}"
