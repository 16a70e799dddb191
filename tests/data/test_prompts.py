"""Held-out prompts and benchmarks: a run and the report find the same faults, with file and line."""

import copy
import json

import pytest
from helpers.records import config

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.questions import first_prompt_length
from data.report.prompts import read_prompts
from data.sources.records import Conversation, questions
from train.context import Resources


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


GOOD = {"turns": ["One?", "Two?"]}
BAD = {
    "special token in the first turn": {"turns": ["<|im_end|>", "Two?"]},
    "special token in a later turn": {"turns": ["One?", "Two?", "<|im_end|>"]},
}


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer):
    return ChatEncoder(tiny_tokenizer, {})


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_prompt_is_reported_with_its_line_before_any_work(bad, tmp_path, encoder):
    path = written(tmp_path / "prompts.jsonl", GOOD, bad)
    resources = Resources(changed := config(data__prompts=path))
    resources.__dict__["_encoder_and_tokenizer"] = encoder, None
    message = r"benchmarks\.held_out\.path: .*prompts\.jsonl:2: turn \d: the text contains the target's special token"
    with pytest.raises(UserError, match=message):
        resources.benchmarks  # noqa: B018
    with pytest.raises(UserError, match=message):
        read_prompts(changed, encoder)


def test_prompts_that_no_benchmark_reads_are_checked_by_the_report(tmp_path, encoder):
    changed = config(data__prompts=str(tmp_path / "bad.jsonl"))
    changed.benchmarks = {"mine": {"path": written(tmp_path / "good.jsonl", GOOD)}, "hub": {"path": "owner/name"}}
    written(tmp_path / "bad.jsonl", GOOD, {"messages": [{"role": "user", "content": "<|im_end|>"}]})
    with pytest.raises(UserError, match=r"data\.prompts: .*bad\.jsonl:2: turn 1"):
        read_prompts(changed, encoder)
    written(tmp_path / "bad.jsonl", GOOD)
    assert len(read_prompts(changed, encoder)) == 1


STRICT = """{% for m in messages %}
{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('order') }}
{% elif 'no' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"""


def test_the_first_prompt_is_measured_and_later_turns_are_rendered(tiny_tokenizer):
    strict = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = STRICT
    encoder = ChatEncoder(strict, {})
    conversation = questions(GOOD)
    first = Conversation(conversation.messages[:1])
    assert first_prompt_length(encoder, conversation) == len(encoder.prompt(first))
    with pytest.raises(BadRecord, match="chat template: no"):
        first_prompt_length(encoder, questions({"turns": ["One?", "no"]}))
