"""Activation shards: a folder of safetensors files with a manifest that always matches them.

`DIR/layer-20/shard-00000.safetensors` (`layer-20-attn_out/` for a site other than resid_post) holds
`activations [tokens, d_model]` and `token_ids [tokens]` int32 and, on request, the `positions`
(int32) and `contexts` (int64) of each row. `DIR/manifest.json` lists only files that
are whole, together with the caller's cursor (its position in the corpus) just after their last
token: a killed harvest continues from there, and no token is lost or written twice.
"""

import contextlib
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.places import Place

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
REQUIRED_KEYS = (
    "schema_version",
    "model",
    "layers",
    "sites",
    "d_model",
    "dtype",
    "tokens",
    "shards",
)

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
_ODD = re.compile(r"[^\w.-]")


def folder_name(layer: int, site: str = "resid_post") -> str:
    """The sub-folder of a layer's shards: "layer-20", or "layer-20-attn_out" for another site."""
    return f"layer-{layer}" + ("" if site == "resid_post" else f"-{_ODD.sub('_', site)}")


class ShardReader:
    """Reads activation shards lazily: opening checks every header and loads no tensor.

    Any float dtype is accepted. Tensors that `shard` returns are mapped from the file, so that
    selecting random rows reads only the pages of those rows. They are copies only where `dtype`
    differs from the file's (float8 is read as bfloat16). When a file is first read, its SHA-256 is
    compared with the manifest's, if that has one.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        flag: str = "`activations`",
        allow_empty: bool = False,
        manifest: str = MANIFEST,
    ) -> None:
        """Open and check the shards in `folder`; `flag` is what errors call it.

        Raises:
            UserError: no manifest, keys missing, a file missing, cut short or of another shape, no
                tokens (unless `allow_empty`).
        """
        self.folder = Path(folder)
        self._what = f"{flag} {folder}"
        self._manifest_name = manifest
        if not (self.folder / manifest).is_file():
            inner = sorted(str(file.parent) for file in self.folder.glob(f"*/{manifest}"))
            such = f", such as {inner[0]}" if inner else ""
            what = f"holds no {MANIFEST}" if self.folder.exists() else "does not exist"
            raise UserError(f"{self._what} {what}: give a folder made by harvest{such}")
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
        """Of the activations that `shard` returns, whatever the files hold."""
        self.shard_tokens: list[int] = []
        """Tokens of each shard, in order."""
        self._read_entries()
        if not self.tokens and not allow_empty:
            raise UserError(f"{self._what} holds no tokens: finish the harvest (`resume`)")

    @property
    def places(self) -> list[Place]:
        """Every (layer, site) stored."""
        return [(layer, site) for layer in self.layers for site in self.sites]

    def __len__(self) -> int:
        """How many shards each layer and site has."""
        return len(self.shard_tokens)

    def place(
        self,
        layer: int | None = None,
        site: str | None = None,
        names: tuple[str, str] = ("layer", "site"),
    ) -> Place:
        """The one stored (layer, site) that fits. Either may be left out when only one is stored.

        `names` are the arguments that asked for them.

        Raises:
            UserError: none fits, or several do.
        """
        fitting = [
            (at, where)
            for at, where in self.places
            if layer in (None, at) and site in (None, where)
        ]
        if len(fitting) != 1:
            problem = "has more than one matching" if fitting else "has no matching"
            asked = [
                f"`{name}` {value}"
                for name, value in zip(names, (layer, site), strict=True)
                if value is not None
            ]
            raise UserError(
                f"{self._what} {problem} layer and site (layers {self.layers}, sites {self.sites}; "
                f"asked: {' and '.join(asked) or 'neither'}): give `{names[0]}` and "
                f"`{names[1]}` from these"
            )
        return fitting[0]

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

    def columns(self, index: int) -> dict[str, Int[Tensor, " tokens"]]:
        """The columns that shard `index` stores besides the activations, by name.

        `token_ids` always; `positions` and `contexts` when the harvest was asked to keep them.
        """
        from safetensors import safe_open

        path = self._files[self.places[0]][index]
        with files.reading_tensors(path), safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name != "activations"]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}

    def read_ahead(self, index: int, places: Sequence[Place]) -> None:
        """Ask the operating system to bring a shard into memory, without waiting for it."""
        if not hasattr(os, "posix_fadvise"):
            return
        for place in places:
            with contextlib.suppress(OSError), open(self._files[place][index], "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

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
        manifest = files.read_json(self.folder / self._manifest_name)
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
        """Assign the manifest's files to layers and sites, and check each file's header."""
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
        """The places and paths of a listed name; a bare name means one file in every folder."""
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
        """Check a file's header; returns the dtype of its activations, in safetensors' notation."""
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
            content = {name: (item["dtype"], item["shape"]) for name, item in header.items()}
            raise UserError(
                f"{self._what}: {path.relative_to(self.folder)} must hold activations "
                f"{[tokens, self.d_model]} of a float type and token_ids {[tokens]} of an integer "
                f"type, got {content}; harvest again"
            )
        return str(activations["dtype"])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
