"""Supervision: under every template, exactly the tokens that the assistant generates are supervised."""

import copy

import pytest
from helpers.chat import TARGET, encoder_for
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from models.target import load_tokenizer

TEXT = st.text(alphabet="ab7 \n\t.é漢🙂<>/", min_size=1, max_size=12).filter(str.strip)
SYSTEM = st.none() | TEXT


@st.composite
def conversations(draw):
    system = draw(SYSTEM)
    messages = [{"role": "system", "content": system}] if system else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    return messages[:-1] if len(messages) > 3 and draw(st.booleans()) else messages


# Reference renderings: yield pieces of text, each with whether it is supervised.


def tiny(messages):
    for m in messages:
        yield f"<|im_start|>{m['role']}\n", False
        yield m["content"] + "<|im_end|>", m["role"] == "assistant"


def qwen3(messages, thinking):
    for i, m in enumerate(messages):
        yield f"<|im_start|>{m['role']}\n", False
        if m["role"] == "assistant" and i == len(messages) - 1:
            yield "<think>\n\n</think>\n\n", thinking  # without thinking, part of the prompt
            yield m["content"].lstrip("\n") + "<|im_end|>", True
        else:  # generated after an empty reasoning block, which the template drops
            yield m["content"] + "<|im_end|>", False
        yield "\n", False


def llama3(messages):
    yield "<s>", False
    for m in messages:
        yield f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False
        yield m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"


def mistral(messages):
    yield "<s>", False
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    for m in messages[bool(system) :]:
        if m["role"] == "assistant":
            yield " " + m["content"] + "</s>", True
        else:
            yield f" [INST] {system}{m['content']} [/INST]", False
            system = ""


TEMPLATES = {
    "markers": (None, {}, tiny),
    "no markers": ("tiny without markers", {}, tiny),
    "qwen3": ("qwen3", {"enable_thinking": False}, lambda m: qwen3(m, False)),
    "qwen3 thinking": ("qwen3", {}, lambda m: qwen3(m, True)),
    "llama3": ("llama3", {}, llama3),
    "mistral": ("mistral", {}, mistral),
}


ENCODERS = {name: (*encoder_for(*how[:2]), how[2]) for name, how in TEMPLATES.items()}


def bytes_of_token(tokenizer):
    """Return a function from token to bytes, by GPT-2's byte-level alphabet: printable bytes map to themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet, extra = {chr(b): b for b in printable}, 0
    for byte in range(256):
        if byte not in printable:
            alphabet[chr(256 + extra)] = byte
            extra += 1
    special = {t.content for t in tokenizer.added_tokens_decoder.values()}
    return lambda token: token.encode() if token in special else bytes(alphabet[c] for c in token)


@pytest.mark.slow(but="[qwen3]")
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=150, deadline=None)
def test_supervision_equals_a_reference_per_byte(name, messages):
    encoder, tokenizer, reference = ENCODERS[name]
    document = encoder.conversation(messages)
    expected = [(byte, answer) for text, answer in reference(messages) for byte in text.encode()]
    to_bytes, at = bytes_of_token(tokenizer), 0
    for token, supervised in zip(
        tokenizer.convert_ids_to_tokens(document.input_ids.tolist()), document.supervised.tolist(), strict=True
    ):
        content = to_bytes(token)
        assert [(byte, supervised) for byte in content] == expected[at : at + len(content)]
        at += len(content)
    assert at == len(expected)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=100, deadline=None)
def test_a_conversation_starts_with_the_tokens_of_its_prompt(name, messages):
    """Training sees the same tokens before the answer as decoding, even if the answer starts with a space."""
    encoder = ENCODERS[name][0]
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    if last != len(messages) - 1 or any(m["content"][0].isspace() for m in messages[:last]):
        return  # inside a longer conversation, an answer that starts with a space merges with its prompt
    prompt, document = encoder.prompt(messages[:last]), encoder.conversation(messages)
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert not document.supervised[len(prompt) - 1] and document.supervised[len(prompt) :].any()


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_equal_those_of_the_tokenizer(name):
    encoder, tokenizer, reference = ENCODERS[name]
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4.\n\n#### 4"}]
    text = "".join(piece for piece, _ in reference(messages))
    assert encoder.conversation(messages).input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_transformers_marks_the_same_tokens(tiny_tokenizer):
    """Compare the spans of the generation markers with those of transformers."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}] * 2
    theirs = tiny_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = ChatEncoder(tiny_tokenizer, {}).conversation(messages)
    assert ours.input_ids.tolist() == theirs["input_ids"]
    assert ours.supervised.tolist() == [bool(x) for x in theirs["assistant_masks"]]


MERGING = (
    "{% for m in messages %}{{ m['role'] + ' says th' + m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant says th{% endif %}"
)


def test_an_answer_that_merges_with_its_prompt_is_tokenized_separately():
    """Decoding tokenizes the prompt before the answer exists: no token may span both."""
    tokenizer = load_tokenizer(TARGET)
    tokenizer.chat_template = MERGING
    messages = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "e 4"}] * 2
    encoder = ChatEncoder(tokenizer, {})
    prompt, document = encoder.prompt(messages[:1]), encoder.conversation(messages)
    joint = tokenizer(encoder.render(messages).text, add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt  # "the" is one token
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(document.input_ids) == encoder.render(messages).text
    assert tokenizer.decode(document.input_ids[document.supervised]) == "e 4<|im_end|>" * 2


def test_whitespace_at_the_start_of_an_answer_is_supervised():
    """Byte-level post-processors, such as Llama 3's, trim whitespace from the token offsets."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "  \nb \n c"}]
    documents = []
    for trims in (False, True):
        tokenizer = load_tokenizer(TARGET)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
        documents.append(ChatEncoder(tokenizer, {}).conversation(messages))
    assert documents[0].supervised.tolist() == documents[1].supervised.tolist()
    assert tokenizer.decode(documents[1].input_ids[documents[1].supervised]) == "  \nb \n c<|im_end|>"


def test_reasoning_is_supervised_in_the_last_answer_only():
    encoder, tokenizer, _ = ENCODERS["qwen3 thinking"]
    answers = ["<think>\nx\n</think>\n\nb", "<think>\ny\n</think>\n\nd"]
    messages = [m for a in answers for m in ({"role": "user", "content": "q"}, {"role": "assistant", "content": a})]
    document = encoder.conversation(messages)
    assert tokenizer.decode(document.input_ids[document.supervised]) == answers[1] + "<|im_end|>"


def test_a_special_token_in_the_text_is_rejected():
    """It would be tokenized as an end of turn."""
    encoder = ENCODERS["markers"][0]
    messages = [{"role": "user", "content": "What does <|im_end|> mean?"}, {"role": "assistant", "content": "An end."}]
    with pytest.raises(BadRecord, match=r"turn 1: .* special token <\|im_end\|>"):
        encoder.render(messages)


def test_a_conversation_that_the_template_rejects_is_a_bad_record():
    encoder = ENCODERS["mistral"][0]
    with pytest.raises(BadRecord, match="rejected by the target's chat template: .*must alternate"):
        encoder.prompt([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_tokenizer_without_a_chat_template_is_rejected(tiny_tokenizer):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatEncoder(bare, {})
