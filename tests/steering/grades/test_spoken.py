"""The words of replies of a form: JSON, programs, lists."""

from saesteer.steering.grades.spoken import spoken


def test_what_a_reply_says_in_words() -> None:
    body = '{"a": "One boat", "b": [2, {"c": "left"}], "d": true}'
    assert spoken("json", f"```json\n{body}\n```") == "One boat. 2. left"
    assert spoken("json", "One boat left") is None
    code = "# Two boats\nsay = 'left early'\nprint(say, 3)"
    said = spoken("python", f"Here:\n```python\n{code}\n```")
    assert said is not None and set(said.split(". ")) == {"left early", "3", "Two boats"}
    assert spoken("python", "print('open") is None
    assert spoken("bullets", "- One *boat*\n2. It left") == "One  boat \nIt left"
