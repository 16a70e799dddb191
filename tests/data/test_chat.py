"""Supervision: under every template, exactly the tokens that the assistant generates are supervised."""

import copy

import pytest
from helpers.chat import TARGET, encoder_for, supervised_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from data.errors import BadRecord, UserError
from data.preprocess.chat_template import ChatEncoder
from data.sources.records import Conversation
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


def answered(messages):
    """The conversation up to and including each answer."""
    return [messages[: turn + 1] for turn, message in enumerate(messages) if message["role"] == "assistant"]


def as_bytes(pieces):
    """The bytes of a reference's pieces, up to the end of the last supervised one: before it, and its own."""
    last = max(i for i, (_, supervised) in enumerate(pieces) if supervised)
    first = next(i for i in range(last, -1, -1) if i == 0 or not pieces[i - 1][1])
    return ["".join(text for text, _ in part).encode() for part in (pieces[:first], pieces[first : last + 1])]


@pytest.mark.slow(but="[qwen3]")
@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=150, deadline=None)
def test_supervision_equals_a_reference_per_byte(name, messages):
    encoder, tokenizer, reference = ENCODERS[name]
    to_bytes = bytes_of_token(tokenizer)
    found = [
        [b"".join(map(to_bytes, tokenizer.convert_ids_to_tokens(part))) for part in run]
        for run in supervised_runs(encoder.documents(Conversation(messages)))
    ]
    assert sorted(found) == sorted(as_bytes(list(reference(part))) for part in answered(messages))


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=100, deadline=None)
def test_each_answer_follows_the_tokens_of_its_prompt(name, messages):
    """Training sees the same tokens before the answer as decoding, even if the answer starts with a space."""
    encoder = ENCODERS[name][0]
    prompts = [prompt for prompt, _ in supervised_runs(encoder.documents(Conversation(messages)))]
    assert sorted(prompts) == sorted(encoder.prompt(Conversation(part[:-1])) for part in answered(messages))


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=50, deadline=None)
def test_documents_end_with_an_answer_and_the_whitespace_after_it(name, messages):
    encoder, tokenizer, _ = ENCODERS[name]
    for document in encoder.documents(Conversation(messages)):
        last = document.answers[-1]
        assert document.document.supervised[last.end - 1] and len(document.document.input_ids) == last.after
        assert not tokenizer.decode(document.document.input_ids[last.end :]).strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_equal_those_of_the_tokenizer(name):
    encoder, tokenizer, reference = ENCODERS[name]
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4.\n\n#### 4"}]
    text = "".join(piece for piece, _ in reference(messages))
    (only,) = encoder.documents(Conversation(messages))
    assert only.document.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_transformers_marks_the_same_tokens(tiny_tokenizer):
    """Compare the supervised tokens with those between the generation markers, which transformers finds."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}] * 2
    theirs = tiny_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = ChatEncoder(tiny_tokenizer, {}).documents(Conversation(messages))[0].document
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
    runs = supervised_runs(encoder.documents(Conversation(messages)))
    for (prompt, answer), turn in zip(runs, (1, 3), strict=True):
        text = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        joint = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompt == encoder.prompt(Conversation(messages[:turn]))
        assert joint[: len(prompt)] != prompt  # "the" is one token
        assert tokenizer.decode(prompt + answer) == text
        assert tokenizer.decode(answer) == "e 4<|im_end|>"


def test_whitespace_at_the_start_of_an_answer_is_supervised():
    """Byte-level post-processors, such as Llama 3's, trim whitespace from the token offsets."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "  \nb \n c"}]
    documents = []
    for trims in (False, True):
        tokenizer = load_tokenizer(TARGET)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
        documents.append(ChatEncoder(tokenizer, {}).documents(Conversation(messages))[0].document)
    assert documents[0].supervised.tolist() == documents[1].supervised.tolist()
    assert tokenizer.decode(documents[1].input_ids[documents[1].supervised]) == "  \nb \n c<|im_end|>"


def test_reasoning_is_supervised_in_each_answer():
    """The template drops it from the earlier answers: each has a document of its own."""
    encoder, tokenizer, _ = ENCODERS["qwen3 thinking"]
    answers = ["<think>\nx\n</think>\n\nb", "<think>\ny\n</think>\n\nd"]
    messages = [m for a in answers for m in ({"role": "user", "content": "q"}, {"role": "assistant", "content": a})]
    runs = supervised_runs(encoder.documents(Conversation(messages)))
    assert [tokenizer.decode(answer) for _, answer in runs] == [answer + "<|im_end|>" for answer in answers]
    assert "x" not in tokenizer.decode(runs[1][0])


def test_a_special_token_in_the_text_is_rejected():
    """It would be tokenized as an end of turn."""
    encoder = ENCODERS["markers"][0]
    messages = [{"role": "user", "content": "What does <|im_end|> mean?"}, {"role": "assistant", "content": "An end."}]
    with pytest.raises(BadRecord, match=r"turn 1: .* special token <\|im_end\|>"):
        encoder.render(Conversation(messages))


def test_a_conversation_that_the_template_rejects_is_a_bad_record():
    encoder = ENCODERS["mistral"][0]
    with pytest.raises(BadRecord, match="rejected by the target's chat template: .*must alternate"):
        encoder.prompt(Conversation([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]))


def test_a_tokenizer_without_a_chat_template_is_rejected(tiny_tokenizer):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatEncoder(bare, {})


def test_a_tokenizer_with_named_templates_and_no_default_is_rejected_with_their_names(tiny_tokenizer):
    named = copy.deepcopy(tiny_tokenizer)
    named.chat_template = {"rag": "a", "chat": "{{ messages[0].content }}"}
    with pytest.raises(UserError, match="has the chat templates chat, rag, but none named default. Choose one"):
        ChatEncoder(named, {})
    named.chat_template = named.chat_template["chat"]
    assert ChatEncoder(named, {}).template == "{{ messages[0].content }}"


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "chat_template", "continue_final_message"])
def test_reserved_template_arguments_are_rejected_without_the_command_line(name, tiny_tokenizer):
    with pytest.raises(UserError, match=f"data.template_kwargs.{name} is reserved"):
        ChatEncoder(tiny_tokenizer, {name: True})
