"""Conversation schema: parses all supported record formats and reports why a record is invalid."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from data.errors import BadRecord

Message = dict[str, Any]  # the keys that chat templates read: role, content, reasoning_content, tool_calls, ...
Messages = list[Message]

ROLES = {role: role for role in ("system", "user", "assistant")}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
PAIRS = (("prompt", "response"), ("question", "answer"))
KEYS = {"messages", "conversations", "turns", "system", *PAIRS[0], *PAIRS[1]}  # fields of a record that are read
FORMATS = "`messages`, `conversations`, `prompt` and `response`, `question` and `answer`, or `turns`"


@dataclass(frozen=True)
class Written:
    """An answer as the target wrote it."""

    token_ids: list[int] | None  # including the stop token, if the target wrote one; None if only the text is known
    truncated: bool  # generation ended at the token limit, so the answer has no end token


@dataclass(frozen=True)
class Conversation:
    """A conversation, with everything that affects its rendering and supervision."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None  # JSON schemas, passed to the chat template as `tools`
    untrained: frozenset[int] = frozenset()  # indices of assistant messages that are history only, not supervised
    written: Mapping[int, Written] = field(default_factory=dict)  # by message index


def conversation(record: Any) -> Conversation:
    """Parse a training record into a conversation that ends with an assistant turn.

    Raises:
        BadRecord: the record has no assistant turn, or is not a valid conversation.
    """
    messages = _messages(record)
    written = _written(record, messages)
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecord("no assistant turn; generate answers with python -m data.regenerate")
    while messages[-1]["role"] != "assistant":
        messages.pop()  # an unanswered turn is not supervised, and may change how templates render the last answer
    return Conversation(messages, written=written)


def questions(record: Any) -> Conversation:
    """Return the system and user turns of a record, for the target to answer turn by turn.

    Raises:
        BadRecord: the record is not a valid conversation.
    """
    return Conversation([message for message in _messages(record) if message["role"] != "assistant"])


def prompt(record: Any) -> Conversation:
    """Return the conversation up to and including its last user turn, or its first if the record has no answers.

    Raises:
        BadRecord: the record is not a valid conversation.
    """
    messages = _messages(record)
    if messages[-1]["role"] == "assistant":
        messages.pop()
    answered = any(message["role"] == "assistant" for message in messages)
    first_user = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return Conversation(messages if answered else messages[: first_user + 1])


def _messages(record: Any) -> Messages:
    """Parse a record into chat messages and check the order of their roles."""
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, found {_kind(record)}")
    messages = _parse(record)
    roles = [message["role"] for message in messages]
    for number, role in enumerate(roles, start=1):
        if role == "system" and number > 1:
            raise BadRecord(f"turn {number}: only the first turn may be a system message")
    dialogue = roles[1:] if roles[0] == "system" else roles
    if not dialogue:
        raise BadRecord("has only a system message; expected a user turn")
    if dialogue[0] == "assistant":
        raise BadRecord("starts with an assistant turn; expected a user turn")
    if "assistant" in dialogue:
        for number, (previous, current) in enumerate(pairwise(roles), start=2):
            if previous == current:
                raise BadRecord(f"turn {number}: second consecutive {current} turn")
    return messages


def _parse(record: dict[str, Any]) -> Messages:
    """Parse any supported record format. Null values count as missing, since table rows contain every column."""
    given = {key for key, value in record.items() if value is not None}
    if "messages" in given:
        messages = _turns(record["messages"], "messages", "role", "content", ROLES)
    elif "conversations" in given:
        messages = _turns(record["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    elif pair := next((pair for pair in PAIRS if given >= set(pair)), None):
        messages = [_message("user", record[pair[0]], pair[0]), _message("assistant", record[pair[1]], pair[1])]
    elif "turns" in given:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns:
            raise BadRecord(f"`turns`: expected a list of user turns, found {_kind(turns)}")
        messages = [_message("user", turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]
    elif incomplete := next((pair for pair in PAIRS if given & set(pair)), None):
        present, missing = sorted(incomplete, key=lambda key: key not in given)
        raise BadRecord(f"`{present}` without `{missing}`")
    else:
        raise BadRecord(f"expected {FORMATS}; found keys: {', '.join(sorted(map(str, record))) or 'none'}")
    if record.get("system") and messages[0]["role"] != "system":  # ShareGPT files may keep it outside the turns
        messages.insert(0, _message("system", record["system"], "system"))
    return messages


def _turns(turns: Any, key: str, role_key: str, text_key: str, roles: dict[str, str]) -> Messages:
    if not isinstance(turns, list):
        raise BadRecord(f"`{key}`: expected a list of turns, found {_kind(turns)}")
    if not turns:
        raise BadRecord(f"`{key}` is empty")
    messages: Messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"turn {number}"
        if not isinstance(turn, dict):
            raise BadRecord(f"{where}: expected an object, found {_kind(turn)}")
        keys = (role_key,) if turn.get("token_ids") else (role_key, text_key)
        for required in keys:
            if turn.get(required) is None:
                raise BadRecord(f"{where}: missing `{required}`")
        if turn.get("tool_calls"):
            raise BadRecord(f"{where}: tool calls are not supported")
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise BadRecord(f"{where}: unknown role {role!r:.40}; expected one of {', '.join(roles)}")
        if turn.get("token_ids") and not (turn.get(text_key) or "").strip():
            messages.append({"role": roles[role], "content": ""})  # the tokens are known; the text is only history
        else:
            messages.append(_message(roles[role], turn[text_key], where))
        if turn.get("reasoning_content"):  # read separately from the answer by templates of reasoning models
            messages[-1]["reasoning_content"] = _message(role, turn["reasoning_content"], where)["content"]
    return messages


def _written(record: dict[str, Any], messages: Messages) -> dict[int, Written]:
    """Return the answers whose tokens are in the record or that ended at the token limit, by message index."""
    turns = record.get("messages") or record.get("conversations") or []
    system = len(messages) - len(turns)  # 1 if the system message is kept outside the turns
    found = {}
    for number, turn in enumerate(turns, start=1):
        ids, truncated = turn.get("token_ids"), turn.get("truncated")
        if ids is None and not truncated:
            continue
        message, where = messages[number - 1 + system], f"turn {number}"
        if message["role"] != "assistant":
            raise BadRecord(f"{where}: `token_ids` and `truncated` describe answers, not a {message['role']} turn")
        if not isinstance(truncated, bool | None):
            raise BadRecord(f"{where}: `truncated`: expected true or false, found {_kind(truncated)}")
        if ids is not None and not (isinstance(ids, list) and ids and all(type(x) is int and x >= 0 for x in ids)):
            raise BadRecord(f"{where}: `token_ids`: expected a list of token ids, found {_kind(ids)}")
        found[number - 1 + system] = Written(ids, bool(truncated))
    return found


def _message(role: str, content: Any, where: str) -> dict[str, str]:
    if not isinstance(content, str):
        raise BadRecord(f"{where}: expected a string, found {_kind(content)}")
    if not content.strip():
        raise BadRecord(f"{where}: the text is empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{where}: contains a lone surrogate, which is not valid Unicode") from None
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    """Return the JSON type of a value for error messages, e.g. `a list`."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    kind = names.get(type(value), "null" if value is None else type(value).__name__)
    return f"an empty {kind.split()[-1]}" if kind in ("a list", "a string") and not value else kind
