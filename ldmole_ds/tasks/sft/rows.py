"""What a row of supervised fine-tuning holds, in the column names that people use.

* `{"messages": [{"role": str, "content": str}, ...]}`: the loss is on all assistant turns. One that calls tools
  (`tool_calls`) needs no content; a `tools` column describes them, as a list or as JSON text of one.
* `{"prompt": str, "completion": str}`: plain text, the loss is on the completion and the EOS after it.
* `{"prompt": [message, ...], "completion": [message, ...]}`: the loss is on the assistant turns of the completion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldmole_ds.tasks import fields
from ldmole_ds.tasks.rows import DataError, Row

ROLES = ("system", "developer", "user", "assistant", "tool")
EXPECTED = '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation.

    Attributes:
        messages: Each with `role` and `content`, and whatever else the row has for the template.
        first_trained: Assistant turns from this message on are answers to learn.
        tools: Functions that the template describes to the model, as JSON schemas.
    """

    messages: tuple[dict[str, Any], ...]
    first_trained: int = 0
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def answers(self) -> list[int]:
        """Indices of the messages to learn."""
        turns = enumerate(self.messages)
        return [i for i, message in turns if i >= self.first_trained and message["role"] == "assistant"]


@dataclass(frozen=True)
class TextPair:
    """Text, and the text that follows it, with nothing put between them."""

    prompt: str
    completion: str


def is_sft_row(columns: Mapping[str, Any]) -> bool:
    """Whether columns are those of supervised fine-tuning."""
    return "messages" in columns or {"prompt", "completion"} <= set(columns)


def read_example(row: Row) -> Conversation | TextPair:
    """The row, checked.

    Raises:
        DataError: Another schema, an unknown role, no assistant turn, or one with nothing before it.
    """
    if "messages" in row.fields:
        messages, first = _messages(row.fields["messages"], "messages", row.where), 0
    elif {"prompt", "completion"} <= set(row.fields):
        prompt, completion = row.fields["prompt"], row.fields["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            names = (("'prompt'", prompt), ("'completion'", completion))
            return TextPair(*(fields.text(value, name, row.where) for name, value in names))
        if isinstance(prompt, str) or isinstance(completion, str):
            raise DataError(
                f"{row.where}: one of prompt and completion is text; expected two texts or two message lists"
            )
        before = _messages(prompt, "prompt", row.where)
        messages, first = (*before, *_messages(completion, "completion", row.where)), len(before)
    else:
        raise DataError(f"{row.where}: the keys are {', '.join(map(repr, row.fields)) or 'none'}; expected {EXPECTED}")
    conversation = Conversation(messages, first, _tools(row.fields.get("tools"), row.where))
    if not conversation.answers:
        raise DataError(f"{row.where}: no assistant turn, so there is nothing to learn; leave the row out")
    if messages[0]["role"] == "assistant":
        raise DataError(f"{row.where}: the conversation begins with an assistant turn; expected system or user first")
    return conversation


def _messages(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where}: {column!r} is no list of messages, or an empty one; expected {EXPECTED}")
    messages = []
    for number, message in enumerate(value, start=1):
        name = f"message {number} of {column!r}"
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: {name} is no object; expected role and content")
        kept = _without_none(message)
        if kept.get("role") not in ROLES:
            raise DataError(f"{where}: {name} has the role {kept.get('role')!r}; expected one of {', '.join(ROLES)}")
        if kept["role"] == "assistant" and kept.get("tool_calls"):
            if not isinstance(kept["tool_calls"], list) or not isinstance(kept.setdefault("content", ""), str):
                raise DataError(f"{where}: {name} calls tools; expected a list of calls, and text or null as content")
        elif kept["role"] in ("user", "assistant"):
            fields.text(kept.get("content"), f"the content of {name}", where)
        elif not isinstance(kept.get("content"), str):
            raise DataError(f"{where}: {name} has no text under 'content'; expected a string")
        messages.append(kept)
    return tuple(messages)


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        pass
    if not value:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{where}: 'tools' is no list of objects, nor JSON text of one; expected functions' schemas")
    return tuple(_without_none(tool) for tool in value)


def _without_none(value: Any) -> Any:
    """A column of a dataset gives every object the keys of all, empty where it has none."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value
