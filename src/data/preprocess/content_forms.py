"""Content of messages in chat templates: the form in which a template reads text and reasoning.

Most templates read text as a string. Some read a list of parts for all roles or some of them, and Magistral's reads
reasoning as a part in front of the text. A form is chosen only if the template does not write a sample as a string, or
the reasoning in a field.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from data.errors import BadRecord
from data.preprocess.tool_calls import SAMPLE, call_form
from data.sources.records import Message, Messages
from data.sources.turns import REASONING

SAMPLE_TEXT = "Count the apples of each day in turn."  # shows whether a template writes a message
SAMPLE_THOUGHT = "There are several days."
QUESTION: Message = {"role": "user", "content": "Go on."}
PRINTED = ("'text'", '"text"')  # in a list that a template prints as Python or as JSON


@dataclass(frozen=True)
class ContentForm:
    """The form of content in the messages that a template renders."""

    parts: frozenset[str] = frozenset()  # roles whose text is a list of parts
    thinking: str | None = None  # reasoning as a part with a text ("text") or with a list of parts ("parts")

    def apply(self, messages: Messages) -> Messages:
        """Return the messages of a conversation with all content in this form."""
        return [self._apply(message) for message in messages] if self.parts or self.thinking else messages

    def _apply(self, message: Message) -> Message:
        content, reasoning = message.get("content"), message.get("reasoning_content")
        if not isinstance(content, str):
            return message
        if self.thinking and reasoning:
            thought = {"type": "thinking", "thinking": _parts(reasoning) if self.thinking == "parts" else reasoning}
            others = {key: value for key, value in message.items() if key not in REASONING}
            return others | {"content": [thought, *(_parts(content) if content else [])]}
        return message | {"content": _parts(content)} if message["role"] in self.parts else message


def content_form(render: Callable[..., str]) -> ContentForm:
    """Return the form of content that a template reads, where it does not write text as a string.

    Args:
        render: renders messages, with or without a generation prompt and with further arguments.
    """
    form = ContentForm()
    for role in ("user", "system", "developer", "assistant", "tool"):
        sample = _sample(role, form, render)
        with_role = replace(form, parts=form.parts | {role})
        if not _writes(render, form.apply(sample)) and _writes(render, with_role.apply(sample), parts=True):
            form = with_role
    thought = [QUESTION, {"role": "assistant", "content": SAMPLE_TEXT} | dict.fromkeys(REASONING, SAMPLE_THOUGHT)]
    if not _writes(render, form.apply(thought), SAMPLE_THOUGHT):
        for thinking in ("text", "parts"):
            as_part = replace(form, thinking=thinking)
            if _writes(render, as_part.apply(thought), SAMPLE_THOUGHT, parts=True):
                return as_part
    return form


def _sample(role: str, form: ContentForm, render: Callable[..., str]) -> Messages:
    """Return messages in which the sample text is the content of a role."""
    if role == "user":
        return [{"role": role, "content": SAMPLE_TEXT}]
    if role in ("system", "developer"):
        return [{"role": role, "content": SAMPLE_TEXT}, QUESTION]
    if role == "assistant":
        return [QUESTION, {"role": role, "content": SAMPLE_TEXT}]
    calls = call_form(lambda messages, *given, **others: render(form.apply(messages), *given, **others))
    called = calls.apply(SAMPLE)
    return [*called, {"role": role, "content": SAMPLE_TEXT, "tool_call_id": called[-1]["tool_calls"][0]["id"]}]


def _writes(render: Callable[..., str], sample: Messages, *others: str, parts: bool = False) -> bool:
    """Return whether a template writes the sample text and others, and no list of parts itself."""
    try:
        text = render(sample, sample[-1]["role"] != "assistant")
    except BadRecord:
        return False
    return all(part in text for part in (SAMPLE_TEXT, *others)) and not (parts and any(p in text for p in PRINTED))


def _parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]
