"""The grades that a language model gives as a judge."""

from enum import Enum


class Letter(Enum):
    """A: follows the instruction, on topic. B: follows it otherwise. C: does not follow it."""

    A = "A"
    B = "B"
    C = "C"
