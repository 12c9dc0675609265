"""Writes activation shards; after a kill at any moment, no token is lost or repeated."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import NonFiniteError, UsageError
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.shards import MANIFEST, SCHEMA_VERSION, ShardReader, folder_name

_SHARD = re.compile(r"shard-(\d+)\.safetensors")


Part = tuple[int, int]
"""(r, n): the r-th of n processes that write to one folder."""


def part_manifest(part: Part) -> str:
    """The name of a part's manifest; a single part has the folder's own manifest."""
    rank, world = part
    return MANIFEST if world == 1 else f"manifest-part-{rank:04d}-of-{world:04d}.json"


def merge_parts(folder: str | Path, world: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write the one manifest of a folder that `world` processes have completed, and return it.

    `extra` is added to it. The parts' own manifests and the half-written files of killed
    processes are deleted, so none of the processes may still be writing.
    """
    folder = Path(folder)
    paths = [folder / part_manifest((rank, world)) for rank in range(world)]
    parts = [files.read_json(path) for path in paths]
    dropped = ("part", "history", "cursor")
    entries = [entry for part in parts for entry in part["shards"]]
    manifest = {
        **{name: value for name, value in parts[0].items() if name not in dropped},
        "tokens": sum(part["tokens"] for part in parts),
        "shards": entries,
        **files.plain(extra),
        "processes": world,
        "complete": True,
    }
    files.write_json(folder / MANIFEST, manifest)
    for path in paths:
        path.unlink(missing_ok=True)
    for below in {folder, *((folder / entry["file"]).parent for entry in entries)}:
        files.remove_leftovers(below)
    return manifest


@dataclass(frozen=True, eq=False)
class Rows:
    """Checked rows of every (layer, site), on the CPU and in the stored dtype."""

    tokens: int
    activations: dict[Place, Float[Tensor, "tokens d_model"]]
    columns: dict[str, Int[Tensor, " tokens"]]


class ShardWriter:
    """Writes activations of one or more layers as shards of about `shard_tokens` tokens.

    A shard holds whole `add` calls, so it can be a little longer than asked for. Its files are
    written when it is full, and the manifest after them.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Sequence[int],
        sites: Sequence[str],
        d_model: int,
        dtype: torch.dtype,
        shard_tokens: int = 65536,
        facts: Mapping[str, Any],
        shuffle_seed: int | None = None,
        part: Part = (0, 1),
    ) -> None:
        """Start an empty set of shards in `folder` (made if missing).

        `layers` are 0-based blocks; every layer is stored at every site. `dtype` is the float dtype
        on disk. `facts` goes into the manifest as it is and must name the `model`. With
        `shuffle_seed` the rows of each shard are written in a random order, drawn from the seed and
        the shard's number. `part` is (r, n) for the r-th of n processes that write to one folder:
        each has a manifest of its own until `merge_parts`.
        """
        if not layers or not sites or d_model < 1 or shard_tokens < 1:
            raise UsageError(
                f"shards need a layer, a site, and positive d_model and shard_tokens; got "
                f"{list(layers)}, {list(sites)}, {d_model}, {shard_tokens}"
            )
        if not dtype.is_floating_point:
            raise UsageError(f"`store_dtype` must be a float type, got {dtype}")
        if "model" not in facts:
            raise ValueError("facts must name the model")
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = {
            **facts,
            "schema_version": SCHEMA_VERSION,
            "layers": [int(layer) for layer in layers],
            "sites": [str(site) for site in sites],
            "d_model": int(d_model),
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": 0,
            "shards": [],
            "complete": False,
            "shard_tokens": int(shard_tokens),
            "shuffle_seed": shuffle_seed,
            "cursor": {},
        }
        self._part = part
        if part[1] > 1:
            self.manifest |= {"part": list(part), "history": []}
        self._start_buffers()
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in self.places:
            (self.folder / folder_name(*place)).mkdir(exist_ok=True)
        files.write_json(self._manifest_path, self.manifest)

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        *,
        part: Part = (0, 1),
    ) -> tuple["ShardWriter", dict[str, Any]]:
        """Continue the shards in `folder`: a writer, and the cursor just after its last token.

        Files that the manifest does not list (of a shard that a kill cut short) are deleted. The
        cursor is `{}` when no shard was finished.

        Raises:
            UserError: no manifest, or a listed file is missing or cut short.
        """
        reader = ShardReader(folder, flag="`out`", allow_empty=True, manifest=part_manifest(part))
        manifest = reader.manifest
        writer = cls.__new__(cls)
        writer.folder = Path(folder)
        writer.manifest = {"complete": False, "shard_tokens": 65536, "cursor": {}, **manifest}
        writer._part = part
        writer._start_buffers()
        writer._remove_unlisted()
        return writer, dict(writer.manifest["cursor"] or {})

    def _remove_unlisted(self) -> None:
        """Delete this part's files that the manifest does not list."""
        listed = {entry["file"] for entry in self.manifest["shards"]}
        rank, world = self._part
        if world == 1:
            files.remove_leftovers(self.folder)
        for place in self.places:
            below = self.folder / folder_name(*place)
            below.mkdir(exist_ok=True)
            if world == 1:  # otherwise another process may be writing them
                files.remove_leftovers(below)
            for path in below.iterdir():
                match = _SHARD.fullmatch(path.name)
                own = match and int(match[1]) % world == rank
                if own and f"{below.name}/{path.name}" not in listed:
                    path.unlink()

    def rounds(self, key: str) -> list[int]:
        """The values of `key` in the cursors at which this part was saved, 0 for the start."""
        return [0, *(int(past["cursor"][key]) for past in self.manifest["history"])]

    def go_back(self, key: str, value: int) -> dict[str, Any]:
        """Drop what was saved after the cursor in which `key` has `value`; returns that cursor.

        The processes of one harvest are killed at different moments: all go back to a cursor that
        each of them has saved.
        """
        kept = [past for past in self.manifest["history"] if past["cursor"][key] <= value]
        last: dict[str, Any] = kept[-1] if kept else {"shards": 0, "tokens": 0, "cursor": {}}
        self.manifest = {
            **self.manifest,
            "history": kept,
            "shards": self.manifest["shards"][: last["shards"]],
            "tokens": last["tokens"],
            "cursor": last["cursor"],
            "complete": False,
        }
        files.write_json(self._manifest_path, self.manifest)
        self._start_buffers()
        self._remove_unlisted()
        return dict(last["cursor"])

    @property
    def _manifest_path(self) -> Path:
        return self.folder / part_manifest(self._part)

    @property
    def places(self) -> list[Place]:
        """Every (layer, site) that each call of `add` must bring."""
        return [(layer, s) for layer in self.manifest["layers"] for s in self.manifest["sites"]]

    @property
    def tokens(self) -> int:
        """Tokens added so far, those not yet on disk included."""
        return int(self.manifest["tokens"]) + self._buffered

    def add(
        self,
        acts: Mapping[Place, Float[Tensor, "tokens d_model"]],
        token_ids: Int[Tensor, " tokens"],
        cursor: Mapping[str, Any] | None = None,
        extra: Mapping[str, Int[Tensor, " tokens"]] | None = None,
    ) -> None:
        """Add the activations of some tokens, for every (layer, site); a copy is taken.

        `cursor` is what the caller needs to continue just after these tokens (JSON values only).
        `extra` are further integers about each token; every call must bring the same names.

        Raises:
            NonFiniteError: a value is NaN or infinite in the stored dtype.
            UserError: the disk is full; the tokens stay in memory and the manifest stays true.
        """
        self.append(self.rows(acts, token_ids, extra, copy=True), cursor)

    def rows(
        self,
        acts: Mapping[Place, Float[Tensor, "tokens d_model"]],
        token_ids: Int[Tensor, " tokens"],
        extra: Mapping[str, Int[Tensor, " tokens"]] | None = None,
        *,
        copy: bool,
    ) -> Rows:
        """The first half of `add`: checks, and tensors as they are stored.

        Without `copy` they may be those that were given, which then must not change any more.
        """
        tokens, d_model = len(token_ids), self.manifest["d_model"]
        if set(acts) != set(self.places):
            raise ValueError(f"activations are for {sorted(acts)}, shards want {self.places}")
        activations = {}
        for place in self.places:
            if tuple(acts[place].shape) != (tokens, d_model):
                raise ValueError(
                    f"activations of {place} have shape {list(acts[place].shape)}, expected "
                    f"{[tokens, d_model]}"
                )
            # Page-locked memory is scarce: rows that wait for a shard to fill are copied out of it.
            own = copy or acts[place].is_pinned()
            row = acts[place].detach().to(device="cpu", dtype=self._dtype, copy=own)
            # If any value is NaN or infinite, so is an extreme; this needs no mask of all values.
            if tokens and not bool(torch.isfinite(torch.stack(torch.aminmax(row))).all()):
                raise NonFiniteError(
                    f"layer {place[0]} {place[1]} has activations that are NaN or infinite in "
                    f"{self.manifest['dtype']}: use `store_dtype` bfloat16 or float32, or another "
                    "`dtype` for the model"
                )
            activations[place] = row
        columns = {"token_ids": token_ids.to(torch.int32), **(extra or {})}
        return Rows(
            tokens,
            activations,
            {name: column.detach().to("cpu", copy=copy) for name, column in columns.items()},
        )

    def append(self, rows: Rows, cursor: Mapping[str, Any] | None = None) -> None:
        """The second half of `add`: buffers the rows, and writes a shard when it is full."""
        for place, activations in rows.activations.items():
            self._rows[place].append(activations)
        for name, column in rows.columns.items():
            self._columns.setdefault(name, []).append(column)
        self._buffered += rows.tokens
        self._move(cursor)
        if self._buffered >= self.manifest["shard_tokens"]:
            self._flush()

    def checkpoint(self, cursor: Mapping[str, Any] | None = None) -> None:
        """Write what is in memory now, as a short shard, so that a stop loses nothing.

        `cursor` replaces the one that came with the last `add`.
        """
        self._move(cursor)
        self._flush()

    def close(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write the rest, add `extra` to the manifest and mark it complete."""
        self._flush(extra={**(extra or {}), "complete": True})

    def _start_buffers(self) -> None:
        self._dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        self._rows: dict[Place, list[Tensor]] = {place: [] for place in self.places}
        self._columns: dict[str, list[Tensor]] = {}
        self._buffered = 0
        self._cursor: Any = self.manifest["cursor"] or {}

    def _move(self, cursor: Mapping[str, Any] | None) -> None:
        if cursor is not None:
            self._cursor = files.plain(cursor)

    def _flush(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write the buffered tokens, then the manifest; a failure leaves neither changed."""
        entries = []
        number = self._next_number()
        try:
            if self._buffered:
                order = self._order(number)
                columns = {name: _ordered(parts, order) for name, parts in self._columns.items()}
                for place, rows in self._rows.items():
                    name = f"{folder_name(*place)}/shard-{number:05d}.safetensors"
                    entries.append({"file": name, "tokens": self._buffered, "sha256": ""})
                    tensors = {"activations": _ordered(rows, order), **columns}
                    entries[-1]["sha256"] = files.write_tensors(
                        self.folder / name, tensors, cached=False
                    )
            manifest = {
                **self.manifest,
                "complete": False,
                **files.plain(extra or {}),
                "tokens": self.manifest["tokens"] + self._buffered,
                "shards": [*self.manifest["shards"], *entries],
                "cursor": self._cursor,
            }
            if "history" in manifest:
                here = {name: manifest[name] for name in ("tokens", "cursor")}
                past = [*manifest["history"], {**here, "shards": len(manifest["shards"])}]
                manifest["history"] = past
            files.write_json(self._manifest_path, manifest)
        except BaseException:
            # Ctrl-C may come just after the manifest was replaced: then its files must stay.
            if entries and files.read_json(self._manifest_path)["shards"][-1:] == entries[-1:]:
                self._take(manifest)
            else:
                for entry in entries:
                    (self.folder / str(entry["file"])).unlink(missing_ok=True)
            raise
        self._take(manifest)

    def _next_number(self) -> int:
        """The number of the next shard; parts take turns, so that no two write one file."""
        rank, world = self._part
        number = rank
        for entry in self.manifest["shards"]:
            match = _SHARD.fullmatch(PurePosixPath(entry["file"]).name)
            number = max(number, int(match.group(1)) + world if match else rank)
        return number

    def _order(self, number: int) -> Int[Tensor, " tokens"] | None:
        """The order in which a shard's rows are written; None leaves them as they came."""
        seed = self.manifest.get("shuffle_seed")
        if seed is None:
            return None
        return torch.from_numpy(np.random.default_rng([seed, number]).permutation(self._buffered))

    def _take(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._start_buffers()


def _ordered(parts: list[Tensor], order: Int[Tensor, " tokens"] | None) -> list[Tensor]:
    """Pieces as they came, or joined and put into another order."""
    return parts if order is None else [torch.cat(parts)[order]]
