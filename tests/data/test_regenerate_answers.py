"""What regeneration keeps of the answers: token ids, what training will take, good first answers, appended prompts."""

import json
from unittest.mock import AsyncMock

import pytest
from helpers.chat import supervised_runs
from helpers.families import FAMILIES
from helpers.regeneration import read, run, server, users, write
from helpers.stub_server import StubServer, rule

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate import server_backend
from data.regenerate.conversation import Sample, Sampling
from data.regenerate.questions import read_questions, tasks
from data.regenerate.trainable import TrainingChecker
from data.sources.readers import open_sources
from data.sources.records import Conversation, conversation

SAMPLING = Sampling(0.0, 1.0, 64, seed=0, drop_cut_off=False, repeat_words=9, repeat_times=0)
TOOL = {"type": "function", "function": {"name": "forecast", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "forecast", "arguments": {"city": "Lisbon"}}}


@pytest.fixture(scope="module")
def encoder():
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    return ChatEncoder(tokenizer, {}, FAMILIES["Qwen2.5"].stop_ids(tokenizer))


@pytest.fixture(scope="module")
def with_tools():
    """A template that writes tools and calls as Qwen2.5's does."""
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls %}"
        "{{ '<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return ChatEncoder(tokenizer, {}, FAMILIES["Qwen2.5"].stop_ids(tokenizer))


def answered(stub, encoder, questions, *, sampling=SAMPLING, tools=None, in_flight=1):
    """Ask the stub server and return the finished samples in order."""
    options = {"model": "m", "in_flight": in_flight, "patience": 5, "timeout": 10, "key_file": None, "extra": {}}
    backend = server_backend.ServerBackend(sampling, {}, encoder, url=stub.url, **options)
    samples = [Sample(str(i), asked, tools, checker=TrainingChecker(encoder)) for i, asked in enumerate(questions)]
    backend.run(samples, lambda sample: None, answered_before=False, on_tokens=lambda count: None)
    return samples


@pytest.mark.parametrize("ids", ["vllm", "logprobs"])
def test_training_takes_the_tokens_that_the_server_wrote(ids, encoder):
    with StubServer(encoder=encoder, ids=ids) as stub:
        samples = answered(stub, encoder, [users("a"), users("b", "c"), users("d")])
    asked = {"vllm": 0, "logprobs": 1}[ids]  # answers without token ids until the server is known to return them
    for sample in samples[asked:]:
        assert sample.outcome == "kept" and not sample.unverified
        runs = supervised_runs(encoder.documents(conversation(json.loads(json.dumps(sample.record())))))
        for turn, (prompt, answer) in zip(range(1, 9, 2), runs, strict=False):
            text = sample.messages[turn]["content"]
            written = [token for character in text for token in encoder.backend.encode(character).ids]
            assert prompt == encoder.prompt(Conversation(sample.messages[:turn]))
            assert answer == [*written, min(encoder.token_ids.stop_ids)] != encoder.backend.encode(text).ids


@pytest.mark.parametrize("ids", [None, "reject"])
def test_servers_without_token_ids_are_asked_for_them_once(ids, encoder):
    with StubServer(encoder=encoder, ids=ids) as stub:
        samples = answered(stub, encoder, [users(f"q{i}") for i in range(6)])
    assert all(sample.outcome == "kept" and not sample.written and sample.unverified for sample in samples)
    fields = [sorted(body.keys() & {"return_token_ids", "return_tokens_as_token_ids"}) for body in stub.bodies]
    assert fields[2:] == [[]] * 4 and (fields[0] == ["return_token_ids"] if ids is None else fields[0] == [])


def test_text_that_reads_back_as_the_counted_number_of_tokens_is_verified(encoder):
    with StubServer(says=lambda _: "abc") as stub:
        (sample,) = answered(stub, encoder, [users("q")])
    assert len(encoder.backend.encode("abc").ids) in (2, 3) and not sample.unverified  # the stub counts 3
    with StubServer(says=lambda _: "a longer answer than three tokens") as stub:
        assert answered(stub, encoder, [users("q")])[0].unverified == 1


def test_a_server_with_another_template_is_an_error(encoder):
    with (
        StubServer(encoder=encoder) as stub,
        pytest.raises(UserError, match="decodes from other prompts than") as error,
    ):
        broken = ChatEncoder(FAMILIES["Llama 3.1"].tokenizer(), {"date_string": "today"})
        answered(stub, broken, [users(f"q{i}") for i in range(30)])
    assert "around token 0, it has '<|im_start|>" in str(error.value) and len(stub.bodies) == 4
    with StubServer(encoder=encoder) as stub, pytest.raises(UserError, match="decodes from other prompts than"):
        answered(stub, broken, [users("only one")])


def test_a_single_prompt_that_differs_is_one_refused_sample(encoder):
    with StubServer(encoder=encoder) as stub:
        exact, stub.reply = stub.reply, lambda body: exact(body) | changed(body)

        def changed(body):
            return {"prompt_token_ids": [1]} if body["messages"][-1]["content"] == "q2" else {}

        samples = answered(stub, encoder, [users(f"q{i}") for i in range(4)])
    assert [sample.outcome.partition(":")[0] for sample in samples] == ["kept", "kept", "refused", "kept"]


def test_prompts_of_another_length_are_an_error(encoder):
    broken = ChatEncoder(FAMILIES["Llama 3.1"].tokenizer(), {"date_string": "today"})
    with (
        StubServer(encoder=encoder, ids=None) as stub,
        pytest.raises(UserError, match=r"other prompts.*it counts \d+ tok"),
    ):
        answered(stub, broken, [users(f"q{i}") for i in range(6)])
    assert len(stub.bodies) == 4


@pytest.mark.parametrize("known", [True, False])
def test_a_cut_off_answer_is_kept_without_an_end_and_ends_its_conversation(known, encoder):
    with StubServer(encoder=encoder, cut=9, ids="vllm" if known else None) as stub:
        (sample,) = answered(stub, encoder, [users("a", "b")])
    assert sample.outcome == "kept in part: cut off" and len(sample.messages) == 2
    assert sample.record()["messages"][1]["truncated"] is True
    ((prompt, answer),) = supervised_runs(encoder.documents(conversation(sample.record())))
    written = [token for character in "answer 1 to a" for token in encoder.backend.encode(character).ids][:9]
    as_text = encoder.backend.encode(sample.messages[1]["content"]).ids
    assert answer == (written if known else as_text[:-1])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            {"content": "Use <|im_end|> here."},
            "refused in training: turn 4: the text contains the target's special token",
        ),
        ({"content": ""}, "empty"),
        ({"content": None, "reasoning_content": "Why?"}, "empty: the reply has reasoning, but no answer"),
        ({"content": "a b " * 50}, "repeats itself"),
        ({"content": [{"type": "image_url"}]}, "refused: the answer has a part of type 'image_url'; expected text"),
        ({"content": "7"}, None),
        ({"content": [{"type": "text", "text": "7 "}, {"type": "text", "text": "and 8."}]}, None),
        ({"content": "7", "reasoning_content": "\n\n"}, None),
    ],
)
def test_good_first_answers_survive_a_bad_later_one(bad, reason, encoder):
    sampling = Sampling(0.0, 1.0, 64, seed=0, drop_cut_off=False, repeat_words=2, repeat_times=20)
    with StubServer(says=lambda messages: bad if len(messages) == 3 else {"content": "Fine."}) as stub:
        (sample,) = answered(stub, encoder, [users("a", "b")], sampling=sampling)
    if reason is None:
        assert sample.outcome == "kept" and "reasoning_content" not in sample.messages[3]
    else:
        assert sample.outcome.startswith(f"kept in part: {reason}") and len(sample.messages) == 2
    assert encoder.documents(conversation(sample.record()))


def test_reasoning_of_a_thinking_model_is_checked_as_in_training():
    tokenizer = FAMILIES["Qwen3-Thinking"].tokenizer()
    thinking = ChatEncoder(tokenizer, {}, FAMILIES["Qwen3-Thinking"].stop_ids(tokenizer))
    with StubServer(says=lambda messages: {"content": "7", "reasoning_content": " \n"}) as stub:
        (blank,) = answered(stub, thinking, [users("a")])
        stub.says = lambda messages: {"content": "7", "reasoning": "3 and 4."}
        (good,) = answered(stub, thinking, [users("a")])
    assert blank.outcome.startswith("refused in training: turn 2: the prompt opens a reasoning block")
    assert good.outcome == "kept" and thinking.documents(conversation(good.record()))


def test_calls_of_the_target_are_kept_as_written_and_end_the_conversation(with_tools):
    raw = '<tool_call>\n{"name": "forecast", "arguments": {"city": "Lisbon"}}\n</tool_call>'
    with StubServer(says=lambda _: raw, encoder=with_tools) as stub:
        (sample,) = answered(stub, with_tools, [users("a", "b")], tools=[TOOL])
        parsed = {"content": None, "raw": raw, "tool_calls": [{"id": "x", "function": {**CALL["function"]}}]}
        parsed["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])
        stub.says, stub.finish = lambda _: parsed, "tool_calls"
        (with_parser,) = answered(stub, with_tools, [users("a", "b")], tools=[TOOL])
        stub.says, stub.finish = lambda _: "No forecast, I say.", "stop"
        (plain,) = answered(stub, with_tools, [users("a", "b")], tools=[TOOL])
    assert stub.bodies[0]["tools"] == [TOOL] and stub.bodies[0]["tool_choice"] == "none"
    assert sample.outcome == with_parser.outcome == "kept in part: calls a tool, and its result is unknown"
    assert (
        sample.messages[1]["content"] == raw
        and with_parser.messages[1]["tool_calls"][0]["function"] == CALL["function"]
    )
    assert plain.outcome == "kept" and len(plain.messages) == 4
    for kept in (sample, with_parser):
        (run,) = supervised_runs(with_tools.documents(conversation(kept.record())))
        assert run[0] == with_tools.prompt(Conversation(users("a"), [TOOL])) and run[1] == kept.token_ids[1]


def test_answers_around_recorded_results_follow_the_recorded_history(with_tools):
    turns = [*users("Rain?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "Sun."}, {"role": "assistant", "content": "No."}, *users("And now?")]
    asked = tasks({"messages": turns, "tools": [TOOL]})
    assert [len(task.messages) for task in asked] == [1, 3, 5] and all(task.tools == [TOOL] for task in asked)
    assert [len(task.messages) for task in tasks({"messages": [turns[0], {**turns[3], "train": False}, turns[4]]})] == [
        2
    ]
    with StubServer(encoder=with_tools) as stub:
        samples = answered(stub, with_tools, [task.messages for task in asked], tools=[TOOL])
    assert [len(body["messages"]) for body in stub.bodies] == [1, 3, 5]
    assert json.loads(stub.bodies[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"city": "Lisbon"}
    for sample, turn in zip(samples, (1, 3, 5), strict=True):
        assert sample.outcome == "kept" and sample.messages[:turn] == turns[:turn]
        trained = conversation(json.loads(json.dumps(sample.record())))
        (run,) = supervised_runs(with_tools.documents(trained))
        assert run == (with_tools.prompt(Conversation(turns[:turn], [TOOL])), sample.token_ids[turn])


def test_a_server_that_rewrites_tools_gets_the_prompt_as_tokens(with_tools):
    with StubServer(encoder=with_tools, says=lambda _: "Sun.") as stub:
        exact = stub.reply

        def rewritten(body):
            tools = [tool | {"function": tool["function"] | {"description": None}} for tool in body.get("tools", [])]
            return exact(body | {"tools": tools} if "messages" in body else body)

        stub.reply = rewritten
        samples = answered(stub, with_tools, [users("a"), users("b")], tools=[TOOL])
    assert [sample.outcome for sample in samples] == ["kept", "kept"]
    assert ["prompt" in body for body in stub.bodies] == [False, True, True]
    assert stub.bodies[2]["prompt"] == with_tools.prompt(Conversation(users("b"), [TOOL]))


def test_reasoning_that_a_parser_found_no_end_of_is_kept_as_text(encoder):
    said = {"content": None, "reasoning": "It is 7.", "raw": "It is 7."}
    with StubServer(encoder=encoder, says=lambda _: said) as stub:
        (sample,) = answered(stub, encoder, [users("a")])
    assert sample.outcome == "kept" and sample.messages[1] == {"role": "assistant", "content": "It is 7."}


def test_an_answer_that_a_stop_string_cut_has_no_end_token(encoder):
    with StubServer() as stub:
        stub.reply = lambda body: {
            "choices": [{"message": {"content": "It is 7 apples"}, "finish_reason": "stop", "stop_reason": "."}]
        }
        (sample,) = answered(stub, encoder, [users("a")])
    ((_, answer),) = supervised_runs(encoder.documents(conversation(sample.record())))
    assert answer == encoder.backend.encode("It is 7 apples").ids[:-1]


def test_an_outage_does_not_count_as_failures_of_a_request(encoder, monkeypatch):
    monkeypatch.setattr(server_backend, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(server_backend.ServerBackend, "_alive", never := AsyncMock(return_value=False))
    with StubServer(faults=["hang up"] * 8) as stub:
        (sample,) = answered(stub, encoder, [users("a")])
    assert sample.outcome == "kept" and never.await_count == 1


def test_the_same_id_in_two_sources_is_two_samples(tmp_path):
    for name in ("a", "b"):
        records = [{"id": i, "question": f"{name}{i}", "answer": "x", "kind": "math"} for i in range(3)]
        write(tmp_path, records).rename(tmp_path / f"{name}.jsonl")
    with StubServer() as stub:
        printed = run(tmp_path, *server(stub), "data.path=[a.jsonl,b.jsonl]", "data.bad_records=skip")
    found = read(tmp_path)
    assert [s["id"] for s in found] == ["0", "1", "2", "b.jsonl:0", "b.jsonl:1", "b.jsonl:2"]
    assert [s["messages"][0]["content"] for s in found] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert {s["kind"] for s in found} == {"math"}  # for the data report
    assert sum(stub.asked.values()) == 6 and "6 conversations: 6 kept" in printed


@pytest.mark.slow
def test_appended_and_changed_prompts_are_answered_and_the_rest_is_used_again(tmp_path):
    records = [{"id": i, "question": f"q{i}", "answer": "x"} for i in range(4)]
    write(tmp_path, records)
    with StubServer() as stub:
        stub.says = lambda messages: "" if messages[-1]["content"] == "q1" else rule(messages)
        run(tmp_path, *server(stub))
        first, before = read(tmp_path), dict(stub.asked)
        records[2]["question"] = "other"
        write(tmp_path, [*records[1:], {"id": 9, "turns": ["new", "newer"]}])
        printed = run(tmp_path, *server(stub))
        assert {q: n - before.get(q, 0) for q, n in stub.asked.items() if n != before.get(q, 0)} == {
            "other": 1, "new": 1, "newer": 1,
        }  # fmt: skip
        assert "4 conversations: 3 kept, 1 empty" in printed or "1 empty, 3 kept" in printed
        assert [s["id"] for s in read(tmp_path)] == ["2", "3", "9"] and read(tmp_path)[1] == first[-1]
        dropped = read(tmp_path, "regenerated.dropped.jsonl")
        assert [(s["id"], s["reason"]) for s in dropped] == [
            ("1", "empty"), ("0", "no longer in data.path"), ("2", "no longer in data.path"),
        ]  # fmt: skip
        assert "already finished" in run(tmp_path, *server(stub))
        write(tmp_path, [{"id": 0, "question": "q0", "answer": "x"}, *records[1:]])
        total = sum(stub.asked.values())
        run(tmp_path, *server(stub))
        assert [s["id"] for s in read(tmp_path)] == ["0", "2", "3"] and sum(stub.asked.values()) == total


@pytest.mark.slow
def test_settings_that_failed_before_any_answer_may_be_corrected(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "x"} for i in range(3)])
    with StubServer(faults=[400] * 100) as stub:
        printed = run(tmp_path, *server(stub), "regenerate.max_new_tokens=9", status=1)
        assert "regenerate.max_new_tokens=9 leaves room" in printed
        stub.faults.clear()
        assert "3 kept" in run(tmp_path, *server(stub), "regenerate.max_new_tokens=8", "regenerate.server.patience=5.0")
        assert "max_new_tokens: 8 -> 9" in run(tmp_path, *server(stub), "regenerate.max_new_tokens=9", status=1)


@pytest.mark.slow
def test_a_replaced_output_is_not_used_again(tmp_path):
    write(tmp_path, [{"question": f"q{i}", "answer": "x"} for i in range(3)])
    with StubServer() as stub:
        run(tmp_path, *server(stub))
        stub.faults = [None] + [404] * 100
        call = (*server(stub), "regenerate.temperature=0.5", "regenerate.server.in_flight=1")
        run(tmp_path, *call, "overwrite=true", status=1)
        stub.faults.clear()
        run(tmp_path, *call)  # resumes without the answers of the first run
    assert sum(stub.asked.values()) == 3 + 2 + 2 and stub.bodies[-1]["temperature"] == 0.5


def test_a_request_field_is_removed_by_null(tmp_path):
    write(tmp_path, [{"question": "q", "answer": "x"}])
    with StubServer() as stub:
        run(tmp_path, *server(stub), "+regenerate.server.extra={max_tokens: null, max_completion_tokens: 7}")
    assert "max_tokens" not in stub.bodies[0] and stub.bodies[0]["max_completion_tokens"] == 7


def test_ids_are_distinct_with_the_parts_of_tool_records(tmp_path):
    turns = [*users("hi"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "ok"}, {"role": "assistant", "content": "done"}]
    write(
        tmp_path, [{"id": "a#2", "question": "other", "answer": "x"}, {"id": "a", "messages": turns, "tools": [TOOL]}]
    )
    sources = open_sources(str(tmp_path / "questions.jsonl"), split="train", max_records=None)
    found = read_questions(sources, "skip", tmp_path / "rejects.jsonl")
    assert [asked.id for asked in found.samples()] == ["a#2"]
    assert "duplicate id 'a#2', first used at" in (tmp_path / "rejects.jsonl").read_text()


def test_records_are_refused_by_name():
    with pytest.raises(BadRecord, match="no assistant turn to answer"):
        turns = [*users("a"), {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False}]
        tasks(
            {"messages": [*turns, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}
        )
