"""Records to tokens: the supervised tokens are what the assistant would write, end token included, and nothing else."""

import json
import re

import pytest

from data.chat import encode_conversation, encode_prompt
from data.conversations import read_conversations, read_prompts
from data.errors import UserError

CHATS = [
    [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4.\n#### 4"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "assistant\nHello."},
        {"role": "assistant", "content": "Hello."},
    ],
    [{"role": "user", "content": "No answer yet"}],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("markers", [True, False])
def test_supervised_tokens_are_the_answers_with_their_end(tiny_tokenizer, messages, markers, monkeypatch):
    if not markers:  # as most templates are: nothing says what the assistant writes
        plain = re.sub(r"{% (end)?generation %}", "", tiny_tokenizer.chat_template)
        assert plain != tiny_tokenizer.chat_template
        monkeypatch.setattr(tiny_tokenizer, "chat_template", plain)
    document = encode_conversation(tiny_tokenizer, messages, {})
    spans, current = [], []
    for token, supervised in zip(document.input_ids, document.supervised, strict=True):
        if supervised:
            current.append(token)
        elif current:
            spans.append(tiny_tokenizer.decode(current))
            current = []
    spans += [tiny_tokenizer.decode(current)] if current else []
    assert spans == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]


def test_a_turn_that_the_template_renders_differently_later_goes_unsupervised(tiny_tokenizer, monkeypatch):
    """Qwen3's habit: an earlier answer loses its reasoning as soon as another turn follows."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>y</think>d"},
    ]
    document = encode_conversation(tiny_tokenizer, messages, {})
    assert tiny_tokenizer.decode(document.input_ids[document.supervised]) == "<think>y</think>d<|im_end|>"


def test_a_prompt_is_the_beginning_of_its_conversation(tiny_tokenizer):
    for messages in CHATS[:2]:
        prompt = encode_prompt(tiny_tokenizer, messages[:-1], {})
        document = encode_conversation(tiny_tokenizer, messages, {})
        assert document.input_ids[: len(prompt)].tolist() == prompt
        assert document.supervised[len(prompt)] and not document.supervised[len(prompt) - 1]


def test_record_shapes(tmp_path):
    path = tmp_path / "data.jsonl"
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    path.write_text(json.dumps({"conversations": sharegpt}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    assert read_conversations(str(path)) == [messages, messages]
    assert read_prompts(str(path)) == [messages[:2], messages[:2]]
    assert len(read_conversations(str(path), max_records=1)) == 1


def test_bad_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:1: not a JSON object in UTF-8"):
        read_conversations(str(path))


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    for encode in (encode_conversation, encode_prompt):
        with pytest.raises(UserError, match="no chat template"):
            encode(tiny_tokenizer, CHATS[0], {})
