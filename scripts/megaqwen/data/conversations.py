"""Records of several forms to conversations: a list of messages with roles, and perhaps tools.

The forms are those of public data sets: `messages` (role and content), ShareGPT's `conversations` (from
and value), and `prompt` with `completion`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaqwen.data.records import excerpt, json_type
from megaqwen.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("messages", "conversations")
COLUMNS = (*FIELDS, "prompt", "completion", "system", "tools")  # what is read of a table
SPEAKERS = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that transformers knows
KEPT = ("name", "tool_call_id", *REASONING)

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a chat template renders."""

    messages: list[Message]
    """Each with role and content, a string; an assistant's perhaps with reasoning and tool calls."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    prompt: int = 0
    """How many messages, from the first, are a completion's prompt: they are not trained on."""

    @property
    def prompt_turns(self) -> int:
        """How many of the prompt's messages are the assistant's."""
        return sum(message["role"] == "assistant" for message in self.messages[: self.prompt])


def conversation_of(record: Mapping[str, Any], field: str | None) -> Conversation:
    """The conversation of a record, checked.

    Args:
        record: A JSON object, or a row of a table.
        field: The field that holds the messages; None finds it.

    Raises:
        InputError: It is none, or nothing in it would be trained on.
    """
    given, prompt = messages_of(record, field)
    messages = [
        message_of(each, f"message {n}", trained=n > prompt)
        for n, each in enumerate(given, start=1)
    ]
    if record.get("system"):
        system = message_of({"role": "system", "content": record["system"]}, "system")
        if not (messages and messages[0]["role"] == "system"):
            messages.insert(0, system)
            prompt += bool(prompt)
        elif messages[0]["content"].strip() != system["content"].strip():
            raise InputError(
                "the field 'system' says something else than message 1, which is the system's too:"
                f" {excerpt(system['content'])} and {excerpt(messages[0]['content'])}: leave one out"
            )
    if not any(message["role"] == "assistant" for message in messages[prompt:]):
        what = "no message of the completion" if prompt else "no message"
        raise InputError(f"{what} is the assistant's: there is nothing to train on")
    return Conversation(messages=messages, tools=tools_of(record.get("tools")), prompt=prompt)


def messages_of(record: Mapping[str, Any], field: str | None) -> tuple[Sequence[Any], int]:
    """The messages of a record as they stand there, and how many of them are a completion's prompt."""
    names = [field] if field else [name for name in FIELDS if record.get(name) is not None]
    if names and record.get(names[0]) is not None:
        messages = record[names[0]]
        if not isinstance(messages, list):
            raise InputError(
                f"{names[0]!r} is to be a list of messages, found {json_type(messages)}"
            )
        return messages, 0
    if not field and record.get("prompt") is not None and record.get("completion") is not None:
        prompt = side(record, "prompt", "user")
        return [*prompt, *side(record, "completion", "assistant")], len(prompt)
    found = ", ".join(record) or "none"
    wanted = repr(field) if field else "'messages', 'conversations' or 'prompt' and 'completion'"
    raise InputError(
        f"no field {wanted}. Fields that it has: {found}. Set conversation_field in the config"
    )


def side(record: Mapping[str, Any], name: str, role: str) -> list[Any]:
    """The messages of a prompt or a completion: a string is one message."""
    value = record[name]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def message_of(given: Any, where: str, trained: bool = True) -> Message:
    """A message in the form that templates take: role, content as a string, arguments as objects.

    Args:
        given: The message as a record has it.
        where: Its name, for messages.
        trained: Whether it would be trained on if the assistant says it.
    """
    if not isinstance(given, Mapping):
        raise InputError(
            f"{where} is to be an object with role and content, found {json_type(given)}"
        )
    speaker = given.get("role", given.get("from"))
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        close = difflib.get_close_matches(str(speaker), SPEAKERS, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        what = f"the role {speaker!r}" if speaker is not None else "no role"
        raise InputError(f"{where} has {what}: known are {', '.join(SPEAKERS)}.{meant}")
    content = text_of(given.get("content", given.get("value")), where)
    message: Message = {"role": role, "content": content}
    message |= {key: given[key] for key in KEPT if given.get(key) is not None}
    if speaker == "function_call":
        message |= {"content": "", "tool_calls": [call_of(content, where)]}
    elif given.get("tool_calls"):
        if role != "assistant" or not isinstance(given["tool_calls"], list):
            raise InputError(
                f"{where}: tool_calls is a list of calls, in a message of the assistant"
            )
        message["tool_calls"] = [call_of(each, where) for each in given["tool_calls"]]
    check_message(message, given, where, trained)
    return message


def check_message(message: Message, given: Mapping[str, Any], where: str, trained: bool) -> None:
    """InputError for what would be trained on wrongly, or not at all."""
    for key in KEPT:
        if key in message and not isinstance(message[key], str):
            raise InputError(f"{where}: {key!r} is to be a string, found {json_type(message[key])}")
    if message["role"] == "assistant":
        if not message["content"].strip() and "tool_calls" not in message:
            raise InputError(f"{where} is empty: the assistant would learn to say nothing")
        if trained and (given.get("weight") not in (None, 1) or given.get("train") is False):
            raise InputError(f"{where} is not to be trained on, but every turn of the assistant is")
    elif given.get("content", given.get("value")) is None:
        raise InputError(f"{where} has no content")


def text_of(content: Any, where: str) -> str:
    """A message's content as one string; none is the empty one."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise InputError(f"{where}: the content is to be a string, found {json_type(content)}")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
            raise InputError(
                f"{where}: the content has a part of kind {kind!r}: only text is trained on"
            )
    return "".join(part["text"] for part in content)


def call_of(given: Any, where: str) -> dict[str, Any]:
    """A tool call: its function's name, and its arguments as an object, which templates write as JSON."""
    if isinstance(given, str):
        given = from_json(given, "a tool call", where)
    call = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise InputError(f"{where}: a tool call is an object with a function's name and arguments")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"the arguments of {call['name']!r}", where)
    if not isinstance(arguments, Mapping | None):
        raise InputError(f"{where}: the arguments of {call['name']!r} are no object")
    function = {"name": call["name"], "arguments": dict(arguments or {})}
    return {"type": "function", "function": function}


def tools_of(given: Any) -> list[dict[str, Any]] | None:
    """The tools of a record, which may be written as JSON in a string; None where it has none."""
    if isinstance(given, str) and given.strip():
        given = from_json(given, "tools", "tools")
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise InputError("tools is to be a list of JSON schemas, one a function")
    return [dict(tool) for tool in given]


def from_json(text: str, what: str, where: str) -> Any:
    """The value that a string writes as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {what} is not JSON ({error}): {excerpt(text)}") from error
