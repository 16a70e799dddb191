"""Tool calls in chat templates: the form that a template expects, and whether it writes them.

Templates differ in the form of a call: most expect the arguments as an object and empty text, some the arguments as
JSON text or no text at all. The first form in which a template writes a sample call is used for all conversations;
a template that prints an object as Python does (`{'city': 'Lisbon'}`) expects JSON text.
Mistral's templates also require ids of nine letters and digits, which the target itself chooses at random. Kimi K2's
write an id such as `functions.get_forecast:0` in place of the name; the number counts the calls of a conversation.
Other ids, and missing ones, are replaced for them.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from data.errors import BadRecord
from data.sources.records import Message, Messages

NAME, VALUE = "get_forecast", "Lisbon"
ARGUMENTS = {"city": VALUE, "daily": True}
PYTHON = re.compile(rf"""\{{\s*'city': '{VALUE}'""")  # an object as Python prints it
SAMPLE_TOOL = {  # another name than in the call, so that only calls have that name
    "name": "look_up",
    "description": "Return the forecast.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}, "daily": {"type": "boolean"}},
    },
}
SAMPLE: Messages = [
    {"role": "user", "content": "What is the forecast?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "a1b2c3d4e", "function": {"name": NAME, "arguments": ARGUMENTS}}],
    },
]


@dataclass(frozen=True)
class CallForm:
    """The form of tool calls in the messages that a template renders."""

    json_text: bool = False  # arguments as JSON text
    no_text: bool = False  # no text at all beside the calls, instead of an empty one
    ids: str | None = None  # "short": nine letters and digits; "named": the function's name and the call's number

    def apply(self, messages: Messages) -> Messages:
        """Return the messages of a conversation with all calls in this form."""
        messages = _with_ids(messages, self.ids == "named") if self.ids else messages
        return [self._apply(message) for message in messages] if self.json_text or self.no_text else messages

    def _apply(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls:
            return message
        if self.json_text:
            calls = [call | {"function": _with_json_text(call["function"])} for call in calls]
        omitted = "content" if self.no_text and not message["content"] else None
        return {key: value for key, value in message.items() if key != omitted} | {"tool_calls": calls}


def call_form(render: Callable[..., str]) -> CallForm:
    """Return the first form in which a template writes a sample call, or the usual form if it writes none."""
    forms = [CallForm(json_text, no_text) for json_text in (False, True) for no_text in (False, True)]
    for form in forms:
        if _writes(render, form.apply(SAMPLE)):
            return form if _writes(render, form.apply(_without_ids(SAMPLE))) else replace(form, ids="short")
    named = [replace(form, ids="named") for form in forms]
    return next((form for form in named if _writes(render, form.apply(SAMPLE))), forms[0])


def _writes(render: Callable[..., str], messages: Messages) -> bool:
    try:
        text = render(messages, False, tools=[{"type": "function", "function": SAMPLE_TOOL}])
    except BadRecord:
        return False
    return VALUE in text and NAME in text and not PYTHON.search(text)


def _without_ids(messages: Messages) -> Messages:
    call = {key: value for key, value in messages[-1]["tool_calls"][0].items() if key != "id"}
    return [*messages[:-1], messages[-1] | {"tool_calls": [call]}]


def _with_ids(messages: Messages, named: bool) -> Messages:
    """Give calls, and their results, ids in the form of a template. Results without an id belong to calls in order."""
    found: Messages = []
    waiting: list[tuple[str | None, str]] = []  # original and new ids of the calls without a result
    count = 0
    for turn, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            new = [_named_id(c, count + i) if named else _short_id(c, f"{turn}/{i}") for i, c in enumerate(calls)]
            waiting, count = [(call.get("id"), name) for call, name in zip(calls, new, strict=True)], count + len(calls)
            pairs = zip(calls, new, strict=True)
            message = message | {"tool_calls": [call | {"id": name} for call, name in pairs]}
        elif message["role"] == "tool" and waiting:
            given = message.get("tool_call_id")
            answered = next((pair for pair in waiting if given is not None and pair[0] == given), waiting[0])
            waiting = [pair for pair in waiting if pair != answered] or waiting
            message = message | {"tool_call_id": answered[1]}
        found.append(message)
    return found


def _named_id(call: dict[str, Any], number: int) -> str:
    start, given = f"functions.{call['function']['name']}:", str(call.get("id") or "")
    return given if given.startswith(start) and given[len(start) :].isdecimal() else f"{start}{number}"


def _short_id(call: dict[str, Any], place: str) -> str:
    name = str(call.get("id") or place)
    short = len(name) == 9 and name.isascii() and name.isalnum()
    return name if short else hashlib.blake2b(name.encode(), digest_size=5).hexdigest()[:9]


def dropped_call(calls: list[dict[str, Any]], text: str) -> str | None:
    """Return the name of a call that a rendered answer does not contain, or contains without its arguments.

    Templates write arguments as JSON, XML or code, so only names and plain values are compared.
    """
    functions = [call["function"] for call in calls]
    for name, count in Counter(function["name"] for function in functions).items():
        if text.count(name) < count:
            return name
    for function in functions:
        arguments = function["arguments"]
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not all(_written(key, text) for key in values) or not all(_written(v, text) for v in _leaves(values)):
            return function["name"]
    return None


def result_written(content: str, text: str) -> bool:
    """Return whether a text contains the result of a tool, as it is or as a JSON string."""
    forms = (content.strip(), json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
    return any(form in text for form in forms)


def _with_json_text(function: dict[str, Any]) -> dict[str, Any]:
    return function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]


def _written(value: Any, text: str) -> bool:
    """Return whether a key or value is in a text. Values that templates may write in several ways count as written."""
    if isinstance(value, str):
        return not value.isalnum() or not value.isascii() or value in text
    return not isinstance(value, int) or isinstance(value, bool) or str(value) in text
