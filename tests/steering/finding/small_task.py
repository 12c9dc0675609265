"""A task that every answer follows, with contents in each split, for tests of the search."""

from saesteer.steering.tasks.task import Task, Variant

CONTENTS = tuple(
    f"{who} {what}."
    for who in ("Peter", "The old captain", "Maria", "A tall nurse")
    for what in ("bought nine oranges", "closed the road", "yields a name")
)

TASK = Task(
    name="lists",
    instruction="Select one",
    variants=(Variant("Choose one of them"), Variant("Pick one", use="evaluate")),
    contents={"train": CONTENTS[:8], "dev": CONTENTS[4:10], "test": CONTENTS[6:]},
    check_name="length",
    check_arguments={"minimum": 1},
    max_new_tokens=4,
)
