"""Groups of a circuit from YAML, and one line for each thing that is wrong with them."""

from pathlib import Path

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.circuits.groups import BOXES, Group, check_groups, read_groups
from saesteer.mechanisms.toys.hand_built import GROUPS


def test_groups_of_the_toy(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(GROUPS, encoding="utf-8")
    assert read_groups(path) == (
        Group("fetcher", "last", "logits"), Group("mover", "object", "fetcher", "k")
    )  # fmt: skip
    check_groups(BOXES, "boxes")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not valid YAML"),
        ("a: b", "holds no list of groups"),
        ("- x", "group 1 is no mapping"),
        ("- {name: a, at: last, to: logits, via: q}", "unknown key 'via'"),
        ("- {name: a, at: 3, to: logits}", "at must be a text, got"),
        ("- {name: a, at: last}", "group 1 lacks to"),
        ("- {name: a, at: first, to: logits}", "reaches the logits, so it is at last"),
        ("- {name: a, at: last, to: logits, by: q}", "reaches the logits, so it is at last"),
        ("- {name: a, at: last, to: b, by: q}", "a reaches 'b', which must be one of logits"),
        ("- {name: logits, at: last, to: logits}", "the name 'logits' is taken"),
        ("- {name: a, at: last, to: logits}\n- {name: b, at: x, to: a}",
         "b reaches a by None, which must be q, k or v"),
        ("- {name: a, at: last, to: logits}\n- {name: a, at: x, to: a, by: q}", "'a' is taken"),
    ],
)  # fmt: skip
def test_bad_groups(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        read_groups(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="`groups`"):
        read_groups(tmp_path / "missing.yaml")
