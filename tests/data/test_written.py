"""Answers stored as tokens: training takes exactly these, refuses tokens of another text, and adds no end to a cut."""

import json
from unittest.mock import Mock

import pytest
from helpers.chat import supervised_runs
from helpers.families import FAMILIES

from data.errors import BadRecord
from data.preprocess import written
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.prepare import describe_answers
from data.preprocess.tokenized import TokenizeSettings, tokenize
from data.preprocess.written import reads_as
from data.sources.readers import open_sources
from data.sources.records import Conversation, Written, conversation

NAMES = ("Qwen2.5", "Qwen3", "Qwen3-Thinking", "Mistral Nemo", "OLMo 3", "gpt-oss")
SYSTEM = {"role": "system", "content": "Count the apples."}
WRITES_REASONING = ("Qwen3", "Qwen3-Thinking", "gpt-oss")


def chat(name):
    messages = [SYSTEM]
    for day in range(3):
        messages.append({"role": "user", "content": f"How many apples has she after day {day}?"})
        messages.append({"role": "assistant", "content": f"She has {day} apples.\n\n{day + 1} tomorrow."})
        messages[-1] |= {"reasoning_content": "1 more."} if name in WRITES_REASONING else {}
    return messages


CHAT = chat(None)
TURNS = (2, 4, 6)


@pytest.fixture(scope="module")
def encoders():
    found = {}
    for name in NAMES:
        tokenizer = FAMILIES[name].tokenizer()
        found[name] = tokenizer, ChatEncoder(tokenizer, FAMILIES[name].kwargs, FAMILIES[name].stop_ids(tokenizer))
    return found


def target_text(name, message):
    return FAMILIES[name].writes(message["content"], message.get("reasoning_content"))


def in_pieces(tokenizer, text, end, sizes=(3, 1)):
    """Tokens of a text as another tokenization than the tokenizer's own, with the end token."""
    ids, at = [], 0
    while at < len(text):
        size = sizes[len(ids) % len(sizes)]
        ids += tokenizer(text[at : at + size], add_special_tokens=False)["input_ids"]
        at += size
    return ids + tokenizer(end, add_special_tokens=False)["input_ids"]


def content_pieces(name, tokenizer, message):
    """Tokens that a target might write for a message: markers of channels and reasoning intact, content in pieces."""
    text, end, content = target_text(name, message), FAMILIES[name].end, message["content"]
    markup = tokenizer(text.removesuffix(content), add_special_tokens=False)["input_ids"]
    return markup + in_pieces(tokenizer, content, end)


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_that_the_target_wrote_are_supervised_after_their_prompt(name, encoders):
    (tokenizer, encoder), messages = encoders[name], chat(name)
    written = {turn: Written(content_pieces(name, tokenizer, messages[turn]), False) for turn in TURNS}
    expected = [(encoder.prompt(Conversation(messages[:turn])), written[turn].token_ids) for turn in TURNS]
    documents = encoder.documents(Conversation(messages, written=written))
    assert supervised_runs(documents) == expected and all(document.by_ids for document in documents)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_equal_the_text_change_nothing(name, encoders):
    encoder, messages = encoders[name][1], chat(name)
    plain = encoder.documents(Conversation(messages))
    written = {}
    for turn, (_, ids) in zip(TURNS, supervised_runs(plain), strict=True):
        written[turn] = Written(ids, False)
    found = encoder.documents(Conversation(messages, written=written))
    assert [d.document.input_ids.tolist() for d in found] == [d.document.input_ids.tolist() for d in plain]
    assert supervised_runs(found) == supervised_runs(plain) and not any(document.by_ids for document in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_answer_has_no_end_token(name, encoders):
    (tokenizer, encoder), messages = encoders[name], chat(name)[:3]
    prompt = encoder.prompt(Conversation(messages[:2]))
    ((_, as_text),) = supervised_runs(encoder.documents(Conversation(messages)))
    (by_text,) = encoder.documents(Conversation(messages, written={2: Written(None, True)}))
    end = len(tokenizer(FAMILIES[name].end, add_special_tokens=False)["input_ids"])
    # The last token of the text may be an artefact of the cut.
    assert supervised_runs([by_text]) == [(prompt, as_text[: -end - 1])]
    assert by_text.document.input_ids.tolist() == prompt + as_text[: -end - 1]
    messages[2]["content"] = messages[2]["content"][:7]
    ids = content_pieces(name, tokenizer, messages[2])[:-end]
    rendered = encoder.render(Conversation(messages, written={2: Written(ids, True)}))
    assert supervised_runs(encoder.tokenize([rendered])[0]) == [(prompt, ids)]
    assert rendered.supervision.notes == {"cut off": 1}


def test_an_answer_that_the_text_path_refuses_is_taken_by_its_tokens(encoders):
    """After a prompt that opens a reasoning block, a truncated answer may consist of reasoning alone."""
    tokenizer, encoder = encoders["Qwen3-Thinking"]
    ids = tokenizer("She had 3, and", add_special_tokens=False)["input_ids"]
    answer = {"role": "assistant", "content": "She had 3, and", "token_ids": ids, "truncated": True}
    rendered = encoder.render(conversation({"messages": [CHAT[1], answer]}))
    assert not rendered.supervision.refused
    assert supervised_runs(encoder.tokenize([rendered])[0]) == [(encoder.prompt(Conversation([CHAT[1]])), ids)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids: [99_999], "turn 2: `token_ids`: 99999 is not in the target's vocabulary"),
        (lambda ids: ids[:-2] + ids[-1:], "turn 2: `token_ids` decode to 'She has"),
        (lambda ids: [*ids, *ids], "turn 2: `token_ids`: tokens follow a stop token"),
        (lambda ids: ids[::-1][1:], "turn 2: `token_ids` decode to"),
        (lambda ids: [], "turn 2: `token_ids`: expected a list of token ids, found an empty list"),
        (lambda ids: "7", "turn 2: `token_ids`: expected a list of token ids, found a string"),
        (lambda ids: [-1], "turn 2: `token_ids`: expected a list of token ids"),
        (lambda ids: [True], "turn 2: `token_ids`: expected a list of token ids"),
    ],
)
def test_tokens_that_do_not_belong_to_the_text_are_refused(change, reason, encoders):
    tokenizer, encoder = encoders["Qwen2.5"]
    ids = tokenizer("She has 3.<|im_end|>", add_special_tokens=False)["input_ids"]
    answer = {"role": "assistant", "content": "She has 3."}
    good = conversation({"messages": [CHAT[1], {**answer, "token_ids": ids}]})
    assert good.written == {1: Written(ids, False)} and encoder.documents(good)
    with pytest.raises(BadRecord) as error:
        encoder.documents(conversation({"messages": [CHAT[1], {**answer, "token_ids": change(ids)}]}))
    assert str(error.value).startswith(reason)


THOUGHT = (
    "<think>\nThree and four.\n</think>\n\nThe answer is 7, see above.",
    "Three and four.",
    "The answer is 7, see above.",
)
CHANNELS = "<|channel|>analysis<|message|>3 and 4.<|end|><|start|>assistant<|channel|>final<|message|>It is 7."
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Paris", "days": [1e1, true], "of": "a\\nb"}}\n</tool_call>'
ARGUMENTS = {"city": "Paris", "days": [10, True], "of": "a\nb"}


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "arguments", "good"),
    [
        (*THOUGHT, None, True),
        (THOUGHT[0].removeprefix("<think>"), *THOUGHT[1:], None, True),
        (THOUGHT[0], THOUGHT[1], "The answer is 7", None, False),
        (THOUGHT[0], THOUGHT[1], "see above.", None, False),
        (THOUGHT[0], "Three", THOUGHT[2], None, False),
        (THOUGHT[0], "four.", THOUGHT[2], None, False),
        (THOUGHT[0], THOUGHT[1], "four", None, False),
        (THOUGHT[0], "T", "a", None, False),
        (CHANNELS, "3 and 4.", "It is 7.", None, True),
        (CHANNELS, "3 and 4.", "7.", None, False),
        (CALL, "", "", ARGUMENTS, True),
        (CALL, "", "", ARGUMENTS | {"city": "Rome"}, False),
        (CALL, "", "", ARGUMENTS | {"days": [3, True]}, False),
        (CALL, "", "", ARGUMENTS | {"days": [10, False]}, False),
        ("I will look." + CALL, "", "I will look.", ARGUMENTS, True),
        ("I will look." + CALL, "", "I will", ARGUMENTS, False),
        (f"<think>\nHm.\n</think>\n\nI will look.\n{CALL}", "Hm.", "I will look.", ARGUMENTS, True),
        (f"<think>\nHm. Well.\n</think>\n\n{CALL}", "Hm.", "", ARGUMENTS, False),
    ],
)
def test_edited_parts_of_an_answer_do_not_keep_its_tokens(text, reasoning, content, arguments, good):
    message = {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
    message |= {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]} if arguments else {}
    assert reads_as(text, message) == good


def test_the_numbers_of_a_call_are_read_once_and_exactly(monkeypatch):
    pattern, found = written.NUMBER, Mock()
    found.findall.side_effect = pattern.findall
    monkeypatch.setattr(written, "NUMBER", found)
    numbers = [2**63 + 1, -1.5, *range(50)]

    def same(arguments):
        message = {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        return reads_as(f"<tool_call>f {numbers}</tool_call>", message)

    assert same({"a": numbers}) and found.findall.call_count == 1
    assert not same({"a": [2**63]}) and not same({"a": [51]})


@pytest.mark.parametrize("token", [2**32 + 5, 2**40, -1])
def test_tokens_beyond_32_bits_are_not_in_the_vocabulary(token, encoders):
    with pytest.raises(BadRecord, match=f"{token} is not in the target's vocabulary"):
        encoders["Qwen2.5"][1].token_ids.check(CHAT[2], [token])


def test_the_fingerprint_has_the_date_only_if_the_template_writes_it():
    tokenizer = FAMILIES["Qwen2.5"].tokenizer()
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer.chat_template = today + "{{ date_string }}" + tokenizer.chat_template
    assert "date" in ChatEncoder(tokenizer, {}).fingerprint()
    assert "date" not in ChatEncoder(tokenizer, {"date_string": "26 Jul 2024"}).fingerprint()


def test_only_answers_have_tokens(encoders):
    for extra in ({"token_ids": [1]}, {"truncated": True}):
        with pytest.raises(BadRecord, match="turn 1: `token_ids` and `truncated` describe answers, not a user turn"):
            conversation({"messages": [{**CHAT[1], **extra}, CHAT[2]]})
    with pytest.raises(BadRecord, match="turn 2: `truncated`: expected true or false, found a number"):
        conversation({"messages": [CHAT[1], {**CHAT[2], "truncated": 1}]})


def test_a_special_token_in_the_text_is_allowed_only_where_the_tokens_are_taken(encoders):
    tokenizer, encoder = encoders["Qwen2.5"]
    ids = [token for part in ("Use <|im", "_end|> here.") for token in tokenizer(part)["input_ids"]]
    answer = {"role": "assistant", "content": "Use <|im_end|> here.", "token_ids": [*ids, tokenizer.eos_token_id]}
    (document,) = encoder.documents(conversation({"messages": [CHAT[1], answer]}))
    assert supervised_runs([document]) == [(encoder.prompt(Conversation([CHAT[1]])), answer["token_ids"])]
    with pytest.raises(BadRecord, match="turn 2: the text contains the target's special token"):
        encoder.documents(conversation({"messages": [CHAT[1], answer, CHAT[3], CHAT[4]]}))


def test_answers_taken_by_their_tokens_are_counted(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["She has 3 apples.", "Then she has 5 apples."]
    messages = []
    for text in texts:
        messages += [CHAT[1], {"role": "assistant", "content": text}]
    same = [tiny_tokenizer(text + "<|im_end|>")["input_ids"] for text in texts]
    other = in_pieces(tiny_tokenizer, texts[1], "<|im_end|>")
    cut = tiny_tokenizer("She has")["input_ids"]
    records = [
        {
            "messages": [
                messages[0],
                {**messages[1], "token_ids": same[0]},
                messages[2],
                {**messages[3], "token_ids": ids},
            ]
        }
        for ids in (same[1], other)
    ]
    last = {"role": "assistant", "content": "She has", "token_ids": cut, "truncated": True}
    records.append({"messages": [messages[0], last]})
    records.append({"messages": [messages[0], {**messages[1], "token_ids": same[1]}]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = open_sources(str(tmp_path / "data.jsonl"), split="train", max_records=None)
    documents = tokenize(sources, ChatEncoder(tiny_tokenizer, {}), TokenizeSettings(256, "turn"), num_proc=1)
    counts = documents.answers()
    assert (counts["answers"], counts["supervised"], counts["by_ids"], counts["separate"]) == (5, 5, 2, 0)
    assert counts["cut_off"] == 1 and counts["no_end"] == 0 and documents.outcomes()["bad"] == 1
    assert "2 supervised by their token ids, where the text reads back differently or was cut off" in describe_answers(
        documents
    )
    assert (
        documents[1].input_ids.tolist()[-len(other) :] == other
        or documents[2].input_ids.tolist()[-len(other) :] == other
    )
