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
        ("b " + TAG.replace("{}", '{"x": "</tool_call>"}') + "\n", "b", [{"x": "</tool_call>"}]),
        (TAG.replace("{}", '{"x": "</think>"}'), "", [{"x": "</think>"}]),
        ("a <tool_call>{'name': 'f', 'arguments': {1: (2,)}}</tool_call>", "a", [{"1": [2]}]),
    ],
)
def test_calls_in_a_text(text, content, arguments):
    message = conversation(called(text)).messages[1]
    assert message["content"] == content
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == arguments


@pytest.mark.parametrize("text", [f"a {TAG} b", f"a: {TAG} b: {TAG}", f"Write:\n```\n{TAG}\n```", f"{TAG}<tool_call>"])
def test_text_between_or_after_calls_is_not_moved(text):
    with pytest.raises(BadRecord, match="^answer before turn 3: text between or after `<tool_call>` blocks"):
        conversation(called(text))
    last = messages(U, A | {"content": text}, tools=[F])
    assert conversation(last).messages[1] == A | {"content": text}


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


def test_results_have_the_name_of_the_tool_that_their_id_refers_to():
    result = RESULT | {"tool_call_id": "c"}
    assert parsed(messages(U, A | {"tool_calls": [F | {"id": "c"}]}, result, A)).messages[2] == result | {"name": "f"}


def test_the_last_text_is_a_call_if_the_record_has_tools():
    turns = U, A | {"content": TAG.replace('"', "'")}
    assert conversation(messages(*turns, tools=[F])).messages[1]["tool_calls"][0]["function"] == F
    explained = A | {"content": "<tool_call>JSON</tool_call>"}
    for record in (
        messages(*turns),
        messages(U, explained, tools=[F]),
        messages(*turns, tools=[G]),
        messages(*turns[:1], turns[1] | {"truncated": True}, tools=[F]),
    ):
        assert "tool_calls" not in conversation(record).messages[1]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "context": "c", "answer": "a"},
        {"prompt": "q", "input": "c", "completion": "a"},
        {"query": "q", "context": "c", "response": "a", "truncated": False, "chat_template_kwargs": {}},
        {"instruction": "q", "context": "c", "output": "a", "prompt": "Answer. q", "turns": 1},
    ],
)
def test_context_follows_the_question(record):
    assert [message["content"] for message in conversation(record).messages] == ["q\n\nc", "a"]


def test_questions_and_reference_answers_beside_turns_are_metadata():
    record = messages(U, A, prompt="p", answer="4", context="q", reasoning=True)
    assert conversation(record) == conversation(messages(U, A))


BESIDE = [
    *[messages(U, A, U, **{key: "a"}) for key in ("response", "output", "answer")],
    *[messages(U, A, **{key: "x"}) for key in ("context", "input", "thinking")],
    messages(U, A, history=[["p", "b"]]),
    messages(U, A, turns=["p"]),
    {"turns": ["p"], "response": "b"},
    {"turns": ["p"], "reasoning": "b"},
    {"prompt": [U], "completion": [A], "context": "x"},
    {"prompt": [U], "completion": [A], "reasoning": "x"},
    {"prompt": "q", "response": "a", "output": "x"},
    {"prompt": "q", "response": "a", "turns": ["x"]},
]


@pytest.mark.parametrize("record", BESIDE)
def test_texts_beside_the_conversation_are_refused(record):
    with pytest.raises(BadRecord, match="is not part of the conversation"):
        parsed(record)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nt\n</think>\n\na", "a"),
        ("t</think>a", "a"),
        ("[THINK]t[/THINK]a", "a"),
        ("The tag </think>.", "The tag </think>."),
        ("<think> is a tag.", "<think> is a tag."),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"type": "text", "text": "a"}], "a"),
    ],
)
def test_reasoning_in_a_field_is_not_repeated_in_the_text(content, expected):
    record = messages(U, A | {"content": content, "reasoning": "t"})
    assert conversation(record).messages[1] == A | {"content": expected, "reasoning_content": "t"}


SCHEMA = {"name": "f", "parameters": {"type": "object", "properties": {}}}
PAIR = {"question": "q", "answer": "a"}
METADATA = [
    messages(U, A, weight=1, train=True, loss=None, label="0", tool_choice="none", cot="x"),
    messages(U, A, tools=[SCHEMA], tool_choice="auto", available_tools=[SCHEMA]),
    messages(U, A, function="def f(): ...", source=[{"name": "s"}], model={"name": "m", "parameters": {"top_p": 1}}),
    messages({"role": "system", "content": "Be brief."}, U, A, instructions="Be brief.", developer=""),
    messages(U, A | {"tool_calls": [F]}, functions="[]", calls=[{"function": F}], spans="[1, 2]"),
    PAIR | {"cot": False, "rationale": "a", "label": True, "weight": ""},
    {"prompt": "q", "response": "a", "thinking": "t", "thought": "t"},
]


@pytest.mark.parametrize("record", METADATA)
def test_metadata_are_accepted(record):
    found = conversation(record)
    assert [m["content"] for m in found.messages if m["role"] == "assistant"] == [*{"a"}] and not found.untrained


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("record", [PAIR, messages(U, A)])
def test_a_record_of_weight_0_is_not_trained_on(key, record):
    assert parsed(record | {key: 0}).untrained == {1}
    with pytest.raises(BadRecord, match="weight or train excludes all of them"):
        conversation(record | {key: False})


def test_a_system_message_beside_the_turns_is_read():
    assert parsed(messages(U, A, system_message="s")).messages[0] == {"role": "system", "content": "s"}


THOUGHT, TEXT = {"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}
REFUSED = {
    "different reasoning in text": (
        messages(U, A | {"content": "<think>x</think>a", "thinking": "t"}), "turn 2: the text has other reasoning"),
    "reasoning after text": (messages(U, A | {"content": [TEXT, THOUGHT, TEXT]}), "turn 2, part 2: reasoning after"),
    "reasoning of a user": (messages(U | {"content": [THOUGHT, TEXT]}, A), "turn 1: reasoning in a user turn"),
    **{f"tools in {key}": (messages(U, A, **{key: value}), f"`{key}`: tool schemas are read from `tools`")
        for key, value in {"function": [SCHEMA], "tool_schemas": ["f"], "tools_json": json.dumps([SCHEMA]), "x": SCHEMA,
            "api": [{"type": "function", "function": {"name": "f"}}], "mcp": ['{"name": "f", "inputSchema": {}}'],
        }.items()},
    **{key: (messages(U, A, **{key: "Be brief."}), f"`{key}` beside `messages` is not part of the conversation")
        for key in ("instructions", "developer")},
    **{key: (PAIR | {key: "x"}, f"`{key}` beside `question` is not part of the conversation")
        for key in ("cot", "thought", "rationale", "instructions")},
    "weight of a record": (messages(U, A, weight=0.5), "record: `weight`=0.5: expected 0 or 1"),
    "contradicting weights": (messages(U, A, weight=1, train=False), "record: `weight` and `train` contradict"),
    "tool choice": (messages(U, A, tools=[SCHEMA], tool_choice="none"), "`tool_choice`='none'"),
    "label 0": (messages(U, A, label=0), "`label`=0: the answer is undesirable"),
    "undesirable conversation": (messages(U, A, label=False), "`label`=false"),
    "turn after a system prompt beside": (messages(U, A, A, system="s"), "turn 3: second consecutive assistant turn"),
    "turn after a removed system turn": (
        messages({"role": "system", "content": ""}, U, A, A), "turn 4: second consecutive assistant turn"),
    "empty system turn alone": (messages({"role": "system", "content": ""}), "has only a system message"),
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
