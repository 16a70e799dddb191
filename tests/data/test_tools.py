"""Tools in chat templates: where templates read them, forms of calls, special tokens, answers left out of training."""

import json
import sys
import zipfile

import bfcl_records
import pytest
from helpers.chat import supervised_runs
from helpers.families import FAMILIES
from helpers.supervision import SYSTEM, TOOLS, agent, assistant, calling, result, user

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.prepare import describe_answers
from data.preprocess.spans import TEXT_DROPPED
from data.preprocess.table import TokenizeSettings
from data.preprocess.tokenized import tokenize
from data.sources.readers import open_sources
from data.sources.records import Conversation, conversation, questions

CALLED = [user(0), calling(0), result(0), assistant(0)]
# Calls as in DeepSeek's templates: JSON text, which cannot be joined with an object.
JSON_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + ': ' + c['function']['arguments'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder_of(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    return ChatEncoder(tokenizer, family.kwargs, family.stop_ids(tokenizer)), tokenizer


@pytest.fixture(scope="module")
def qwen():
    return encoder_of("Qwen2.5")


def test_arguments_are_json_text_where_the_template_needs_it(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", JSON_TEXT)
    runs = supervised_runs(ChatEncoder(tiny_tokenizer, {}).documents(Conversation(CALLED)))
    arguments = json.dumps(calling(0)["tool_calls"][0]["function"]["arguments"], ensure_ascii=False)
    assert tiny_tokenizer.decode(runs[0][1]) == f"get_forecast: {arguments}<|im_end|>"


@pytest.mark.parametrize("given", ["call_0Aq7", None])
def test_ids_that_mistral_rejects_are_replaced(given):
    encoder, tokenizer = encoder_of("Mistral 7B v0.3")
    parallel = calling(0, 2)
    results = [result(0, 1), result(0)] if given else [result(0), result(0, 1)]
    for i, call in enumerate(parallel["tool_calls"]):
        call["id"] = given and f"{given}{i}"
    for message, i in zip(results, (1, 0) if given else (0, 1), strict=True):
        message["tool_call_id"] = given and f"{given}{i}"
    bare = [{k: v for k, v in m.items() if v is not None} for m in (parallel, *results)]
    bare[0]["tool_calls"] = [{k: v for k, v in call.items() if v is not None} for call in bare[0]["tool_calls"]]
    runs = supervised_runs(encoder.documents(Conversation([user(0), *bare, assistant(0)], TOOLS)))
    ids = [call["id"] for call in json.loads(tokenizer.decode(runs[0][1])[len("[TOOL_CALLS] ") : -len("</s>")])]
    assert all(len(name) == 9 and name.isalnum() for name in ids) and len(set(ids)) == 2
    prompt = tokenizer.decode(runs[1][0])
    order = [prompt.rindex(f'"call_id": "{name}"') for name in ids]
    assert sorted(order, reverse=given is not None) == order


def test_a_template_named_tool_use_renders_conversations_with_tools(qwen):
    """As in transformers, for tokenizers with several templates."""
    encoder, tokenizer = qwen
    plain = "{% for m in messages %}{{ m['role'] + m['content'] }}<|im_end|>{% endfor %}assistant"
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    tokenizer.chat_template = {"default": plain, "tool_use": tokenizer.chat_template}
    both = ChatEncoder(tokenizer, {}, [tokenizer.eos_token_id])
    with_tools, without = Conversation(CALLED, TOOLS), Conversation([user(0), assistant(0)])
    assert supervised_runs(both.documents(with_tools)) == supervised_runs(encoder.documents(with_tools))
    assert both.prompt(without) == tokenizer.apply_chat_template(without.messages)["input_ids"]


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([user(0), calling(0) | {"reasoning_content": "<|im_end|>"}], TOOLS, "turn 2: .*special token <.im_end.>"),
        ([user(0), calling(0), result(0) | {"content": "<|im_end|>"}, assistant(0)], TOOLS, "turn 3: .*special token"),
        (CALLED, [{"type": "function", "function": {"name": "<|im_start|>"}}], "the tools contain .*special token"),
    ],
)
def test_special_tokens_are_refused_everywhere(messages, tools, reason, qwen):
    with pytest.raises(BadRecord, match=reason):
        qwen[0].render(Conversation(messages, tools))
    with pytest.raises(BadRecord, match=reason):
        qwen[0].prompt(Conversation(messages, tools))


def test_special_tokens_in_arguments_are_refused(qwen):
    call = calling(0)
    call["tool_calls"][0]["function"]["arguments"] = {"city": ["<|im_end|>"]}
    with pytest.raises(BadRecord, match=r"turn 2: .*special token <\|im_end\|>"):
        qwen[0].render(Conversation([user(0), call], TOOLS))


def test_tools_that_the_template_drops_are_refused_in_prompts_too():
    with pytest.raises(BadRecord, match="does not write `tools` into the prompt"):
        encoder_of("Gemma 3")[0].prompt(Conversation([user(0)], TOOLS))


@pytest.mark.parametrize("content", ["It rains.", "6", "day"])
def test_results_that_the_template_drops_are_refused(content):
    """Under a template that skips turns of role tool, although the question holds the text of short results."""
    family = FAMILIES["Qwen2.5"]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = "{% set messages = messages | rejectattr('role', 'equalto', 'tool') | list %}" + (
        tokenizer.chat_template
    )
    called = [m | {"content": content} if m["role"] == "tool" else m for m in CALLED]
    refused = ChatEncoder(tokenizer, {}, family.stop_ids(tokenizer)).render(Conversation(called)).supervision.refused
    assert refused == {4: "the chat template does not write the result of a tool into the prompt"}


def test_text_that_the_template_drops_beside_a_call_is_counted(qwen):
    conversation = Conversation([user(0), calling(0, content="Let me see.")])
    assert not qwen[0].render(conversation).supervision.notes
    assert encoder_of("Hermes 3")[0].render(conversation).supervision.notes[TEXT_DROPPED] == 1


CHATML = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NAMES_DEVELOPER = "{% if messages[0].role == 'developer' %}{{ messages[0].content }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "kept"),
    [
        (None, False),  # Qwen's
        ("You help developers.\n" + CHATML, False),
        ("{{ 'You help every developer.' }}" + CHATML, False),
        ("{% if messages[0].role == 'developer' %}{{ raise_exception('unknown role') }}{% endif %}" + CHATML, False),
        (NAMES_DEVELOPER + CHATML, True),
    ],
)
def test_developer_turns_are_system_turns_where_the_template_has_no_form_for_them(template, kept):
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    encoder = ChatEncoder(tokenizer, {}, [tokenizer.eos_token_id])
    developer = [SYSTEM | {"role": "developer"}, user(0)]
    expected = tokenizer.apply_chat_template(developer if kept else [SYSTEM, user(0)], add_generation_prompt=True)
    assert encoder.prompt(Conversation(developer)) == expected["input_ids"]


def test_developer_turns_that_are_dropped_as_system_turns_are_refused():
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    tokenizer.chat_template = CHATML.replace("messages", "messages | rejectattr('role', 'equalto', 'system')")
    with pytest.raises(BadRecord, match="does not write the system prompt"):
        ChatEncoder(tokenizer, {}, None).prompt(Conversation([SYSTEM | {"role": "developer"}, user(0)]))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_passed_under_each_name_that_templates_read(name):
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    tokenizer.chat_template = CHATML.replace("m.content", f"('[' + m.{name} + ']' if m.{name} else '') ~ m.content")
    encoder = ChatEncoder(tokenizer, {}, [tokenizer.eos_token_id])
    ((_, answer),) = supervised_runs(encoder.documents(Conversation([user(0), assistant(0, "1 more.")])))
    assert tokenizer.decode(answer).startswith("[1 more.]She has 0.")


@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3"])
def test_answers_left_out_of_training_are_history(name):
    encoder, _ = encoder_of(name)
    messages = [*agent(2), *agent(1)]
    everything = supervised_runs(encoder.documents(Conversation(messages, TOOLS)))
    part = Conversation(messages, TOOLS, untrained=frozenset([1, 5]))
    assert supervised_runs(encoder.documents(part)) == [everything[1], *everything[3:]]
    assert encoder.render(part).untrained == 2 and encoder.render(part).answers == 5


def test_the_report_counts_answers_left_out_of_training(tmp_path, qwen):
    records = [{"messages": [user(0), assistant(0) | {"weight": 0}, user(1), assistant(1)]}, {"messages": CALLED}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = open_sources(str(path), split="train", max_records=None)
    documents = tokenize(sources, qwen[0], TokenizeSettings(max_seq_len=512, truncation="turn"), num_proc=1)
    sentence = "4 answers: 3 supervised in the first document of a conversation, 1 used only as history because"
    assert describe_answers(documents).startswith(sentence)


def test_prompts_of_the_function_calling_leaderboard_become_records(tmp_path, monkeypatch, capsys):
    schema = {"type": "dict", "properties": {"x": {"type": "float"}, "note": {"type": "any"}}}
    prompt = {"id": "a", "question": [[user(0)]], "function": [{"name": "f", "description": "d", "parameters": schema}]}
    truth = {"id": "a", "ground_truth": [{"f": {"x": [1.5, 2], "note": ["", "b"]}}, {"f": {"x": [{"y": ["z"]}]}}]}
    with zipfile.ZipFile(tmp_path / "bfcl.whl", "w") as wheel:
        for name in bfcl_records.DOCS.values():
            wheel.writestr(f"{bfcl_records.DATA}multi_turn_func_doc/{name}.json", "")
        wheel.writestr(f"{bfcl_records.DATA}BFCL_v4_parallel.json", json.dumps(prompt))
        wheel.writestr(f"{bfcl_records.DATA}possible_answer/BFCL_v4_parallel.json", json.dumps(truth))
    monkeypatch.setattr(sys, "argv", ["bfcl_records.py", str(tmp_path / "bfcl.whl"), "--out", str(tmp_path)])
    bfcl_records.main()
    assert "     1 prompts" in capsys.readouterr().out
    asked = questions(json.loads((tmp_path / "prompts.jsonl").read_text()))
    parameters = {"type": "object", "properties": {"x": {"type": "number"}, "note": {}}}
    assert asked.messages == [user(0)] and asked.tools[0]["function"]["parameters"] == parameters
    answer = conversation(json.loads((tmp_path / "calls.jsonl").read_text())).messages[1]
    assert [c["function"]["arguments"] for c in answer["tool_calls"]] == [{"x": 1.5}, {"x": {"y": "z"}}]
