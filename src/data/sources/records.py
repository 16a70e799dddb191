"""Conversation schema: parses all supported record formats and reports why a record is invalid."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from data.errors import BadRecord
from data.sources.forms import KEYS, read_record
from data.sources.tags import result_in_text
from data.sources.tools import calls_in_text, kind
from data.sources.turns import Message, Messages, Turn, Written

__all__ = ["KEYS", "Conversation", "Message", "Messages", "Written", "conversation", "parsed", "prompt", "questions"]


@dataclass(frozen=True)
class Conversation:
    """A conversation, with everything that affects its rendering and supervision."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None  # JSON schemas, passed to the chat template as `tools`
    untrained: frozenset[int] = frozenset()  # indices of assistant messages that are history only, not supervised
    written: Mapping[int, Written] = field(default_factory=dict)  # by message index
    skipped: int = 0  # number of answers before the first question, which are left out
    kind: str | None = None  # declared kind of its answers (`data.sources.kinds`), for evaluation prompts
    offset: int = field(default=0, compare=False)  # turn number in the record, minus that in `messages`


def conversation(record: Any) -> Conversation:
    """Parse a training record into a conversation that ends with an assistant turn.

    Raises:
        BadRecord: the record has no assistant turn to train on, or is not a valid conversation.
    """
    found = parsed(record)
    answers = [turn for turn, message in enumerate(found.messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no assistant turn; generate answers with python -m data.regenerate")
    if found.untrained.issuperset(answers):
        raise BadRecord("no assistant turn to train on: weight or train excludes all of them")
    # An unanswered turn is not supervised, and may change how templates render the last answer.
    del found.messages[answers[-1] + 1 :]
    return found


def questions(record: Any) -> Conversation:
    """Return the system and user turns of a record, for the target to answer turn by turn.

    They end with the first question whose recorded answer calls a tool: later turns depend on the results of calls that
    the target may not make.

    Raises:
        BadRecord: the record is not a valid conversation.
    """
    found = parsed(record)
    calls = next((turn for turn, message in enumerate(found.messages) if "tool_calls" in message), None)
    return Conversation([m for m in found.messages[:calls] if m["role"] != "assistant"], found.tools)


def prompt(record: Any) -> Conversation:
    """Return the conversation before its last answer, or up to its first user turn if the record has no answers.

    Raises:
        BadRecord: the record is not a valid conversation.
    """
    found = parsed(record)
    messages = found.messages
    if messages[-1]["role"] == "assistant":
        messages.pop()
    answered = any(message["role"] == "assistant" for message in messages)
    first_user = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return Conversation(messages if answered else messages[: first_user + 1], found.tools)


def parsed(record: Any) -> Conversation:
    """Parse a record into a conversation and check the order of its turns.

    Answers before the first question are left out. Datasets such as ShareGPT split long conversations, so that later
    parts start with an answer whose question is missing.

    Raises:
        BadRecord: the record is not a valid conversation.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, found {kind(record)}")
    turns, tools = read_record(record)
    skipped = _leading_answers(turns)
    offset = _offset(turns)
    messages = [turn.message for turn in turns]
    _check_order(messages, offset)
    if tools and turns[-1].written is None:
        _read_last_calls(messages[-1], tools)
    untrained = frozenset(i for i, turn in enumerate(turns) if not turn.trained and _is_answer(turn))
    written = {i: turn.written for i, turn in enumerate(turns) if turn.written}
    return Conversation(messages, tools, untrained, written, skipped, offset=offset)


def _leading_answers(turns: list[Turn]) -> int:
    """Remove the answers before the first user turn and return their number. Without a user turn, keep them."""
    start = 1 if turns and turns[0].message["role"] in ("system", "developer") else 0
    first = next((i for i in range(start, len(turns)) if not _is_answer(turns[i])), start)
    if first == start or turns[first].message["role"] != "user":
        return 0
    del turns[start:first]
    return first - start


def _offset(turns: list[Turn]) -> int:
    """Return the difference between turn numbers in the record and in `turns`."""
    numbered = ((n, turn) for n, turn in enumerate(turns, start=1) if turn.number)
    own = ((n, turn) for n, turn in numbered if turn.message["role"] not in ("system", "developer"))
    return next((turn.number - n for n, turn in own), 0)


def _is_answer(turn: Turn) -> bool:
    return turn.message["role"] == "assistant"


def _check_order(messages: Messages, offset: int) -> None:
    """Check the order of the roles. Turn calls in the text of an answer before a tool turn into tool calls.

    Args:
        messages: all messages.
        offset: number of turns that precede the messages in the record; -1 if the system message is not a turn.
    """
    roles = [message["role"] for message in messages]
    for index, role in enumerate(roles):
        if role in ("system", "developer") and index:
            raise BadRecord(f"turn {index + offset + 1}: only the first turn may be a {role} message")
    dialogue = roles[1:] if roles and roles[0] in ("system", "developer") else roles
    if not dialogue:
        raise BadRecord(f"has only a {roles[0] if roles else 'system'} message; expected a user turn")
    if dialogue[0] != "user":
        raise BadRecord(
            f"starts with {'an assistant' if dialogue[0] == 'assistant' else 'a tool'} turn; expected a user turn"
        )
    if "assistant" not in dialogue and "tool" not in dialogue:
        return
    for number, (previous, current) in enumerate(pairwise(messages), start=2 + offset):
        _check_pair(previous, current, f"turn {number}")
    if "tool" in dialogue:
        _check_ids(messages, offset)


def _check_pair(previous: Message, current: Message, where: str) -> None:
    before, after = previous["role"], current["role"]
    if after == "tool":
        _read_tags(previous, current, where)
        if before != "tool" and "tool_calls" not in previous:
            found = "an assistant turn without calls" if before == "assistant" else f"a {before} turn"
            raise BadRecord(f"{where}: a tool turn must follow an assistant turn with tool calls, found {found}")
    elif before == "tool" and after != "assistant":
        raise BadRecord(f"{where}: expected an assistant turn after the results of tools, found a {after} turn")
    elif "tool_calls" in previous:
        article = "an" if after == "assistant" else "a"
        raise BadRecord(f"{where}: expected a tool turn after tool calls, found {article} {after} turn")
    elif before == after:
        raise BadRecord(f"{where}: second consecutive {after} turn")


def _read_tags(previous: Message, result: Message, where: str) -> None:
    """Parse calls and results in the text of their turns, as in Hermes' data sets."""
    result["content"] = result_in_text(result["content"])
    if previous["role"] == "assistant" and "tool_calls" not in previous:
        text, calls = calls_in_text(previous["content"], f"answer before {where}")
        if calls:
            previous |= {"content": text, "tool_calls": calls}


def _read_last_calls(message: Message, tools: list[dict[str, Any]]) -> None:
    """Parse calls at the end of a conversation with tools, as in Hermes' single turns. Other text stays as it is.

    A call of another function is an example in the text.
    """
    if message["role"] == "assistant" and "tool_calls" not in message:
        try:
            text, calls = calls_in_text(message["content"], "last turn")
        except BadRecord:
            return
        names = {tool["function"]["name"] for tool in tools}
        if calls and all(call["function"]["name"] in names for call in calls):
            message |= {"content": text, "tool_calls": calls}


def _check_ids(messages: Messages, offset: int) -> None:
    """Check that each `tool_call_id` is the id of a call in the turn that the results follow. Add the tool's name."""
    ids: dict[str, str] = {}
    for number, message in enumerate(messages, start=1 + offset):
        if "tool_calls" in message:
            ids = {call["id"]: call["function"]["name"] for call in message["tool_calls"] if "id" in call}
        if ids and message.get("tool_call_id", next(iter(ids))) not in ids:
            raise BadRecord(
                f"turn {number}: tool_call_id {message['tool_call_id']!r:.40} is not the id of a preceding call"
            )
        if message.get("tool_call_id") in ids:
            message.setdefault("name", ids[message["tool_call_id"]])
