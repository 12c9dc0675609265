"""One row of a corpus as a document: a text, or the messages of a chat."""

import json
from collections.abc import Sequence
from typing import Any

from saesteer.checkpoints.errors import UserError

Document = str | list[dict[str, str]]
"""Plain text, or the messages of a chat; no messages stand for a row whose text is null."""

# What other data sets call the text of a row.
_TEXT_ELSEWHERE = ("conversations", "content", "body", "document", "story", "article", "sentence")


def json_document(line: str, source: str) -> Document:
    """The document in a JSON line. Raises UserError, which names `source`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = getattr(error, "msg", "nested too deeply")
        raise UserError(
            f"`data` {source} has a line that is not JSON ({what}): give one object a line"
        ) from None
    return row_document(row, source)


def row_document(row: Any, source: str) -> Document:
    """The document in a row: `text`, or else `messages`. Raises UserError, which names `source`."""
    if not isinstance(row, dict):
        raise UserError(
            f"`data` {source} has a row that is a {type(row).__name__}: give objects with `text` "
            "or `messages`"
        )
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return text
    if messages is not None:
        return _messages_of(messages, source)
    if text is not None:
        raise UserError(
            f"`data` {source} has a row whose `text` is a {type(text).__name__}: it must be a "
            "string"
        )
    if "text" in row or "messages" in row:
        return []  # a table's empty cell: nothing to read, and nothing to mend
    raise UserError(without_text(list(row), source))


def without_text(fields: Sequence[object], source: str) -> str:
    """What to say of rows that have neither `text` nor `messages`, but these fields."""
    known = next((name for name in _TEXT_ELSEWHERE if name in fields), None)
    hint = "rename the field that holds the text" if known is None else (
        f"rename {known} to messages, with role and content" if known == "conversations"
        else f"rename {known} to text"
    )  # fmt: skip
    return (
        f"`data` {source} has a row with neither `text` (a string) nor `messages` (a list of role "
        f"and content); it has: {', '.join(map(str, fields)) or 'no field'}; {hint}"
    )


def _messages_of(messages: Any, source: str) -> Document:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"`data` {source} has a row whose `messages` is no list with a message in it: give "
            "objects of role and content"
        )
    read = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise UserError(
                f"`data` {source}: message {number} of a row has no role: give objects of role "
                "and content"
            )
        read.append({"role": role, "content": _content_of(message, f"message {number}", source)})
    return read


def _content_of(message: dict[str, Any], which: str, source: str) -> str:
    """A message's text, also where it is a list of parts."""
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        wrong = "holds parts that are not text"
    elif content is None:
        wrong = "is null" + (" beside tool calls" if "tool_calls" in message else "")
    else:
        wrong = f"is a {type(content).__name__}"
    raise UserError(
        f"`data` {source}: the `content` of {which} of a row {wrong}: give a string, or leave the "
        "row out"
    )
