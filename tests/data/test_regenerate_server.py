"""Failures and dialects of servers: nothing is refused for good because of a fault, and no reply is a traceback."""

import pytest
from helpers.families import FAMILIES
from helpers.regeneration import read, run, server, write
from helpers.stub_server import StubServer
from omegaconf import OmegaConf

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate import server_backend
from data.regenerate.conversation import Sample, Sampling
from data.regenerate.server_reply import IncompleteReply, UnknownReply, read_reply
from data.regenerate.server_settings import check_server, read_key
from data.regenerate.trainable import TrainingChecker

SAMPLING = Sampling(0.0, 1.0, 64, seed=0, drop_cut_off=False, repeat_words=9, repeat_times=0)
TOOL = {"type": "function", "function": {"name": "forecast", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def encoder():
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    return ChatEncoder(tokenizer, {}, FAMILIES["Qwen2.5"].stop_ids(tokenizer))


def answered(stub, encoder, texts, tools=None, finished=None, **options):
    options = {"in_flight": 1, "patience": 5, "timeout": 10, "key_file": None, "extra": {}} | options
    backend = server_backend.ServerBackend(SAMPLING, {}, encoder, url=stub.url, model="m", **options)
    samples = [Sample(str(i), [{"role": "user", "content": text}], tools) for i, text in enumerate(texts)]
    finished = [] if finished is None else finished
    backend.run(samples, finished.append, answered_before=False, on_tokens=lambda count: None)
    return finished


@pytest.mark.parametrize("fault", [400, 402, 307, 500, 504, "half"])
def test_a_fault_after_the_first_answers_finishes_no_sample(fault, encoder, monkeypatch):
    monkeypatch.setattr(server_backend, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(server_backend, "LONGEST_PAUSE", 0.002)
    finished = []
    with StubServer(faults=[None] * 4 + [fault] * 10_000) as stub, pytest.raises(UserError, match="answers are saved"):
        answered(stub, encoder, "abcdefgh", finished=finished, patience=0.1)
    assert [sample.outcome for sample in finished] == ["kept"] * 4


@pytest.mark.slow
def test_a_request_that_always_fails_is_left_open_and_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(server_backend, "FIRST_PAUSE", 0.001)
    write(tmp_path, [{"question": text, "answer": "a"} for text in ("a", "poison", "b")])
    with StubServer(poison=504) as stub:
        assert "1 of 3 conversations are not in" in run(tmp_path, *server(stub), status=1)
        assert len(read(tmp_path)) == 2 and not read(tmp_path, "regenerated.dropped.jsonl")
        stub.poison = None
        assert "3 kept" in run(tmp_path, *server(stub))
    assert len(read(tmp_path)) == 3 and stub.asked["a"] == 1


def test_tools_that_a_server_leaves_out_are_noticed_by_the_length(encoder):
    with StubServer(encoder=encoder, ids=None, says=lambda _: "Sun.") as stub:
        exact = stub.reply
        stub.reply = lambda body: exact({key: value for key, value in body.items() if key != "tools"})
        (sample,) = answered(stub, encoder, ["a"], tools=[TOOL])
        assert sample.outcome == "kept"
        assert ["prompt" in body for body in stub.bodies] == [False, True]


def reply(**changes):
    choice = {"message": {"content": "Sun."}, "finish_reason": "stop"} | changes.pop("choice", {})
    return {"choices": [choice], "usage": {"completion_tokens": 3, "prompt_tokens": 5}} | changes


@pytest.mark.parametrize(
    ("given", "complete"),
    [
        (reply(), True),
        *((reply(choice={"finish_reason": reason}), True) for reason in ("STOP", "eos", "eos_token", "end_turn")),
        *((reply(choice={"finish_reason": reason}), False) for reason in ("length", "stop_sequence")),
        (reply(choice={"stop_reason": "."}), False),
        (reply(choice={"matched_stop": "."}), False),
        (reply(choice={"matched_stop": 7}), True),
        (reply(usage={"completion_tokens": 64}), False),
        (reply(usage={"completion_tokens": 64}, choice={"token_ids": [5, 7]}), True),
    ],
)
def test_an_ending_is_read_in_every_dialect(given, complete):
    assert read_reply(given, {7}, 64).complete is complete


def test_arguments_may_be_an_object_and_empty_ids_are_none():
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    found = read_reply(reply(choice={"message": {"tool_calls": calls}}, prompt_token_ids=[]), {7}, 64)
    assert found.message["tool_calls"][0]["function"]["arguments"] == {"a": 1} and found.prompt_ids is None


@pytest.mark.parametrize(
    "given",
    [
        reply(usage={"completion_tokens": "12"}),
        reply(usage={"prompt_tokens": "12"}),
        reply(prompt_token_ids="12"),
        reply(prompt_token_ids=[2**40]),
        reply(choice={"token_ids": [-3]}),
        reply(choice={"finish_reason": "odd"}),
    ],
)
def test_unknown_replies_are_refused_by_name(given):
    found = read_reply(given, {7}, 64)
    assert isinstance(found, UnknownReply) and isinstance(found, BadRecord)


def test_an_error_in_a_reply_is_shown():
    with pytest.raises(IncompleteReply, match="budget exceeded"):
        read_reply({"error": {"message": "budget exceeded"}}, {7}, 64)


def test_reasoning_that_is_cut_off_is_kept_with_its_opening_tag(encoder):
    said = {"content": "", "reasoning_content": "long thought"}
    with StubServer(says=lambda _: said, finish="length") as stub:
        (unknown,) = answered(stub, encoder, ["a"])
        encoder.template, before = encoder.template + "{# <think> #}", encoder.template
        (known,) = answered(stub, encoder, ["a"])
        encoder.template = before
    assert unknown.outcome.startswith("cut off: in the reasoning")
    assert known.messages[1]["content"] == "<think>\nlong thought" and known.written[1].truncated


@pytest.mark.parametrize("url", ["http://h:99999/v1", "http://", "http://h:x", "h:8000"])
def test_an_invalid_url_is_an_error(url):
    config = {"regenerate": {"backend": "server", "server": {"url": url, "model": "m", "key_file": None}}}
    with pytest.raises(UserError, match="server.url"):
        check_server(OmegaConf.create(config))


@pytest.mark.parametrize("key", ["", "schl\u00fcssel", "a\nb"])
def test_an_invalid_key_is_an_error(key, tmp_path):
    (tmp_path / "key").write_text(key, encoding="utf-8")
    with pytest.raises(UserError, match="one line of ASCII"):
        read_key(str(tmp_path / "key"))


@pytest.mark.parametrize(
    ("said", "known", "part"),
    [
        ({"content": "Sun.", "reasoning_content": "Why?"}, False, "the answer's reasoning; start the server without a"),
        ({"content": "Sun.", "reasoning_content": "Why?"}, True, None),
        ({"content": "Sun."}, False, None),
    ],
)
def test_reasoning_that_the_template_does_not_write_needs_token_ids(said, known, part, encoder):
    ids = encoder.backend.encode("<think>Why?</think>Sun.<|im_end|>").ids if known else None
    sample = Sample("0", [], checker=TrainingChecker(encoder), messages=[{"role": "user", "content": "a"}])
    sample.answer(said, ids, True, 3, SAMPLING)
    assert part in sample.outcome if part else sample.outcome == "kept"
