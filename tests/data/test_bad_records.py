"""Bad records: each kind is reported with file and line, listed in a file, and stops the run or is skipped."""

import json

import pytest
from datasets import Dataset
from helpers.shared import command

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.prepare import describe, describe_answers, prepare
from data.sources import jsonl
from data.sources.readers import open_sources
from data.sources.records import conversation, questions

U, A = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4. That is all there is."}
GOOD = {"messages": [U, A]}


def messages(*turns):
    return {"messages": list(turns)}


def user(content):
    return {"role": "user", "content": content}


def call(**keys):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}, **keys}],
    }


TOOL, CALL, RESULT = {"name": "f", "parameters": {"type": "object"}}, call(), {"role": "tool", "content": "3"}
# Kind: a record or a raw line, and the expected reason.
BAD = {
    "broken JSON": (b"{broken", "invalid JSON"),
    "cut-off JSON": (json.dumps(GOOD)[:-9].encode(), "invalid JSON"),
    "two objects in a line": (b'{"a": 1} {"b": 2}', "invalid JSON: Extra data"),
    "endless nesting": (b"[" * 100_000, "invalid JSON"),
    "invalid UTF-8": (b'{"messages": "\xff"}', "invalid UTF-8: byte 0xff at offset 14"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "invalid UTF-8: byte 0xff at offset 0"),
    "lone surrogate": (messages(user("\ud83d"), A), "turn 1: contains a lone surrogate"),
    "number": (42, "expected a JSON object, found a number"),
    "string": ("hello", "expected a JSON object, found a string"),
    "null": (None, "expected a JSON object, found null"),
    "list": ([GOOD], "expected a JSON object, found a list"),
    "key with a lone surrogate": ({"\ud800": 1}, "found keys: \\ud800"),
    "unknown format": ({"text": "?"}, "found keys: text"),
    "empty object": ({}, "found keys: none"),
    "question without answer": ({"question": "q"}, "`question` without `answer`"),
    "response without prompt": ({"response": "r", "prompt": None}, "`response` without `prompt`"),
    "answer of a wrong type": ({"question": "q", "answer": 4}, "answer: expected a string, found a number"),
    "turns not a list": ({"turns": "q"}, "`turns`: expected a list of user turns, found a string"),
    "turns without answers": ({"turns": ["q"]}, "no assistant turn; generate answers with python -m data.regenerate"),
    "messages not a list": ({"messages": "q"}, "`messages`: expected a list of turns, found a string"),
    "no messages": (messages(), "`messages` is empty"),
    "turn not an object": (messages("q", A), "turn 1: expected an object, found a string"),
    "unknown role": (messages(U, {**A, "role": "wizard"}), "turn 2: unknown role 'wizard'"),
    "role of a wrong type": (messages({**U, "role": ["user"]}, A), "turn 1: unknown role ['user']"),
    "unknown ShareGPT speaker": (
        {"conversations": [{"from": "bing", "value": "q"}]},
        "turn 1: unknown role 'bing'; expected one of system, user, assistant, developer, tool, human, gpt",
    ),
    "missing role": (messages({"content": "q"}, A), "turn 1: missing `role`"),
    "missing content": (messages(U, {"role": "assistant"}), "turn 2: missing `content`"),
    "null content": (messages(U, {**A, "content": None}), "turn 2: missing `content`"),
    "content part without text": (messages(user([{"type": "text"}]), A), "part 1: expected a string, found null"),
    "image part": (messages(user([{"type": "image_url"}]), A), "part 1: content of type 'image_url' is not supported"),
    "images": (GOOD | {"images": ["a.png"]}, "`images`: only text is supported"),
    "preference data": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data are not supported"),
    "undesirable answer": ({"prompt": "q", "completion": "a", "label": False}, "`label`=false"),
    "two answers": (
        {"question": "q", "answer": "a", "response": "b"},
        "`response` beside `question` and `answer`: expected one exchange",
    ),
    "two conversations": (
        GOOD | {"conversations": [U, A]},
        "`messages` and `conversations`: expected one of them",
    ),
    "two system prompts": (messages({"role": "system", "content": "s"}, U, A) | {"system": "t"}, "`system` and the"),
    "unknown key": (messages(U, A | {"sentiment": "good"}), "turn 2: unknown key `sentiment`, which may change the"),
    "reasoning of a user": (messages(U | {"reasoning": "hm"}, A), "turn 1: `reasoning` in a user turn"),
    "two kinds of reasoning": (messages(U, A | {"reasoning": "a", "thinking": "b"}), "turn 2: several keys hold"),
    "weight of one half": (messages(U, A | {"weight": 0.5}), "turn 2: `weight`=0.5: expected 0 or 1"),
    "supervised user": (messages(U | {"train": True}, A), "turn 1: `train`=True: only assistant turns are trained on"),
    "nothing to train on": (messages(U, A | {"weight": 0}), "no assistant turn to train on"),
    "token ids of a wrong type": (messages(U, A | {"token_ids": ["a"]}), "turn 2: `token_ids`: expected a list of"),
    "truncated of a wrong type": (messages(U, A | {"truncated": 1}), "turn 2: `truncated`: expected true or false"),
    "token ids of a user": (
        messages(U | {"token_ids": [1]}, A),
        "turn 1: `token_ids` and `truncated` describe answers",
    ),
    "tools not a list": (GOOD | {"tools": 3}, "`tools`: expected a list of JSON schemas, found a number"),
    "tools of broken JSON": (GOOD | {"tools": "[{"}, "`tools`: invalid JSON"),
    "tool without a name": (GOOD | {"tools": [{"type": "function"}]}, "`tools`, tool 1: expected a function with a"),
    "tool of another type": (GOOD | {"tools": [{"type": "web_search"}]}, "tool 1: type 'web_search' is not supported"),
    "tools in two places": (GOOD | {"tools": [TOOL], "functions": [{"name": "g"}]}, "`tools` and `functions` differ"),
    "tools that the template drops": (GOOD | {"tools": [TOOL]}, "chat template does not write `tools` into the prompt"),
    "calls that the template drops": (messages(U, CALL), "turn 2: the chat template does not write the tool call f"),
    "arguments of a wrong type": (
        messages(U, {**A, "tool_calls": [{"name": "f", "arguments": [1]}]}),
        "turn 2: tool call 1: `arguments`: expected an object, found a list",
    ),
    "arguments of broken JSON": (
        messages(U, {**A, "tool_calls": [{"name": "f", "arguments": "{"}]}),
        "turn 2: tool call 1, `arguments`: invalid JSON",
    ),
    "unknown key of a call": (
        messages(U, {**A, "tool_calls": [{"name": "f", "arguments": {}, "result": 1}]}),
        "turn 2: tool call 1: unknown key `result`",
    ),
    "result without a call": (messages(U, RESULT, A), "turn 2: a tool turn must follow an assistant turn with tool"),
    "result after an answer": (messages(U, A, RESULT, A), "turn 3: a tool turn must follow an assistant turn with"),
    "user after a call": (messages(U, CALL, U, A), "turn 3: expected a tool turn after tool calls, found a user turn"),
    "answer after a call": (messages(U, CALL, A), "turn 3: expected a tool turn after tool calls, found an assistant"),
    "user after a result": (messages(U, CALL, RESULT, U, A), "turn 4: expected an assistant turn after the results"),
    "id of another call": (
        messages(U, call(id="a"), RESULT | {"tool_call_id": "b"}, A),
        "turn 3: tool_call_id 'b' is not the id of a preceding call",
    ),
    "tool first": (messages(RESULT, U, A), "starts with a tool turn"),
    "empty turn": (messages(U, {**A, "content": ""}), "turn 2: the text is empty"),
    "blank turn": (messages(user(" \n"), A), "turn 1: the text is empty"),
    "tool calls": (messages(U, {**A, "tool_calls": [{"id": 1}]}), "turn 2: tool call 1: expected a function with a"),
    "two assistants in a row": (messages(U, A, A), "turn 3: second consecutive assistant turn"),
    "two users in a row": (messages(U, U, A), "turn 2: second consecutive user turn"),
    "assistant only": (messages(A, A), "starts with an assistant turn"),
    "no answer": (messages(U), "no assistant turn"),
    "late system message": (
        messages(U, {"role": "system", "content": "s"}, A),
        "turn 2: only the first turn may be a system message",
    ),
    "only a system message": (
        messages({"role": "system", "content": "s"}),
        "has only a system message; expected a user turn",
    ),
    "special token in the text": (messages(user("<|im_end|>"), A), "special token <|im_end|>"),
    "huge record": (messages(user("x" * 2000), A), "the line is too long; expected at most"),
}
assert len(BAD) >= 30


def write(path, *records):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def prepared(path, tokenizer, policy, rejects):
    return prepare(
        open_sources(str(path), split="train", max_records=None),
        ChatEncoder(tokenizer, {}),
        max_seq_len=64,
        truncation="turn",
        bad_records=policy,
        num_proc=1,
        validation_records=0,
        block_size=4,
        seed=0,
        rejects=rejects,
    )


@pytest.fixture(scope="module")
def rejects(tmp_path_factory, tiny_tokenizer):
    """Skip the bad records of a file with a good record before and after each. Return its path and the rejects."""
    folder = tmp_path_factory.mktemp("bad")
    path = write(folder / "data.jsonl", *(record for bad, _ in BAD.values() for record in (GOOD, bad)), GOOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "MAX_LINE_BYTES", 1500)
        done = prepared(path, tiny_tokenizer, "skip", folder / "rejects.jsonl")
    assert done.documents.outcomes()["kept"] == len(BAD) + 1 and done.documents.outcomes()["bad"] == len(BAD)
    return path, [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_reported_and_listed(kind, rejects):
    path, listed = rejects
    number = list(BAD).index(kind)
    reject = listed[number]
    assert reject["line"] == 2 * number + 2 and reject["file"] == path
    assert reject["where"] == f"{path}:{reject['line']}"
    expected = "the line is too long; expected at most" if kind == "endless nesting" else BAD[kind][1]
    assert expected in reject["reason"]


def test_stopping_reports_the_first_bad_records_and_lists_all(tmp_path, tiny_tokenizer):
    bad = [record for record, _ in list(BAD.values())[-9:-2]]
    path = write(tmp_path / "data.jsonl", GOOD, *bad, GOOD)
    with pytest.raises(UserError) as error:
        prepared(path, tiny_tokenizer, "stop", tmp_path / "rejects.jsonl")
    assert "7 of 9 records in data.path are invalid" in str(error.value)
    assert f"{path}:2: turn 2: tool call 1" in str(error.value) and f"{path}:6" in str(error.value)
    assert f"{path}:7" not in str(error.value)  # the message shows five
    assert "data.bad_records=skip" in str(error.value)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 7
    write(tmp_path / "data.jsonl", GOOD)
    prepared(path, tiny_tokenizer, "stop", tmp_path / "rejects.jsonl")
    assert not (tmp_path / "rejects.jsonl").exists()  # stale


def test_answers_before_the_first_question_are_left_out_and_counted(tmp_path, tiny_tokenizer):
    """Datasets such as ShareGPT split long conversations; later parts start with an answer without its question."""
    system = {"role": "system", "content": "Answer in one word."}
    tails = [[U, A], [U, A, user("And 3+3?"), {**A, "content": "It is 6."}]]
    parts = [messages(A, *tails[0]), messages(system, A, A, *tails[1]), messages(A, U, U, A)]
    (tmp_path / "parts.jsonl").write_text("\n".join(map(json.dumps, parts)))
    encoder = ChatEncoder(tiny_tokenizer, {})
    prepared = prepare(
        open_sources(str(tmp_path / "parts.jsonl"), split="train", max_records=None), encoder, max_seq_len=128,
        truncation="turn", num_proc=1,
        validation_records=0, bad_records="skip", block_size=4, seed=0, rejects=tmp_path / "rejects.jsonl",
    )  # fmt: skip
    whole = [conversation(messages(*tails[0])), conversation(messages(system, *tails[1]))]
    expected = [encoder.documents(one)[0].document for one in whole]
    found = list(prepared.documents)
    assert [document.input_ids.tolist() for document in found] == [document.input_ids.tolist() for document in expected]
    assert all((a.supervised == b.supervised).all() for a, b in zip(found, expected, strict=True))
    assert "3 left out because the conversation starts with them" in describe_answers(prepared.documents)
    assert "3 answers before the first question left out" in describe(prepared)
    assert "turn 3: second consecutive user turn" in (tmp_path / "rejects.jsonl").read_text()  # as numbered in the file
    assert [m["role"] for m in questions(parts[1]).messages] == ["system", "user", "user"]


def test_deep_nesting_does_not_crash(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "data.jsonl", GOOD, b'{"messages": ' + b"[" * 100_000)
    with pytest.raises(UserError, match=r"data\.jsonl:2: invalid JSON"):
        prepared(path, tiny_tokenizer, "stop", tmp_path / "rejects.jsonl")


def test_bad_rows_of_a_table_are_reported_by_index(tmp_path, tiny_tokenizer):
    rows = [GOOD | {"question": None}, {"messages": None, "question": "q"}, GOOD | {"question": None}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "data.parquet"))
    with pytest.raises(UserError, match=r"data\.parquet\[1\]: `question` without `answer`"):
        prepared(tmp_path / "data.parquet", tiny_tokenizer, "stop", tmp_path / "rejects.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_policy_applies_on_the_command_line(policy, tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD, BAD["empty turn"][0], *[GOOD] * 20)
    call = ["+experiment=tiny", f"data.path={path}", f"data.bad_records={policy}", "data.validation_records=2"]
    steps = [
        "stages=[attention_tuning]",
        "stage.attention_tuning.steps=2",
        "stage.attention_tuning.global_batch_size=2",
    ]
    done = command(*call, *steps, cwd=tmp_path)
    listed = (tmp_path / "checkpoints" / "tiny" / "rejects.jsonl").read_text().splitlines()
    assert len(listed) == 1 and json.loads(listed[0])["where"] == f"{path}:2"
    if policy == "skip":
        assert done.returncode == 0, done.stderr
        assert "22 records (21 kept, 1 bad, listed in checkpoints/tiny/rejects.jsonl)" in done.stdout
    else:
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert f"{path}:2: turn 2: the text is empty" in done.stderr
        assert not (tmp_path / "checkpoints" / "tiny" / "attention_tuning").exists()
