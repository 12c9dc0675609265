"""Corpora that the `datasets` library streams: of the Hub, and tables in local files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError, reason_of
from saesteer.checkpoints.files import sha256_file
from saesteer.sae.text.rows import Document, row_document, without_text

_SHUFFLE_ROWS = 10_000

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}), ".arrow": ("arrow", {}), ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}), ".jsonl.gz": ("json", {}), ".json.gz": ("json", {}),
    ".jsonl.bz2": ("json", {}), ".jsonl.xz": ("json", {}), ".jsonl.zst": ("json", {}),
}  # fmt: skip
TABLES = tuple(_BUILDERS)
"""Ends of the names of files that `TableCorpus` reads."""


class StreamedCorpus:
    """Rows of `text` or `messages` that a data set of the `datasets` library streams.

    The order is drawn from the seed within a window of 10,000 rows. Raises UserError for columns
    without either, and for a stream that breaks off.
    """

    _TODO = "try again, with `resume` if something was saved"

    def __init__(self, name: str, rows: Any) -> None:
        self.name = name
        self.rows = rows
        columns = rows.column_names  # None where only reading would tell
        if columns is not None and not {"text", "messages"} & set(columns):
            raise UserError(without_text(columns, name))

    def documents(self, seed: int, start: int) -> Iterator[Document]:
        """The documents of one epoch in the order drawn from `seed`, without the first `start`."""
        yield from self._read(self.rows.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS).skip(start))

    def _read(self, stream: Any) -> Iterator[Document]:
        rows = iter(stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise UserError(
                    f"`data` {self.name} broke off ({reason_of(error)}): {self._TODO}"
                ) from error
            yield row_document(row, self.name)


class TableCorpus(StreamedCorpus):
    """A Parquet, Arrow, CSV or TSV file, or compressed JSON lines."""

    _TODO = "check the file, or write JSON lines with `text` or `messages`"

    def __init__(self, name: str, path: Path) -> None:
        from datasets import load_dataset

        from saesteer.checkpoints.model_files import quiet

        kind, options = _BUILDERS[_ending(path)]
        self.path = path
        try:
            with quiet():
                rows = load_dataset(
                    kind, data_files=str(path), split="train", streaming=True, **options
                )
        except Exception as error:  # the library raises a dozen unrelated types
            raise UserError(
                f"`data` {name} cannot be read as {kind} ({reason_of(error)}): {self._TODO}"
            ) from error
        super().__init__(name, rows)
        if next(self._read(self.rows), None) is None:
            raise UserError(f"`data` {name} holds no row: give at least one document")

    def identity(self) -> dict[str, Any]:
        """What was read, JSON-ready: the file's hash."""
        return {"name": self.name, "sha256": [sha256_file(self.path)]}


class HubCorpus(StreamedCorpus):
    """A dataset of the Hugging Face Hub, or a local folder of one, streamed.

    Written `hf:DATASET[:config][:split]`; the split is `train` unless given. Raises UserError when
    it cannot be opened.
    """

    def __init__(self, name: str) -> None:
        from saesteer.checkpoints.model_files import hub_call

        dataset, *rest = name.removeprefix("hf:").split(":")
        if not dataset or len(rest) > 2:
            raise UserError(f"`data` {name} must read hf:DATASET[:config][:split]")
        config = rest[0] or None if len(rest) == 2 else None
        split = (rest[-1] if rest else "") or "train"

        def load() -> Any:
            from datasets import load_dataset

            # Up to version 3 the library ran a dataset's own script, after asking on stdout.
            return load_dataset(
                dataset, config, split=split, streaming=True, trust_remote_code=False
            )

        self._content: dict[str, Any] = {}
        """What identifies the text itself: hashes of a folder's files, or the Hub's commit."""
        if Path(dataset).is_dir():
            try:
                rows = load()
                self._content = {"sha256": _hashes_in(Path(dataset))}
            except Exception as error:  # the library raises a dozen unrelated types
                raise UserError(
                    f"`data` {name} could not be opened ({reason_of(error)}): check the folder, "
                    "the config and the split"
                ) from error
        else:
            todo = "check the name, the config and the split, or give a file or python-docs"
            rows = hub_call(load, f"`data` {name}", todo)
            self._content = {"revision": _revision_of(dataset)}
        super().__init__(name, rows)

    def identity(self) -> dict[str, Any]:
        """What was read, JSON-ready: files' hashes, or the Hub's commit."""
        info = self.rows.info
        return {
            "name": self.name,
            "builder": info.builder_name,
            "version": str(info.version),
            **self._content,
        }


def is_table(path: Path) -> bool:
    """Whether a file is read by `TableCorpus`, by its name."""
    return _ending(path) != ""


def _ending(path: Path) -> str:
    return next((end for end in TABLES if path.name.lower().endswith(end)), "")


def _hashes_in(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder that is not hidden, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _revision_of(dataset: str) -> str | None:
    """The commit that the Hub has of a dataset now; None where it does not say."""
    from huggingface_hub import HfApi

    try:
        sha: str | None = HfApi().dataset_info(dataset, timeout=10).sha
        return sha
    except Exception:  # no network, no such call: the name is all that is known then
        return None
