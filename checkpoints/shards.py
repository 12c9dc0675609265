"""Activation shards: a folder of safetensors files with a manifest that is always true.

`DIR/layer-20/shard-00000.safetensors` (`layer-20-attn_out/` for a site other than resid_post) holds
`activations [tokens, d_model]` and `token_ids [tokens]` int32. `DIR/manifest.json` lists only files
that are whole, together with the caller's cursor (its place in the corpus) just after their last
token: a killed harvest goes on from there, and no token is lost or written twice.
"""

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import NonFiniteError, UsageError, UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
REQUIRED_KEYS = (
    "schema_version", "model", "layers", "sites", "d_model", "dtype", "tokens", "shards"
)  # fmt: skip

Place = tuple[int, str]
"""A layer (0-based block) and a site, such as (20, "resid_post")."""

# What each stored dtype is read as: torch computes nothing in float8, and bfloat16 holds all of it.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,
    "F8_E5M2": torch.bfloat16,
}
_INTS = {"I64", "I32", "I16", "U16", "U32"}
_SHARD = re.compile(r"shard-(\d+)\.safetensors")
_ODD = re.compile(r"[^\w.-]")

_log = logging.getLogger(__name__)


def folder_name(layer: int, site: str = "resid_post") -> str:
    """The sub-folder of a layer's shards: "layer-20", or "layer-20-attn_out" for another site."""
    return f"layer-{layer}" + ("" if site == "resid_post" else f"-{_ODD.sub('_', site)}")


class ShardWriter:
    """Writes activations of one or more layers as shards of about `shard_tokens` tokens.

    Only whole `add` calls go into a shard, so shards can be a little longer than asked for.
    Nothing is written until a shard is full; then its files appear and the manifest follows.
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
    ) -> None:
        """Start an empty set of shards in `folder` (made if missing).

        `layers` are 0-based blocks; every layer is stored at every site. `dtype` is the float dtype
        on disk. `facts` goes into the manifest as it is and must name the `model`.
        """
        if not layers or not sites or d_model < 1 or shard_tokens < 1:
            raise UsageError(
                f"shards need a layer, a site, and positive d_model and shard_tokens; got "
                f"{list(layers)}, {list(sites)}, {d_model}, {shard_tokens}"
            )
        if not dtype.is_floating_point:
            raise UsageError(f"--store-dtype must be a float type, got {dtype}")
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
            "cursor": {},
        }
        self._start_buffers()
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in self.places:
            (self.folder / folder_name(*place)).mkdir(exist_ok=True)
        files.write_json(self.folder / MANIFEST, self.manifest)

    @classmethod
    def resume(
        cls, folder: str | Path, *, expect: Mapping[str, Any] | None = None
    ) -> tuple["ShardWriter", dict[str, Any]]:
        """Go on with the shards in `folder`: a writer, and the cursor just after its last token.

        Files that the manifest does not list (of a shard that a kill cut short) are deleted. The
        cursor is `{}` when no shard was finished. `expect` maps manifest keys to the values that
        this run would write.

        Raises:
            UserError: no manifest, a listed file is missing or cut short, or `expect` differs.
        """
        reader = ShardReader(folder, flag="--out", allow_empty=True)
        manifest = reader.manifest
        for key, value in (expect or {}).items():
            if manifest.get(key) != files.plain(value):
                raise UserError(
                    f"--resume: the shards in {folder} were made with {key} {manifest.get(key)!r}, "
                    f"this run has {files.plain(value)!r}; use the same settings, or --force to "
                    "start again"
                )
        writer = cls.__new__(cls)
        writer.folder = Path(folder)
        writer.manifest = {"complete": False, "shard_tokens": 65536, "cursor": {}, **manifest}
        writer._start_buffers()
        listed = {entry["file"] for entry in manifest["shards"]}
        files.remove_leftovers(writer.folder)
        for place in writer.places:
            below = writer.folder / folder_name(*place)
            below.mkdir(exist_ok=True)
            files.remove_leftovers(below)
            for path in below.iterdir():
                if _SHARD.fullmatch(path.name) and f"{below.name}/{path.name}" not in listed:
                    path.unlink()
        return writer, dict(writer.manifest["cursor"] or {})

    @property
    def places(self) -> list[Place]:
        """Every (layer, site) that `add` wants."""
        return [(layer, s) for layer in self.manifest["layers"] for s in self.manifest["sites"]]

    @property
    def tokens(self) -> int:
        """Tokens added so far, those not yet on disk included."""
        return int(self.manifest["tokens"]) + self._buffered

    @property
    def tokens_saved(self) -> int:
        """Tokens in finished shards."""
        return int(self.manifest["tokens"])

    @property
    def complete(self) -> bool:
        """Whether `close` was called on these shards (before a resume, perhaps)."""
        return bool(self.manifest["complete"])

    def add(
        self,
        acts: Mapping[Place, Float[Tensor, "tokens d_model"]],
        token_ids: Int[Tensor, " tokens"],
        cursor: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the activations of some tokens, for every (layer, site); a copy is taken.

        `cursor` is whatever the caller needs to go on just after these tokens (JSON values only).

        Raises:
            NonFiniteError: a value is NaN or infinite in the stored dtype.
            UserError: the disk is full; the tokens stay in memory and the manifest stays true.
        """
        tokens, d_model = len(token_ids), self.manifest["d_model"]
        if set(acts) != set(self.places):
            raise ValueError(f"activations are for {sorted(acts)}, shards want {self.places}")
        rows = {}
        for place in self.places:
            if tuple(acts[place].shape) != (tokens, d_model):
                raise ValueError(
                    f"activations of {place} have shape {list(acts[place].shape)}, expected "
                    f"{[tokens, d_model]}"
                )
            row = acts[place].detach().to(device="cpu", dtype=self._dtype, copy=True)
            if not bool(torch.isfinite(row).all()):
                raise NonFiniteError(
                    f"layer {place[0]} {place[1]} has activations that are NaN or infinite in "
                    f"{self.manifest['dtype']}: use --store-dtype bfloat16 or float32, or another "
                    "--dtype for the model"
                )
            rows[place] = row
        for place, row in rows.items():
            self._rows[place].append(row)
        self._token_ids.append(token_ids.detach().to(device="cpu", dtype=torch.int32, copy=True))
        self._buffered += tokens
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
        self._token_ids: list[Tensor] = []
        self._buffered = 0
        self._cursor: Any = self.manifest["cursor"] or {}

    def _move(self, cursor: Mapping[str, Any] | None) -> None:
        if cursor is not None:
            self._cursor = files.plain(cursor)

    def _flush(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write the buffered tokens and then the manifest; on failure leave no trace of them."""
        entries = []
        number = 0
        for entry in self.manifest["shards"]:
            found = _SHARD.fullmatch(PurePosixPath(entry["file"]).name)
            number = max(number, int(found.group(1)) + 1 if found else 0)
        try:
            if self._buffered:
                token_ids = torch.cat(self._token_ids)
                for place, rows in self._rows.items():
                    name = f"{folder_name(*place)}/shard-{number:05d}.safetensors"
                    entries.append({"file": name, "tokens": self._buffered, "sha256": ""})
                    tensors = {"activations": torch.cat(rows), "token_ids": token_ids}
                    files.write_tensors(self.folder / name, tensors)
                    entries[-1]["sha256"] = files.sha256_file(self.folder / name)
            manifest = {
                **self.manifest,
                "complete": False,
                **files.plain(extra or {}),
                "tokens": self.manifest["tokens"] + self._buffered,
                "shards": [*self.manifest["shards"], *entries],
                "cursor": self._cursor,
            }
            files.write_json(self.folder / MANIFEST, manifest)
        except BaseException:
            # Ctrl-C may come just after the manifest was replaced: then its files must stay.
            if entries and files.read_json(self.folder / MANIFEST)["shards"][-1:] == entries[-1:]:
                self._take(manifest)
            else:
                for entry in entries:
                    (self.folder / str(entry["file"])).unlink(missing_ok=True)
            raise
        self._take(manifest)

    def _take(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._start_buffers()


class ShardReader:
    """Activation shards, read lazily: opening checks every header, and loads nothing.

    Any float dtype is accepted. Tensors that `shard` returns are mapped from the file, so that
    picking random rows reads only those rows' pages; only where `dtype` is not the file's (float8
    is read as bfloat16) are they copies. A file's SHA-256 is compared with the manifest's, where
    that has one, when the file is first read.
    """

    def __init__(
        self, folder: str | Path, *, flag: str = "--activations", allow_empty: bool = False
    ) -> None:
        """Open and check the shards in `folder`; `flag` is what errors call it.

        Raises:
            UserError: no manifest, keys missing, a file missing, cut short or of another shape, no
                tokens (unless `allow_empty`).
        """
        self.folder = Path(folder)
        self._what = f"{flag} {folder}"
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"{self._what} holds no {MANIFEST}: give a folder made by harvest")
        self.manifest: dict[str, Any] = self._checked_manifest()
        self.layers: list[int] = self.manifest["layers"]
        self.sites: list[str] = self.manifest["sites"]
        self.d_model: int = self.manifest["d_model"]
        self.tokens: int = self.manifest["tokens"]
        """Tokens per layer and site."""
        self._files: dict[Place, list[Path]] = {place: [] for place in self.places}
        self._sha256: dict[Path, str] = {}
        self._verified: set[Path] = set()
        self.dtype: torch.dtype = torch.float32
        """Of the activations that `shard` and `rows` return, whatever the files hold."""
        self.shard_tokens: list[int] = []
        """Tokens of each shard, in order."""
        self._read_entries()
        if not self.tokens and not allow_empty:
            raise UserError(f"{self._what} holds no tokens: finish the harvest (--resume)")

    @property
    def places(self) -> list[Place]:
        """Every (layer, site) stored."""
        return [(layer, site) for layer in self.layers for site in self.sites]

    @property
    def complete(self) -> bool:
        """False when the harvest was stopped before its end."""
        return bool(self.manifest.get("complete", True))

    def __len__(self) -> int:
        """How many shards each layer and site has."""
        return len(self.shard_tokens)

    def place(self, layer: int | None = None, site: str | None = None) -> Place:
        """The one stored (layer, site) that fits; either may be left out when it is the only one.

        Raises:
            UserError: none fits, or several do.
        """
        fitting = [
            (at, where)
            for at, where in self.places
            if layer in (None, at) and site in (None, where)
        ]
        if len(fitting) != 1:
            problem = "has several" if fitting else "does not have the asked"
            raise UserError(
                f"{self._what} {problem} layer and site (layers {self.layers}, sites {self.sites}; "
                f"asked: --layer {layer}, --site {site}): give --layer and --site from these"
            )
        return fitting[0]

    def folder_for(self, layer: int | None = None, site: str | None = None) -> Path:
        """The folder with the shards of a layer and site."""
        return self.folder / folder_name(*self.place(layer, site))

    def shard(
        self, index: int, layer: int | None = None, site: str | None = None
    ) -> tuple[Float[Tensor, "tokens d_model"], Int[Tensor, " tokens"]]:
        """Activations and token ids of shard `index`, mapped from the file: never write to them.

        Raises:
            UserError: the file is damaged, or is not the one that the manifest lists.
        """
        from safetensors import safe_open

        path = self._files[self.place(layer, site)][index]
        if path not in self._verified:
            self._verify(path)
        with files.reading_tensors(path), safe_open(str(path), framework="pt") as file:
            return file.get_tensor("activations").to(self.dtype), file.get_tensor("token_ids")

    def iter_shards(
        self,
        order: Sequence[int] | None = None,
        layer: int | None = None,
        site: str | None = None,
    ) -> Iterator[tuple[int, Float[Tensor, "tokens d_model"], Int[Tensor, " tokens"]]]:
        """`(index, activations, token_ids)` of each shard, in `order` (default: as written)."""
        for index in range(len(self)) if order is None else order:
            yield (index, *self.shard(index, layer, site))

    def rows(
        self,
        indices: Int[Tensor, " rows"],
        layer: int | None = None,
        site: str | None = None,
    ) -> Float[Tensor, "rows d_model"]:
        """Activations of any tokens, numbered from 0 across all shards, in the order asked."""
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < self.tokens):
            raise IndexError(f"rows must be in 0..{self.tokens - 1}")
        bounds = torch.tensor([0, *self.shard_tokens]).cumsum(0)
        shard_of = torch.bucketize(indices, bounds[1:], right=True)
        picked: Tensor | None = None
        for index in shard_of.unique().tolist():
            chosen = (shard_of == index).nonzero().squeeze(1)
            rows = self.shard(index, layer, site)[0][indices[chosen] - bounds[index]]
            if picked is None:
                picked = rows.new_empty(len(indices), self.d_model)
            picked[chosen] = rows
        if picked is None:
            return torch.empty(0, self.d_model, dtype=self.dtype)
        return picked

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest's; `UserError` if one differs."""
        for path in self._sha256:
            self._verify(path)

    def _verify(self, path: Path) -> None:
        listed = self._sha256[path]
        if listed and files.sha256_file(path) != listed:
            raise UserError(
                f"{self._what}: {path} is not the file that the manifest lists (its SHA-256 "
                "differs); copy it again, or harvest again"
            )
        self._verified.add(path)

    def _checked_manifest(self) -> dict[str, Any]:
        manifest = files.read_json(self.folder / MANIFEST)
        if not isinstance(manifest, dict):
            raise UserError(f"{self._what}: {MANIFEST} is not a JSON object; restore it")
        absent = [key for key in REQUIRED_KEYS if key not in manifest]
        if absent:
            raise UserError(
                f"{self._what}: {MANIFEST} lacks {', '.join(absent)}; give a folder made by harvest"
            )
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{self._what}: {MANIFEST} has schema_version {manifest['schema_version']!r}; this "
                f"saesteer reads {SCHEMA_VERSION}: use another version of saesteer or harvest again"
            )
        numbers = [manifest["d_model"], manifest["tokens"], *_list(manifest["layers"])]
        texts = _list(manifest["sites"])
        if (
            not all(isinstance(number, int) for number in numbers)
            or not all(isinstance(text, str) for text in texts)
            or not _list(manifest["layers"])
            or not texts
            or not isinstance(manifest["shards"], list)
        ):
            raise UserError(
                f"{self._what}: {MANIFEST} has layers, sites, d_model, tokens or shards of the "
                "wrong type; restore it or harvest again"
            )
        return manifest

    def _read_entries(self) -> None:
        """Match the manifest's files to layers, and check each file's header."""
        lengths: dict[Place, list[int]] = {place: [] for place in self.places}
        dtypes: set[torch.dtype] = set()
        for entry in self.manifest["shards"]:
            tokens = entry.get("tokens") if isinstance(entry, dict) else None
            if type(tokens) is not int or "file" not in entry:
                raise UserError(
                    f"{self._what}: an entry of shards lacks file or tokens; harvest again"
                )
            for place, path in self._places_of(str(entry["file"])):
                dtypes.add(_FLOATS[self._check_file(path, entry["tokens"])])
                self._files[place].append(path)
                lengths[place].append(entry["tokens"])
                self._sha256[path] = str(entry.get("sha256") or "")
        if dtypes:
            self.dtype = functools.reduce(torch.promote_types, dtypes)
        self.shard_tokens = lengths[self.places[0]]
        for place, found in lengths.items():
            if sum(found) != self.tokens or found != self.shard_tokens:
                raise UserError(
                    f"{self._what}: the shards of {folder_name(*place)} hold {sum(found)} tokens, "
                    f"the manifest says {self.tokens}; restore {MANIFEST} or harvest again"
                )

    def _places_of(self, name: str) -> list[tuple[Place, Path]]:
        """Layers and paths that a listed name means; a bare name means one file in every folder."""
        listed = PurePosixPath(name)
        if listed.is_absolute() or ".." in listed.parts or len(listed.parts) > 2 or "\\" in name:
            raise UserError(
                f"{self._what}: {MANIFEST} names {name!r}, which is not layer-N/shard-NNNNN."
                "safetensors; harvest again"
            )
        folders = {folder_name(*place): place for place in self.places}
        if len(listed.parts) == 1:
            return [(place, self.folder / folder / name) for folder, place in folders.items()]
        if listed.parts[0] not in folders:
            raise UserError(
                f"{self._what}: {MANIFEST} names {name!r}, but its layers and sites are only "
                f"{', '.join(folders)}; restore it or harvest again"
            )
        return [(folders[listed.parts[0]], self.folder / listed)]

    def _check_file(self, path: Path, tokens: int) -> str:
        """Check a file's header; returns the dtype of its activations, in safetensors' words."""
        if not path.is_file() or path.is_symlink():
            raise UserError(
                f"{self._what}: {path.relative_to(self.folder)} is listed but missing (or a link); "
                "copy it again, or harvest again"
            )
        try:
            header = files.read_header(path)["tensors"]
        except UserError as error:
            raise UserError(f"{self._what}: {error}") from error
        activations, token_ids = header.get("activations"), header.get("token_ids")
        if (
            not activations
            or not token_ids
            or activations["shape"] != [tokens, self.d_model]
            or token_ids["shape"] != [tokens]
            or activations["dtype"] not in _FLOATS
            or token_ids["dtype"] not in _INTS
        ):
            found = {name: (item["dtype"], item["shape"]) for name, item in header.items()}
            raise UserError(
                f"{self._what}: {path.relative_to(self.folder)} must hold activations "
                f"{[tokens, self.d_model]} of a float type and token_ids {[tokens]} of an integer "
                f"type, got {found}; harvest again"
            )
        return str(activations["dtype"])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
