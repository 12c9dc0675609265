"""Shares SAEs: pushes them to a repository on the Hub or to a folder of the same layout.

    README.md           the card
    saes.json           every SAE in it: what it is, and the SHA-256 of its weights
    SAE_ID/cfg.json, SAE_ID/sae_weights.safetensors, and run.json, metrics.jsonl, metrics.json

`sae_lens.SAE.from_pretrained(REPO, SAE_ID)` opens what is pushed. One push is one commit.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints import files
from saesteer.checkpoints.durable import Draft, make_folder, writing
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.locks import folder_lock
from saesteer.checkpoints.model_card import as_dict, card, describe_sae

if TYPE_CHECKING:
    from saesteer.checkpoints.sparse_autoencoder import SAE
else:  # importing torch takes seconds
    SAE = Any

INDEX = "saes.json"
_CARD = "README.md"
_SAE_FILES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "metrics.jsonl")
_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Shared:
    """One SAE about to be shared."""

    sae_id: str
    contents: dict[str, Path | bytes]
    entry: dict[str, Any]


def push(
    sae: str | Path,
    repo: str,
    *,
    sae_id: str | None = None,
    metrics: str | Path | None = None,
    license_name: str | None = None,
    private: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Share an SAE, or every SAE of a run, with a card generated from its records.

    Args:
        sae: folder of an SAE, or of a run with several (`layer-...`).
        repo: `NAMESPACE/NAME` on the Hub, made if missing; or a folder: a path that starts with
            `.`, `/` or `~`, or that exists.
        sae_id: name in the repository; by default the hook name, for a run of several each folder's
            name.
        metrics: folder that `saesteer metrics -o` wrote for this SAE, or its metrics.json.
        license_name: such as "apache-2.0", for the card of a new repository.
        private: whether a repository that is made now is private.
        force: replace an SAE of that name with other weights.

    Returns:
        `repo`, `revision` (the commit; None for a folder), and `saes`: SHA-256 by id.

    Raises:
        UserError: no SAE there, an id that is taken, a Hub that cannot be reached or says no.
    """
    folder = Path(sae).expanduser()
    shared = _collect(folder, sae_id, metrics)
    if _is_folder(repo):
        return _push_to_folder(Path(repo).expanduser(), shared, license_name, force)
    if not _REPO.fullmatch(repo):
        raise UsageError(
            f"`repo` must be NAMESPACE/NAME on the Hub or a folder such as ./shared, got {repo!r}"
        )
    return _push_to_hub(repo, shared, license_name, private, force)


def from_pretrained(
    repo: str | Path,
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
) -> SAE:
    """Open a shared SAE.

    Args:
        repo: `NAMESPACE/NAME` on the Hub, or a folder of the same layout.
        sae_id: which SAE; may be left out when `saes.json` lists a single one.
        revision: commit (40 hexadecimal digits, which never moves), branch or tag.
        sha256: what the weights must hash to. Without it they must agree with `saes.json`, where
            that lists them.
        device, dtype: as for `load_sae`.

    Returns:
        The SAE; its `source` is `REPO@COMMIT:ID`, which identifies these files permanently.

    Raises:
        UserError: not there, not reachable, damaged, or not the weights that were asked for.
    """
    from saesteer.checkpoints.sae_folder import read_sae

    if sae_id is not None:
        _check_id(sae_id)
    if _is_folder(str(repo)):
        if revision is not None:
            raise UsageError(f"{repo} is a folder, which has no revisions: pin it with sha256")
        place, commit = Path(repo).expanduser(), None
        index = _index_of((place / INDEX).read_bytes() if (place / INDEX).is_file() else None, repo)
        sae_id = _chosen(sae_id, index, repo)
    else:
        if not _REPO.fullmatch(str(repo)):
            raise UsageError(f"{repo!r} is neither a folder nor NAMESPACE/NAME on the Hub")
        place, commit, index, sae_id = _fetch(str(repo), sae_id, revision)
    inside = place / sae_id
    if not inside.is_dir() or not inside.resolve().is_relative_to(place.resolve()):
        raise UserError(f"{repo} holds no SAE {sae_id!r}{_there_are(index)}")
    sae = read_sae(inside).to(device, dtype)
    wanted = sha256 or as_dict(index.get(sae_id)).get("sha256")
    if wanted is not None and sae.sha256 != wanted:
        raise UserError(
            f"{repo}: the weights of {sae_id} have SHA-256 {sae.sha256}, not {wanted}: fetch them "
            "again, or check whether they were replaced"
        )
    return replace(sae, source=f"{repo}@{commit}:{sae_id}" if commit else f"{repo}:{sae_id}")


# --- what is shared ------------------------------------------------------------------------------


def _collect(folder: Path, sae_id: str | None, metrics: str | Path | None) -> list[_Shared]:
    several = sorted(path.parent for path in folder.glob("layer-*/cfg.json"))
    if (folder / "cfg.json").is_file() or not several:
        return [_collect_one(folder, sae_id, metrics)]
    if sae_id is not None or metrics is not None:
        what = "an id" if sae_id is not None else "`metrics`"
        raise UsageError(f"{what} is for one SAE, and {folder} holds {len(several)}: push one")
    return [_collect_one(place, place.name, None) for place in several]


def _collect_one(folder: Path, sae_id: str | None, metrics: str | Path | None) -> _Shared:
    from saesteer.checkpoints.sae_folder import read_sae

    sae = read_sae(folder)  # a broken SAE is refused here, not by whoever downloads it
    sae_id = sae_id or sae.spec.hook_name or folder.resolve().name
    _check_id(sae_id)
    contents: dict[str, Path | bytes] = {
        name: folder / name for name in _SAE_FILES if (folder / name).is_file()
    }
    run = None
    if (folder / "run.json").is_file():
        run = files.read_json(folder / "run.json")
        run = _without_places(run) if isinstance(run, dict) else None
        contents["run.json"] = _json(run)
    measured = None
    if metrics is not None:
        path = Path(metrics).expanduser()
        path = path / "metrics.json" if path.is_dir() else path
        try:
            measured = files.read_json(path)
        except UserError as error:
            raise UserError(
                f"`metrics` {metrics} cannot be read ({error}): give the folder that `saesteer "
                "metrics -o` wrote for this SAE"
            ) from error
        about = as_dict(as_dict(measured).get("sae")).get("sha256")
        if about is None:
            raise UserError(
                f"`metrics` {metrics} names no SAE that was measured: give the folder that "
                "`saesteer metrics -o` wrote for this SAE"
            )
        if about != sae.sha256:
            raise UserError(f"`metrics` {metrics} measured other weights than those in {folder}")
        contents["metrics.json"] = _json(measured)
    config = files.read_json(folder / "cfg.json")
    return _Shared(sae_id, contents, describe_sae(config, run, measured, sae.sha256))


def _without_places(run: dict[str, Any]) -> dict[str, Any]:
    """A run's record with every absolute path shortened to its last part."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value:
            return Path(value).name
        return value

    cleaned: dict[str, Any] = clean(run)
    return cleaned


def _merge(
    index: Mapping[str, Any], shared: list[_Shared], repo: str, force: bool
) -> dict[str, Any]:
    """The index with the new SAEs. Raises UserError where they would replace other weights."""
    merged = dict(index)
    for one in shared:
        present = as_dict(merged.get(one.sae_id)).get("sha256")
        if present is not None and present != one.entry["sha256"] and not force:
            raise UserError(
                f"`repo` {repo} holds other weights under {one.sae_id!r}: choose another id, or "
                "add `force` to replace them"
            )
        merged[one.sae_id] = one.entry
    return merged


def _index_of(content: bytes | None, repo: object) -> dict[str, Any]:
    """What `saes.json` lists. Raises UserError when it cannot be read."""
    if content is None:
        return {}
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{repo}: {INDEX} is not valid JSON; restore it") from error
    saes = document.get("saes") if isinstance(document, dict) else None
    if not isinstance(saes, dict) or not all(isinstance(entry, dict) for entry in saes.values()):
        raise UserError(f"{repo}: {INDEX} is not what saesteer push writes; restore or delete it")
    return saes


def _all_contents(
    shared: list[_Shared], merged: Mapping[str, Any], new_card: str | None
) -> dict[str, Path | bytes]:
    """Every file of one push, by its path in the repository; the index last."""
    contents: dict[str, Path | bytes] = {
        f"{one.sae_id}/{name}": content for one in shared for name, content in one.contents.items()
    }
    if new_card is not None:
        contents[_CARD] = new_card.encode()
    contents[INDEX] = _json({"schema_version": 1, "saes": merged})
    return contents


# --- folders -------------------------------------------------------------------------------------


def _is_folder(repo: str) -> bool:
    return repo.startswith((".", "/", "~")) or Path(repo).is_dir()


def _push_to_folder(
    folder: Path, shared: list[_Shared], license_name: str | None, force: bool
) -> dict[str, Any]:
    with folder_lock(folder, "`repo`"):
        index_file, readme = folder / INDEX, folder / _CARD
        index = _index_of(index_file.read_bytes() if index_file.is_file() else None, folder)
        merged = _merge(index, shared, str(folder), force)
        before = readme.read_text(encoding="utf-8") if readme.is_file() else None
        new_card = card(before, folder.resolve().name, merged, license_name)
        for name, content in _all_contents(shared, merged, new_card).items():
            make_folder((folder / name).parent)
            with writing(folder / name), Draft(folder / name) as draft:
                if isinstance(content, bytes):
                    draft.write(content)
                else:
                    with content.open("rb") as source:
                        while block := source.read(4 << 20):
                            draft.write(block)
    return _result(str(folder), None, shared)


# --- the Hub -------------------------------------------------------------------------------------


def _push_to_hub(
    repo: str, shared: list[_Shared], license_name: str | None, private: bool, force: bool
) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    from saesteer.checkpoints.model_files import hub_call, hub_reachable

    if not hub_reachable():
        raise UserError(f"`repo` {repo}: the Hub cannot be reached: connect, or push to a folder")
    api = HfApi()

    def commit() -> str:
        api.create_repo(repo, private=private or None, exist_ok=True)
        head = str(api.model_info(repo).sha)
        index = _index_of(_download(repo, INDEX, head), repo)
        merged = _merge(index, shared, repo, force)
        before = _download(repo, _CARD, head)
        text = None if before is None else before.decode("utf-8", "replace")
        new_card = card(text, repo, merged, license_name)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in _all_contents(shared, merged, new_card).items()
        ]
        names = ", ".join(one.sae_id for one in shared)
        # With parent_commit, this push fails instead of overwriting another one in between.
        info = api.create_commit(
            repo, operations, commit_message=f"Add {names}", parent_commit=head
        )
        return str(info.oid)

    todo = "log in (hf auth login) with a token that may write there, or push to a folder"
    return _result(repo, hub_call(commit, f"`repo` {repo}", todo), shared)


def _download(repo: str, name: str, revision: str) -> bytes | None:
    """A small file of a repository; None when it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, revision=revision)).read_bytes()
    except LocalEntryNotFoundError:  # the Hub could not be asked, so the file may well exist
        raise
    except EntryNotFoundError:
        return None


def _fetch(
    repo: str, sae_id: str | None, revision: str | None
) -> tuple[Path, str, dict[str, Any], str]:
    """Download an SAE; the snapshot's folder, its commit, the index, and the id."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from saesteer.checkpoints.model_files import hub_call

    def download() -> tuple[Path, str, dict[str, Any], str]:
        wanted, index = sae_id, {}
        try:
            content = _download(repo, INDEX, revision or "main")
            index = _index_of(content, repo)
        except LocalEntryNotFoundError:  # no network: without an index the id must be given
            if sae_id is None:
                raise
        wanted = _chosen(sae_id, index, repo)
        try:
            config = Path(hf_hub_download(repo, f"{wanted}/cfg.json", revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise UserError(f"{repo} holds no SAE {wanted!r}{_there_are(index)}") from error
        place = config.parents[len(Path(wanted).parts)]
        commit = place.name
        if not _COMMIT.fullmatch(commit):
            raise UserError(f"{repo}: the Hub names no commit; use another `repo`")
        # From the same commit, even if something is pushed meanwhile.
        hf_hub_download(repo, f"{wanted}/sae_weights.safetensors", revision=commit)
        index = _index_of(_download(repo, INDEX, commit), repo) if index else {}
        return place, commit, index, wanted

    todo = "check the name and `revision`, or give a folder"
    return hub_call(download, f"the SAE {repo}", todo)


# --- small helpers -------------------------------------------------------------------------------


def _chosen(sae_id: str | None, index: Mapping[str, Any], repo: object) -> str:
    """The id asked for, or the only one listed. Raises UsageError."""
    if sae_id is not None:
        return sae_id
    if len(index) != 1:
        raise UsageError(f"{repo}: name the SAE to open{_there_are(index)}")
    only = next(iter(index))
    _check_id(only)
    return only


def _there_are(index: Mapping[str, Any]) -> str:
    """The end of an error: which ids the index lists."""
    return f"; it lists {', '.join(sorted(index))}" if index else f"; it has no {INDEX}"


def _check_id(sae_id: str) -> None:
    if not _ID.fullmatch(sae_id) or ".." in sae_id.split("/"):
        raise UsageError(
            "an SAE's id must be a name such as layer-20 or blocks.20.hook_resid_post, "
            f"got {sae_id!r}"
        )


def _result(repo: str, revision: str | None, shared: list[_Shared]) -> dict[str, Any]:
    saes = {one.sae_id: one.entry["sha256"] for one in shared}
    return {"repo": repo, "revision": revision, "saes": saes}


def _json(value: Any) -> bytes:
    return files.json_text(value).encode()
