"""The readings of a reply on which a check may pass loosely."""

from saesteer.steering.checks.readings import loose_variants


def test_loose_variants_are_the_eight_of_ifeval() -> None:
    found = loose_variants("*one*\ntwo\n**three**")
    assert found == [
        "*one*\ntwo\n**three**", "two\n**three**", "*one*\ntwo", "two",
        "one\ntwo\nthree", "two\nthree", "one\ntwo", "two",
    ]  # fmt: skip
    assert loose_variants("alone") == ["alone", "", "", ""] * 2
