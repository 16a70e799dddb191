"""Details of records: tags in texts, tool calls under several keys, ids."""

import json
import re

import pytest

from data.errors import BadRecord
from data.sources.records import conversation, parsed

U, A, RESULT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "3"}
F, G = {"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}
TAG = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def messages(*turns, **keys):
    return {"messages": list(turns), **keys}


def called(content, **keys):
    return messages(U, {"role": "assistant", "content": content, **keys}, RESULT, A)


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        (f"<think>Write {TAG}.</think>\n{TAG}", f"<think>Write {TAG}.</think>", [{}]),
        (f"Write {TAG}.</think>\n{TAG}", f"Write {TAG}.</think>", [{}]),
        (f"<think>Write <tool_call>.</think>{TAG}{TAG}", "<think>Write <tool_call>.</think>", [{}, {}]),
        (TAG.replace("{}", '{"x": "</tool_call>"}') + " b", "b", [{"x": "</tool_call>"}]),
        (TAG.replace("{}", '{"x": "</think>"}'), "", [{"x": "</think>"}]),
        ("a <tool_call>{'name': 'f', 'arguments': {1: (2,)}}</tool_call>", "a", [{"1": [2]}]),
    ],
)
def test_calls_in_a_text(text, content, arguments):
    message = conversation(called(text)).messages[1]
    assert message["content"] == content
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == arguments


FUNCTION_CALL = {"from": "Function_Call", "value": '{"name": "f", "arguments": "null"}'}
ACCEPTED = {
    "role in mixed case": {"conversations": [{"from": "Human", "value": "q"}, FUNCTION_CALL]},
    "the same call twice": messages(U, A | {"tool_calls": [F], "function_call": F}),
    "calls as JSON text beside a role": {"conversations": [{"from": "human", "value": "q"}, FUNCTION_CALL | {
        "tool_calls": [F]}]},
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_calls_are_read(name):
    assert [call["function"] for call in conversation(ACCEPTED[name]).messages[1]["tool_calls"]] == [F]


def test_ids_may_be_numbers():
    for given in (7, "7"):
        record = messages(U, A | {"tool_calls": [F | {"id": 7}]}, RESULT | {"tool_call_id": given}, A)
        turns = parsed(record).messages
        assert turns[1]["tool_calls"][0]["id"] == turns[2]["tool_call_id"] == "7"


REFUSED = {
    "different calls": (messages(U, A | {"tool_calls": [F], "function_call": G}), "turn 2: several keys hold"),
    "a call beside calls": (messages(U, {"role": "function_call", "content": str(F), "tool_calls": [G]}), "several"),
    "id of a wrong type": (called("", tool_calls=[F | {"id": ["c"]}]), "turn 2: tool call 1, `id`: expected a string"),
    "different tools of a turn": (
        messages({"role": "system", "content": "s", "tools": [F], "functions": [G]}, U, A), "turn 1: `tools` and"),
    "surrogate in a schema": (messages(U, A, tools='[{"name": "\\ud800"}]'), "`tools`: contains a lone surrogate"),
    "number that is not finite": (called("", tool_calls=['{"name": "f", "arguments": {"x": NaN}}']), "not valid JSON"),
    "deep nesting": (messages(U, A, tools=[{"name": "f", "parameters": json.loads('{"a": ' * 150 + '1' + '}' * 150)}]),
        "nested deeper than 100 levels"),
    "zero-width answer": (messages(U, A | {"content": " \u200b\u2060"}), "turn 2: the text is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    record, reason = REFUSED[name]
    with pytest.raises(BadRecord, match=re.escape(reason)):
        conversation(record)
