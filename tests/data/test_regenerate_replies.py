"""Reading of a server's replies: endings, unknown forms, and the tokens of an answer."""

import asyncio
from types import SimpleNamespace
from unittest.mock import AsyncMock

import httpx
import pytest
from helpers.families import FAMILIES
from helpers.stub_server import StubServer

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.regenerate import server_backend
from data.regenerate.conversation import Sample, Sampling
from data.regenerate.server_answer import AnswerReader
from data.regenerate.server_reply import IncompleteReply, Reply, UnknownReply, read_reply
from data.regenerate.server_request import Failed, Rejected, send
from data.regenerate.server_settings import stop_strings, token_limit

SAMPLING = Sampling(0.0, 1.0, 64, seed=0, drop_cut_off=False, repeat_words=9, repeat_times=0)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    return ChatEncoder(tokenizer, {}, FAMILIES["Qwen2.5"].stop_ids(tokenizer))


@pytest.fixture
def backend(encoder):
    options = {"in_flight": 1, "patience": 5, "timeout": 10, "key_file": None, "extra": {}}
    return server_backend.ServerBackend(SAMPLING, {}, encoder, url="http://localhost/v1", model="m", **options)


def run(backend, stub, texts):
    backend.url, samples = stub.url, [Sample(text, [{"role": "user", "content": text}]) for text in texts]
    backend.run(samples, lambda sample: None, answered_before=False, on_tokens=lambda count: None)
    return samples


def read(stops=(), message=None, **choice):
    choice = {"message": message or {"content": "Sun."}, "finish_reason": "stop"} | choice
    return read_reply({"choices": [choice]}, {7}, 64, stops)


@pytest.mark.parametrize(
    ("choice", "stops", "complete"),
    [
        ({}, ["\n"], False),  # the stop string may have ended it
        ({"finish_reason": "eos"}, ["\n"], True),
        ({"stop_reason": None}, ["\n"], True),
        ({"token_ids": [5, 7]}, ["\n"], True),
        ({"token_ids": [5, 6]}, ["\n"], False),
        ({"matched_stop": "\n"}, ["\n"], False),
        ({"matched_stop": 9}, [], False),
        *(({"stop_reason": name}, ["\n"], True) for name in ("eos", "stop", "<|im_end|>", "")),
        ({"stop_reason": "end"}, ["end"], False),
        ({"finish_reason": "model_length"}, [], False),
        ({"finish_reason": "tool-calls"}, [], True),
    ],
)
def test_an_ending_is_complete_only_if_no_stop_string_cut_the_answer(choice, stops, complete):
    assert read(stops, **choice).complete is complete


@pytest.mark.parametrize("reason", ["timeout", "cancel", "insufficient_system_resource", None])
def test_interrupted_answers_are_requested_again(reason):
    with pytest.raises(IncompleteReply):
        read(finish_reason=reason)


@pytest.mark.parametrize("logprobs", [[{"token": "x"}], -1, {"content": ["token_id:5"]}])
def test_log_probabilities_without_token_ids_are_ignored(logprobs):
    assert read(logprobs=logprobs).token_ids is None


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (None, "no answer in None"),
        ({"detail": "x"}, "no answer in {'detail'"),
        ({"choices": [{"message": {"content": "Sun."}}]}, "no finish_reason"),
        ({"choices": [{"message": {"content": "Sun."}, "finish_reason": "stop"}], "usage": [1]}, "usage="),
        ({"choices": [{"message": {"content": "Sun.", "reasoning": {"summary": "x"}}}]}, "expected text"),
        ({"choices": [{"message": {"tool_calls": [{"type": "custom", "custom": {}}]}}]}, "tool call of type 'custom'"),
    ],
)
def test_json_in_an_unknown_form_is_not_retried(found, named):
    error = read_reply(found, {7}, 64)
    assert isinstance(error, UnknownReply) and named in str(error)


def test_deeply_nested_json_is_an_unknown_reply():
    client = SimpleNamespace(post=AsyncMock(return_value=httpx.Response(200, content=b"[" * 10**5 + b"]" * 10**5)))
    with pytest.raises(UnknownReply, match="nested too deeply"):
        asyncio.run(send(client, "http://localhost/v1/chat/completions", {}))


def test_thinking_parts_are_reasoning():
    for thought in ("Why?", [{"type": "text", "text": "Why?"}]):
        parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "Sun."}]
        assert read(message={"content": parts}).message == {"content": "Sun.", "reasoning_content": "Why?"}


def test_null_arguments_are_empty_and_nested_ones_are_refused():
    def called(arguments):
        return read(message={"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})

    assert called("null").message["tool_calls"][0]["function"]["arguments"] == {}
    for depth in (200, 10**5):
        assert isinstance(called('{"a": ' + "[" * depth + "]" * depth + "}"), BadRecord)


@pytest.mark.parametrize(
    ("asked", "limit"),
    [({"max_tokens": 7}, 7), ({"max_tokens": -1}, None), ({"max_tokens": 9, "max_completion_tokens": 7}, 7)],
)
def test_a_token_limit_is_positive(asked, limit):
    assert token_limit(asked) == limit


def test_stop_strings_are_checked():
    assert stop_strings({"stop": "."}) == (".",) and not stop_strings({})
    with pytest.raises(UserError, match="expected a string or a list"):
        stop_strings({"stop": 5})


def test_a_stop_token_is_no_text_and_token_ids_without_it_are_not_used(encoder):
    def answer(content, ids, complete=True):
        return AnswerReader(encoder).read(Reply({"content": content}, complete, 3, ids, None, None), [])

    ids = encoder.backend.encode("Sun.").ids
    stop = min(encoder.token_ids.stop_ids)
    assert answer("Sun.<|im_end|>\n", None, complete=False) == Reply({"content": "Sun."}, True, 3, None, None, None)
    assert answer("Sun.<|im_end|>", [*ids, stop]).token_ids == [*ids, stop]
    assert answer("Sun.", ids).token_ids is None and answer("Sun.", ids, complete=False).token_ids == ids


@pytest.mark.parametrize("counts_stop_token", [True, False])
def test_text_is_verified_if_all_of_its_tokens_are_counted(counts_stop_token, encoder):
    reader, uncounted = AnswerReader(encoder), 0 if counts_stop_token else 1

    def verified(missing, complete=True):
        return reader.verified(Reply({"content": "x"}, complete, 10, None, None, None), 10 + missing)

    assert verified(uncounted) and verified(uncounted) and not verified(1 - uncounted) and not verified(2)
    assert verified(0, complete=False) and not verified(1, complete=False)


@pytest.mark.parametrize("alive", [Failed("HTTP 503", accepted=True), False])
def test_rejected_samples_that_another_worker_finishes_during_the_probe(alive, backend):
    finished = []
    backend.answered, backend.rejected = True, [(Sample("0", [], outcome="refused"), Rejected("HTTP 400"))]

    async def probe(client):
        backend._flush(finished.append)
        if alive:
            raise alive
        return alive

    backend._alive = probe
    asyncio.run(backend._finish_rejected(None, finished.append))
    assert len(finished) == 1


def test_the_probe_is_repeated_while_the_server_is_busy(backend, monkeypatch):
    monkeypatch.setattr(server_backend, "FIRST_PAUSE", 0.001)
    good = {"choices": [{"message": {"content": "Sun."}, "finish_reason": "stop"}]}
    replies = [httpx.Response(429), httpx.Response(503), httpx.ReadTimeout(""), httpx.Response(200, json=good)]
    client = SimpleNamespace(post=AsyncMock(side_effect=replies))
    assert asyncio.run(backend._alive_after_retries(client)) and client.post.await_count == 4


def test_one_rejection_does_not_end_the_requests_for_token_ids(encoder, backend):
    with StubServer(encoder=encoder, faults=[400]) as stub:
        samples = run(backend, stub, "abc")
    assert [bool(sample.token_ids) for sample in samples] == [False, True, True]


def test_an_unknown_ending_leaves_its_sample_open(backend):
    endings = iter(["stop", "odd", "stop", "stop"])
    with StubServer(finish=lambda _: next(endings)) as stub:
        samples = run(backend, stub, "abc")
    assert [sample.outcome for sample in samples] == ["kept", None, "kept"] and backend.open == 1
