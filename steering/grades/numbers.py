"""Numbers written in digits, however their thousands are parted."""

import re
import unicodedata

# 12h30, and 3 000 with a blank that keeps the number on one line, are one number each.
_NUMBER = re.compile(r"\d+(?:(?:[.,:'’٫٬]|[\u00a0\u2009\u202f](?=\d{3}(?!\d))|\s?h\s?)\d+)*")
_GROUPED = re.compile(r"(?<![\d.,:])\d{1,3}(?:\s\d{3})+(?!\d)")
_TIME = re.compile(r"\d{1,2}:\d{2}")


def ascii_digits(text: str) -> str:
    """The same text with 0 to 9 for the digits of every script."""
    return "".join(
        str(unicodedata.digit(c)) if c.isdecimal() and not c.isascii() else c for c in text
    )


def _digits(number: str) -> str:
    return re.sub(r"\D", "", number).lstrip("0") or "0"


def numbers(text: str) -> frozenset[str]:
    """The numbers written in digits, as digits alone: 3,000 and 3.000 are both 3000."""
    return frozenset(_digits(found) for found in _NUMBER.findall(ascii_digits(text)))


def keeps_numbers(output: str, source: str) -> bool:
    """Whether every number in the source that has digits stands in the reply too.

    However its thousands are parted, in the digits of any script, and a time in any way of parting
    hours from minutes.
    """
    said = ascii_digits(output)
    ours = numbers(said) | {_digits(found) for found in _GROUPED.findall(said)}
    for number in _NUMBER.findall(ascii_digits(source)):
        parts = {_digits(part) for part in number.split(":")}
        if _digits(number) not in ours and not (_TIME.fullmatch(number) and parts <= ours):
            return False
    return True
