"""Bilingual dictionaries in the format of dictd, such as FreeDict's Debian packages.

`apt install dict-freedict-eng-fra dict-freedict-fra-eng` puts two of them into /usr/share/dictd.
Nothing is downloaded. A dictionary is an index (`word <tab> offset <tab> length`, in base 64) and a
text, plain or packed by dictzip, whose chunks are unpacked one by one.
"""

import functools
import gzip
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.steering.checks.words import words

VARIABLE = "SAESTEER_DICTIONARIES"
"""Environment variable with the folder of the dictionaries."""

FOLDER = Path("/usr/share/dictd")
"""Where Debian's packages put them."""

CODES = {
    "ar": "ara", "cs": "ces", "da": "dan", "de": "deu", "el": "ell", "en": "eng", "es": "spa",
    "fi": "fin", "fr": "fra", "hi": "hin", "hu": "hun", "it": "ita", "ja": "jpn", "nl": "nld",
    "pl": "pol", "pt": "por", "ro": "ron", "ru": "rus", "sv": "swe", "tr": "tur",
}  # fmt: skip
"""ISO 639-3 codes, which FreeDict's names have, of the languages that the checks know."""

_DIGITS = {
    c: i for i, c in enumerate(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


def _number(digits: bytes) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


class _Text:
    """The text of a dictionary, read where it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chunk_length, self._starts = _dictzip_chunks(path)
        self._whole: bytes | None = None
        self._chunk = functools.lru_cache(64)(self._unpack)

    def read(self, start: int, length: int) -> str:
        if not self._starts:
            if self._whole is None:
                opened = gzip.open if self.path.suffix == ".dz" else open
                with opened(self.path, "rb") as file:
                    self._whole = file.read()
            raw = self._whole[start : start + length]
        else:
            first, last = start // self._chunk_length, (start + length) // self._chunk_length
            last = min(last, len(self._starts) - 2)
            joined = b"".join(self._chunk(i) for i in range(first, last + 1))
            inside = start - first * self._chunk_length
            raw = joined[inside : inside + length]
        return raw.decode("utf-8", "replace")

    def _unpack(self, chunk: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._starts[chunk])
            packed = file.read(self._starts[chunk + 1] - self._starts[chunk])
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed)


def _dictzip_chunks(path: Path) -> tuple[int, list[int]]:
    """Length of an unpacked chunk, and where each packed one begins; none for other files.

    dictzip(1) keeps the sizes of the chunks in the field "RA" of the gzip header (RFC 1952).
    """
    with path.open("rb") as file:
        head = file.read(12)
        if path.suffix != ".dz" or len(head) < 12 or not head[3] & 4:
            return 0, []
        flags, (extra_length,) = head[3], struct.unpack("<H", head[10:12])
        extra = file.read(extra_length)
        for flag in (8, 16):  # a name and a comment, each ended by a zero
            while flags & flag and file.read(1) not in (b"\0", b""):
                pass
        place = file.tell() + (2 if flags & 2 else 0)
    while len(extra) >= 4:
        kind, (size,) = extra[:2], struct.unpack("<H", extra[2:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == b"RA" and size >= 6:
            _, length, count = struct.unpack("<HHH", field[:6])
            starts = [place]
            for packed in struct.unpack(f"<{count}H", field[6 : 6 + 2 * count]):
                starts.append(starts[-1] + packed)
            return length, starts
    return 0, []


class Dictionary:
    """One direction of a bilingual dictionary."""

    def __init__(self, index: Path, text: Path) -> None:
        """Raises UserError for files that are no dictionary in dictd's format."""
        self.path = index
        self._meanings: dict[str, frozenset[tuple[str, ...]]] = {}
        try:
            self._index = b"\n" + index.read_bytes()
            self._lowered = self._index.lower()  # changes ASCII alone, so that offsets stay
            self._text = _Text(text)
            self._entry_at(1)  # fails for files of another kind
        except (OSError, ValueError, KeyError, struct.error, zlib.error) as error:
            raise UserError(
                f"{index} and {text.name} are no dictionary in dictd's format ({error!r}); give "
                "`dictionaries` another folder"
            ) from None

    def entries(self, word: str) -> list[str]:
        """The texts of the entries of a headword, ignoring case."""
        key = b"\n" + word.lower().encode("utf-8", "replace") + b"\t"
        found, place = [], self._lowered.find(key)
        while place >= 0:
            found.append(self._entry_at(place + 1))
            place = self._lowered.find(key, place + 1)
        return found

    def _entry_at(self, place: int) -> str:
        line = self._index[place : self._index.find(b"\n", place)]
        _, offset, length, *_ = line.split(b"\t")
        return self._text.read(_number(offset), _number(length))

    def translations(self, word: str) -> frozenset[tuple[str, ...]]:
        """The translations of a headword, each as its case-folded words; empty where unknown."""
        word = word.lower()
        if word not in self._meanings:
            found = {phrase for text in self.entries(word) for phrase in _phrases(text)}
            self._meanings[word] = frozenset(found)
        return self._meanings[word]


def _phrases(entry: str) -> set[tuple[str, ...]]:
    """The translations in an entry: its unindented lines after the headword, at commas.

    Indented lines are examples, notes and synonyms of the headword. Grammar stands in angular,
    square or curly brackets, remarks in round ones.
    """
    found = set()
    for line in entry.split("\n")[1:]:
        line = re.sub(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)", " ", line)
        if re.match(r'\s{2,}|\s*"|\s*(?:see|Note|Synonyms?|Antonyms?):', line):
            continue
        for phrase in re.split(r"[,;/]", re.sub(r"^\s*\d+\.", "", line)):
            if parts := tuple(words(phrase)):
                found.add(parts)
    return found


@dataclass(frozen=True)
class Bilingual:
    """Dictionaries from one language to another, and back where there is one."""

    source: str
    """ISO 639-1 code."""
    target: str
    forward: Dictionary
    backward: Dictionary | None = None

    @property
    def names(self) -> list[str]:
        """The files, without their folder."""
        return [one.path.stem for one in (self.forward, self.backward) if one is not None]


def dictionary_folder(folder: str | Path | None = None) -> Path:
    """The folder given, else that of the environment variable, else Debian's.

    Raises UsageError for a folder that was asked for and is none.
    """
    asked = folder if folder is not None else os.environ.get(VARIABLE)
    if not asked:
        return FOLDER
    if not Path(asked).is_dir():
        named = "`dictionaries`" if folder is not None else VARIABLE
        raise UsageError(f"{named} {asked} is no folder: give one that holds dictd dictionaries")
    return Path(asked)


@functools.lru_cache(16)
def _open(folder: Path, name: str) -> Dictionary | None:
    for stem in (f"freedict-{name}", name, f"{name}/{name}"):
        index = folder / f"{stem}.index"
        for text in (folder / f"{stem}.dict.dz", folder / f"{stem}.dict"):
            if index.is_file() and text.is_file():
                return Dictionary(index, text)
    return None


def bilingual(source: str, target: str, folder: str | Path | None = None) -> Bilingual | None:
    """The dictionaries from `source` to `target` (ISO 639-1), or None where none is installed.

    They may be called freedict-eng-fra.index, as Debian's packages call them, or eng-fra.index, in
    the folder or in one of that name.
    """
    where = dictionary_folder(folder)
    if source not in CODES or target not in CODES:
        return None
    ours, theirs = CODES[source], CODES[target]
    forward = _open(where, f"{ours}-{theirs}")
    if forward is None:
        return None
    return Bilingual(source, target, forward, _open(where, f"{theirs}-{ours}"))


def how_to_install(source: str, target: str) -> str:
    """What makes a dictionary available, for a message."""
    ours, theirs = CODES.get(source, source), CODES.get(target, target)
    return (
        f"install the Debian packages dict-freedict-{ours}-{theirs} and "
        f"dict-freedict-{theirs}-{ours}, or give `dictionaries` a folder with them"
    )
