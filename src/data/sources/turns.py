"""Parses a turn of a record into a chat message. Every key is read, known to be metadata, or refused."""

import unicodedata
from dataclasses import dataclass
from typing import Any

from data.errors import BadRecord
from data.sources.tags import without_reasoning
from data.sources.tools import kind, read_calls, read_id, read_tools

Message = dict[str, Any]  # the keys that chat templates read: role, content, reasoning_content, tool_calls, ...
Messages = list[Message]

CALLS = ("function_call", "tool_call")  # roles of turns whose text is a tool call, in ShareGPT's form
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "developer", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant"},
    **dict.fromkeys(CALLS, "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response"), "tool"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("weight", "train", "loss")  # names in OpenAI's, axolotl's and ms-swift's data
READ: dict[str, set[str]] = {
    "system": {"tools", "functions"},
    "developer": {"tools", "functions"},
    "user": set(),
    "assistant": {*REASONING, "tool_calls", "function_call", "token_ids", "truncated"},
    "tool": {"tool_call_id"},
}
METADATA = {
    "id", "uuid", "message_id", "parent_id", "turn_id", "turn_identifier", "index", "timestamp", "time", "date",
    "created", "created_at", "create_time", "update_time", "state", "model", "source", "language", "lang", "country",
    "hashed_ip", "header", "redacted", "toxic", "metadata", "meta", "score", "rating", "num_tokens", "token_count",
    "tokens", "length",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Written:
    """An answer as the target wrote it."""

    token_ids: list[int] | None  # including the stop token, if the target wrote one; None if only the text is known
    truncated: bool  # generation ended at the token limit, so the answer has no end token


@dataclass(slots=True)
class Turn:
    """A parsed turn."""

    message: Message
    trained: bool = True
    written: Written | None = None
    tools: list[dict[str, Any]] | None = None
    number: int = 0  # in the record's list of turns


def text_message(role: str, content: Any, where: str) -> Message:
    """Return a message of plain text.

    Raises:
        BadRecord: the content is not a string, empty, or not valid Unicode.
    """
    if not isinstance(content, str):
        raise BadRecord(f"{where}: expected a string, found {kind(content)}")
    if is_blank(content):
        raise BadRecord(f"{where}: the text is empty")
    return {"role": role, "content": _valid(content, where)}


def is_blank(text: str) -> bool:
    """Return whether a text has only white space and invisible format characters, such as zero-width spaces."""
    if text[:1].isalnum():
        return False  # fast
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def plain_turn(turn: Any) -> Turn | None:
    """Parse a turn of only a role and a text, the common case, fast. Return None for all others."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, text = (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    if type(role) is not str or type(text) is not str or role in CALLS or role not in ROLES or is_blank(text):
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return Turn({"role": ROLES[role], "content": text})


def read_turn(turn: Any, where: str) -> Turn:
    """Parse a turn with `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        BadRecord: the turn is invalid, or has a key that may change its meaning and is not read.
    """
    if not isinstance(turn, dict):
        raise BadRecord(f"{where}: expected an object, found {kind(turn)}")
    share_gpt = "from" in turn or "value" in turn
    role_key = "from" if share_gpt and "role" not in turn else "role"
    text_key = "value" if share_gpt and "content" not in turn else "content"
    given = turn.get(role_key)
    if given is None:
        raise BadRecord(f"{where}: missing `{role_key}`")
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise BadRecord(f"{where}: unknown role {given!r:.40}; expected one of {', '.join(ROLES)}")
    is_call = given.lower() in CALLS
    extra = {key: value for key, value in turn.items() if key not in (role_key, text_key) and not _absent(key, value)}
    _refuse_unknown(extra, role, where)
    content: Any = turn.get(text_key)
    calls = [extra[key] for key in ("tool_calls", "function_call") if key in extra]
    if is_call:
        calls, content = [*calls, content] if content or not calls else calls, ""
    return _turn(role, content, text_key, extra, _calls(calls, where), where)


def _calls(given: list[Any], where: str) -> list[dict[str, Any]] | None:
    """Parse the calls of a turn, which may have several keys for them."""
    found = [read_calls(calls, where) for calls in given]
    if any([call["function"] for call in calls] != [call["function"] for call in found[0]] for calls in found):
        raise BadRecord(f"{where}: several keys hold different tool calls; keep `tool_calls`")
    return found[0] if found else None


def _turn(
    role: str, content: Any, text_key: str, extra: dict[str, Any], calls: list[dict[str, Any]] | None, where: str
) -> Turn:
    written = _written(extra, where)
    if content is None and calls is None and written is None:
        raise BadRecord(f"{where}: missing `{text_key}`")
    text, thought = _parts(content, where) if isinstance(content, list) else ("" if content is None else content, None)
    if thought is not None and role != "assistant":
        raise BadRecord(f"{where}: reasoning in a {role} turn")
    reasoning = _reasoning(extra, thought, where)
    if reasoning and isinstance(text, str) and not (written and written.token_ids):
        text = without_reasoning(text, reasoning)
        if text is None:
            raise BadRecord(f"{where}: the text has other reasoning than the field; keep one of them")
    may_be_empty = calls is not None or role in ("tool", "system", "developer") or bool(written and written.token_ids)
    if isinstance(text, str) and is_blank(text) and may_be_empty:
        message: Message = {"role": role, "content": _valid(text, where) if role == "tool" else ""}
    else:
        message = text_message(role, text, where)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = calls
    if "tool_call_id" in extra:
        extra["tool_call_id"] = read_id(extra["tool_call_id"], f"{where}, `tool_call_id`")
    for key in ("tool_call_id", "name"):
        if key in extra:
            message[key] = text_message(role, extra[key], f"{where}, `{key}`")["content"]
    tools = [read_tools(extra[key], f"{where}, `{key}`") for key in ("tools", "functions") if key in extra]
    if any(schemas != tools[0] for schemas in tools):
        raise BadRecord(f"{where}: `tools` and `functions` differ; keep one of them")
    return Turn(message, _trained(extra, role, where), written, tools[0] if tools else None)


def _refuse_unknown(extra: dict[str, Any], role: str, where: str) -> None:
    for key in extra:
        if key not in METADATA and key not in READ[role] and key not in FLAGS and key != "name":
            if key in ("token_ids", "truncated"):
                raise BadRecord(f"{where}: `token_ids` and `truncated` describe answers, not a {role} turn")
            if any(key in keys for keys in READ.values()):
                raise BadRecord(f"{where}: `{key}` in a {role} turn")
            raise BadRecord(f"{where}: unknown key `{key}`, which may change the meaning; remove or rename it")


def _parts(parts: list[Any], where: str) -> tuple[str, str | None]:
    """Join content parts into text and reasoning, which is in front of the text."""
    texts: list[str] = []
    thoughts: list[str] = []
    for number, part in enumerate(parts, start=1):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise BadRecord(f"{where}, part {number}: expected an object, found {kind(part)}")
        name = part.get("type", "text" if "text" in part else None)
        text = part.get("text") if name in TEXT_PARTS else part.get("thinking", part.get("text"))
        if name == "thinking" and isinstance(text, list):  # Mistral's form
            text, nested = _parts(text, f"{where}, part {number}")
            if nested is not None:
                raise BadRecord(f"{where}, part {number}: expected parts of text")
        if name not in (*TEXT_PARTS, "thinking", "reasoning"):
            raise BadRecord(f"{where}, part {number}: content of type {name!r:.40} is not supported; expected 'text'")
        if not isinstance(text, str):
            raise BadRecord(f"{where}, part {number}: expected a string, found {kind(text)}")
        if name not in TEXT_PARTS and any(map(str.strip, texts)):
            raise BadRecord(f"{where}, part {number}: reasoning after text; only reasoning in front of it is supported")
        (texts if name in TEXT_PARTS else thoughts).append(text)
    return "".join(texts), "".join(thoughts) or None


def _reasoning(extra: dict[str, Any], thought: str | None, where: str) -> str | None:
    found = [extra[key] for key in REASONING if key in extra] + [thought] * (thought is not None)
    if any(text != found[0] for text in found):
        raise BadRecord(f"{where}: several keys hold different reasoning; keep one of {', '.join(REASONING)}")
    if not found:
        return None
    if not isinstance(found[0], str):
        raise BadRecord(f"{where}, reasoning: expected a string, found {kind(found[0])}")
    return None if is_blank(found[0]) else _valid(found[0], where)


def _trained(extra: dict[str, Any], role: str, where: str) -> bool:
    """Return whether a turn is supervised, by its `weight`, `train` or `loss`."""
    for key in FLAGS if role != "assistant" else ():
        if extra.get(key) is not None and extra[key]:
            raise BadRecord(f"{where}: `{key}`={extra[key]!r:.40}: only assistant turns are trained on; remove it")
    return read_flags(extra, where)


def read_flags(given: dict[str, Any], where: str) -> bool:
    """Return whether a turn, or a record's answers, are supervised by `weight`, `train` or `loss`.

    Raises:
        BadRecord: a value is not 0 or 1, or they contradict each other.
    """
    values = {key: given[key] for key in FLAGS if given.get(key) is not None}
    for key, value in values.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRecord(f"{where}: `{key}`={value!r:.40}: expected 0 or 1, or false or true")
    if len({bool(value) for value in values.values()}) > 1:
        raise BadRecord(f"{where}: {' and '.join(f'`{key}`' for key in values)} contradict each other")
    return all(values.values())


def _written(extra: dict[str, Any], where: str) -> Written | None:
    ids, truncated = extra.get("token_ids"), extra.get("truncated", False)
    if not isinstance(truncated, bool):
        raise BadRecord(f"{where}: `truncated`: expected true or false, found {kind(truncated)}")
    if ids is not None and not (
        isinstance(ids, list) and ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)
    ):
        raise BadRecord(f"{where}: `token_ids`: expected a list of token ids, found {kind(ids)}")
    return Written(ids, truncated) if ids is not None or truncated else None


def _absent(key: str, value: Any) -> bool:
    """Return whether a value counts as missing: rows of a table, and dumps of an API, contain every key."""
    return value is None or isinstance(value, str | list | dict) and not value and key != "token_ids"


def _valid(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{where}: contains a lone surrogate, which is not valid Unicode") from None
    return text
