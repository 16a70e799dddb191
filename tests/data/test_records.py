"""Every form of public data sets is read into the messages, tools and flags that chat templates and training need."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources.readers import open_sources, read_all
from data.sources.records import Conversation, Written, conversation, prompt, questions

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
RESULT = {"role": "tool", "content": "3"}


def calls(*given, **keys):
    return {"role": "assistant", "content": "", "tool_calls": list(given), **keys}


SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PLAIN = {
    "conversations with role and content": {"conversations": [U, A]},
    "messages with from and value": {"messages": SHAREGPT},
    "messages as JSON text": {"messages": json.dumps([U, A])},
    "columns of a table": {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
    "an empty list beside": {"messages": [], "conversations": SHAREGPT},
    "other names of roles": {"messages": [U | {"role": "User"}, A | {"role": "model"}]},
    "a metadata key": {"id": 7, "source": "x", "messages": [U | {"timestamp": 3}, A | {"refusal": None}]},
    "an empty system prompt": {"messages": [{"role": "system", "content": " "}, U, A], "system": ""},
    "text parts": {"messages": [U | {"content": [{"type": "text", "text": "q"}]}, A | {"content": ["a"]}]},
    "blank reasoning": {"messages": [U, A | {"reasoning_content": "\n\n"}]},
    "no calls": {"messages": [U, A | {"tool_calls": [], "function_call": None}], "tools": "[]"},
    "Alpaca": {"instruction": "q", "input": "", "output": "a"},
    "OpenOrca": {"question": "q", "response": "a"},
    "TRL": {"prompt": "q", "completion": "a"},
    "weights of 1": {"messages": [U, A | {"weight": 1, "train": True}]},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_exchange_is_read_in_every_form(name):
    assert conversation(PLAIN[name]) == Conversation([U, A])


def test_texts_beside_the_exchange_are_part_of_it():
    both = Conversation([SYSTEM, U, A])
    assert conversation({"system_prompt": "s", "question": "q", "answer": "a"}) == both
    assert conversation({"system": "s", "messages": [SYSTEM, U, A]}) == both
    assert conversation({"instruction": "q", "input": "i", "output": "a"}).messages[0]["content"] == "q\n\ni"
    record = {"instruction": "q", "output": "a", "history": [["p", "b"]], "system": "s"}
    assert [m["content"] for m in conversation(record).messages] == ["s", "p", "b", "q", "a"]
    developer = {"messages": [SYSTEM | {"role": "developer"}, U, A]}
    assert conversation(developer).messages[0] == {"role": "developer", "content": "s"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_every_name(key):
    thought = Conversation([U, A | {"reasoning_content": "t"}])
    assert conversation({"messages": [U, A | {key: "t"}]}) == thought
    assert conversation({"question": "q", "answer": "a", key: "t"}) == thought
    parts = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]
    assert conversation({"messages": [U, A | {"content": parts}]}) == thought


TOOL_FORMS = {
    "OpenAI": {"tools": TOOLS, "messages": [U, calls({"function": {"name": "f", "arguments": '{"x": 1}'}}), RESULT, A]},
    "JSON text": {"tools": json.dumps([FUNCTION]), "messages": [
        U, calls() | {"tool_calls": json.dumps([CALL])}, RESULT, A]},
    "bare functions": {"functions": [FUNCTION], "messages": [
        U, calls({"name": "f", "arguments": {"x": 1}}), RESULT, A]},
    "old OpenAI": {"functions": [FUNCTION], "messages": [
        U, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        RESULT | {"role": "function"}, A]},
    "ShareGPT": {"tools": json.dumps([FUNCTION]), "conversations": [
        SHAREGPT[0], {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "3"}, SHAREGPT[1]]},
    "Hermes": {"tools": [FUNCTION], "conversations": [
        SHAREGPT[0], {"from": "gpt", "value": "<tool_call>\n{'arguments': {'x': 1}, 'name': 'f'}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\n3\n</tool_response>\n"}, SHAREGPT[1]]},
    "nulls of a table": {"tools": TOOLS, "messages": [
        U | {"tool_calls": None}, calls(CALL | {"id": None}), RESULT | {"tool_calls": None, "name": None}, A]},
    "tools in the system turn": {"messages": [
        {"role": "system", "content": "", "tools": json.dumps(TOOLS)}, U, calls(CALL), RESULT, A]},
}  # fmt: skip


@pytest.mark.parametrize("name", TOOL_FORMS)
def test_tools_and_calls_are_read_in_every_form(name):
    assert conversation(TOOL_FORMS[name]) == Conversation([U, calls(CALL), RESULT, A], TOOLS)


def test_answers_of_xlam_are_calls():
    answers = json.dumps([{"name": "f", "arguments": {"x": 1}}])
    assert conversation({"query": "q", "tools": json.dumps([FUNCTION]), "answers": answers}) == Conversation(
        [U, calls(CALL)], TOOLS
    )


def test_ids_and_names_of_calls_are_kept():
    result = RESULT | {"tool_call_id": "c", "name": "f"}
    assert conversation({"messages": [U, calls(CALL | {"id": "c"}), result, A]}).messages[1:3] == [
        calls(CALL | {"id": "c"}), result,
    ]  # fmt: skip
    parallel = [U, calls(CALL, CALL, content="Both."), RESULT, RESULT, A]
    assert conversation({"messages": parallel}) == Conversation(parallel)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False, "weight": 0.0}])
def test_an_answer_of_weight_0_is_history(flag):
    assert conversation({"messages": [U, A | flag, U, A]}) == Conversation([U, A, U, A], untrained=frozenset([1]))


def test_the_prompt_of_trl_is_history():
    assert conversation({"prompt": [U, A, U], "completion": [A]}).untrained == {1}


def test_answers_may_carry_their_tokens():
    read = conversation({"messages": [U, A | {"token_ids": [5, 6], "truncated": True}, U, A | {"truncated": True}]})
    assert read == Conversation([U, A, U, A], written={1: Written([5, 6], True), 3: Written(None, True)})
    assert conversation({"messages": [U, A | {"content": "", "token_ids": [5]}]}).messages[1]["content"] == ""


def test_questions_end_before_the_results_of_calls_that_the_target_may_not_make():
    record = {"tools": TOOLS, "messages": [SYSTEM, U, A, U, calls(CALL), RESULT, A, U, A]}
    assert questions(record) == Conversation([SYSTEM, U, U], TOOLS)
    assert prompt(record) == Conversation(record["messages"][:-1], TOOLS)
    assert prompt({"messages": record["messages"][:7]}).messages[-1] == RESULT


def test_tools_in_the_columns_of_a_table_have_no_keys_of_other_rows(tmp_path):
    """Arrow fills the schemas and arguments of a row with the keys of all rows."""
    other = {
        "type": "function",
        "function": FUNCTION | {"name": "g", "parameters": {"type": "object", "required": ["y"]}},
    }
    call = {"type": "function", "function": {"name": "g", "arguments": {"y": "1"}}}
    records = [
        {"tools": TOOLS, "messages": [U, calls(CALL), RESULT, A]},
        {"tools": [other], "messages": [U, calls(call), RESULT, A]},
    ]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "tools.parquet")
    (source,) = open_sources(str(tmp_path / "tools.parquet"), split="train", max_records=None)
    read = [conversation(raw.value) for _, raw in read_all([source])]
    assert read == [conversation(record) for record in records]
