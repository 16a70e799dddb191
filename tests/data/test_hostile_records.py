"""Hostile records: odd values are refused with a reason, and no text takes long to search."""

import copy
import json
import random
import re
import time

import pytest

from data.errors import BadRecord
from data.sources import kinds, tags
from data.sources.records import conversation, parsed, questions

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "t", "weight": 1}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": [1, {"y": "z"}]}}}
TEXT = "{'name': 'f', 'arguments': {'x': 1}}"
RESULT = {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "c", "name": "f"}
VALID = [
    {"tools": [{"type": "function", "function": FUNCTION}], "system": "s", "messages": [
        U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, A]},
    {"functions": [FUNCTION], "conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": TEXT},
        {"from": "observation", "value": "<tool_response>3</tool_response>"}, {"from": "gpt", "value": "a"}]},
    {"tools": json.dumps([FUNCTION]), "conversations": [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": f"<tool_call>{TEXT}</tool_call>"}]},
    {"query": "q", "answers": [CALL["function"]], "tools": json.dumps([FUNCTION])},
    {"instruction": "q", "input": "i", "output": "a", "history": [["p", "b"]], "thinking": "t"},
    {"question": "q", "context": "c", "answer": "a", "system_prompt": "s", "label": True},
    {"prompt": [U, A, U], "completion": [A | {"token_ids": [1, 2], "truncated": True}]},
    {"turns": ["q", "r"]},
]  # fmt: skip
ODD = [
    None, True, False, 0, 7, -1.5, 2**70, float("nan"), float("inf"), "", " ", "\u200b", "x", "\ud800", "null", "[]",
    "{{'a': 1}}", "[{1: {2}}]", "{'a': {1, 2}}", "{'a': b'x'}", "{(1, 2): 3}", '{"a": "\\ud800"}', '{"a": NaN}',
    "...", "[" * 200 + "]" * 200, "<tool_call>", "<tool_call>{{'a': 1}}</tool_call>", [], {}, [None], {"a": None},
    ["x"], [["x"]], [1.5], {"name": "f"}, {"name": 3}, {"name": "f", "arguments": {"a": float("nan")}}, b"x", (1, 2),
    {"role": "user"}, {"from": "gpt"}, {"type": "text"}, [{"type": "text", "text": "\ud800"}], {1: 2, "a": 3}, {1, 2},
]  # fmt: skip


def places(value, found):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found)
    return found


def mutated(draw):
    record = copy.deepcopy(draw.choice(VALID))
    for _ in range(draw.choice((1, 1, 2, 3))):
        holder, key = draw.choice(places(record, []))
        if isinstance(holder, dict) and draw.random() < 0.2:
            key = draw.choice(["tools", "tool_calls", "function_call", "id", "context", "response", "reasoning", 3])
        holder[key] = copy.deepcopy(draw.choice(ODD))
    return record


def test_odd_values_are_read_or_refused():
    draw = random.Random(0)
    read = 0
    for _ in range(1200):
        record = mutated(draw)
        for parse in (parsed, conversation, questions):
            try:
                found = parse(record)
            except BadRecord as error:
                assert str(error)
            else:
                read += 1
                text = json.dumps([found.messages, found.tools], ensure_ascii=False, allow_nan=False, sort_keys=True)
                assert text.encode("utf-8")
    assert read > 300


def test_valid_records_of_the_mutations_are_read():
    assert [len(parsed(record).messages) for record in VALID] == [5, 4, 2, 2, 4, 3, 4, 2]


SEARCHED = [value for module in (kinds, tags) for value in vars(module).values() if isinstance(value, re.Pattern)]
UNITS = (" ", "1", "a", "`", "<", "$", "=", "<tool_call>", "<tool_response> ", "</", "think", "class a", "<a\n", "1,")


@pytest.mark.parametrize("start", ["", "<think", "class "])
def test_searches_are_linear(start):
    for unit in UNITS:
        text = start + unit * (20_000 // len(unit)) + "x"
        searches = [p.match if p.pattern.startswith(r"\s") else p.findall for p in SEARCHED]
        for search in (*searches, tags.split_calls, tags.result_in_text, lambda text: kinds.text_kind(text, text)):
            seconds = []
            for _ in range(3):
                began = time.process_time()
                search(text)
                seconds.append(time.process_time() - began)
                if seconds[-1] < 0.05:
                    break
            assert min(seconds) < 0.05, (unit, search)
