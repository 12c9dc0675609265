"""Small dictionaries in dictd's format, written by hand; dictzip's chunks too."""

import gzip
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def number(value: int) -> str:
    digits = DIGITS[value % 64]
    while value := value // 64:
        digits = DIGITS[value % 64] + digits
    return digits


def write_dictionary(
    folder: Path, name: str, entries: Mapping[str, str], *, packed: str = "plain", chunk: int = 37
) -> None:
    """Write `name.index` and its text. `packed`: plain, gzip (.dz in one piece) or dictzip."""
    text, lines = b"", []
    for word, entry in entries.items():
        raw = entry.encode()
        lines.append(f"{word.lower()}\t{number(len(text))}\t{number(len(raw))}")
        text += raw
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.index").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if packed == "plain":
        (folder / f"{name}.dict").write_bytes(text)
    elif packed == "gzip":
        (folder / f"{name}.dict.dz").write_bytes(gzip.compress(text))
    else:
        (folder / f"{name}.dict.dz").write_bytes(dictzip(text, chunk))


def dictzip(text: bytes, chunk: int) -> bytes:
    """Pack a text in chunks that can be unpacked one by one, with a name in the header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    pieces = []
    for start in range(0, len(text), chunk):
        pieces.append(
            packer.compress(text[start : start + chunk]) + packer.flush(zlib.Z_FULL_FLUSH)
        )
    end = packer.flush(zlib.Z_FINISH)
    sizes = struct.pack(f"<{len(pieces)}H", *map(len, pieces))
    field = struct.pack("<HHH", 1, chunk, len(pieces)) + sizes
    extra = b"RA" + struct.pack("<H", len(field)) + field
    head = b"\x1f\x8b\x08" + bytes([4 | 8]) + struct.pack("<I", 0) + b"\x02\x03"
    head += struct.pack("<H", len(extra)) + extra + b"small.dict\0"
    tail = struct.pack("<II", zlib.crc32(text), len(text))
    return head + b"".join(pieces) + end + tail


EN_FR = {
    "bread": "bread /bred/\npain\n",
    "spoon": "spoon /spuːn/ <n>\ncuiller, cuillère <fem>\n",
    "stir": "stir /stəː/\n1. bouger\n2. remuer (une sauce), agiter\n",
    "handle": 'handle\nmanche <masc>\n      "a broom handle"  - un balai\n   Synonym: {haft}\n',
    "wooden": "wooden\nde bois, en bois\n",
    "bridge": "bridge\npont\n",
    "closed": "closed\nfermé\n",
    "winter": "winter\nhiver\n",
    "of course": "of course\nbien sûr\n",
}
FR_EN = {"bouillie": "bouillie /buji/\nporridge, mash\n", "pont": "pont\nbridge\n"}


def write_french(folder: Path) -> Path:
    """Both directions, as Debian's packages call them."""
    write_dictionary(folder, "freedict-eng-fra", EN_FR, packed="dictzip")
    write_dictionary(folder, "freedict-fra-eng", FR_EN)
    return folder
