"""Each answer is trained on as decoding produces it, under the chat templates of published model families.

The reference is in helpers/supervision.py.
"""

import time

import pytest
from helpers.chat import supervised_runs
from helpers.families import FAMILIES, no_calls
from helpers.supervision import (
    CONVERSATIONS,
    KNOWS_BLOCKS,
    SYSTEM,
    TOOLS,
    WITH_TOOLS,
    agent,
    assistant,
    expected,
    refusal,
    user,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.spans import NO_END_TOKEN, OTHER_END_TOKEN, REASONING_DROPPED
from data.sources.records import Conversation

TEXT = st.text(alphabet="ab7 \n\t.é漢🙂<>/", min_size=1, max_size=8).filter(str.strip)


REWRITING = KNOWS_BLOCKS | {"OLMo 3", "gpt-oss"}  # these two end the last answer with another token


@pytest.fixture(scope="module")
def encoders():
    """Family -> tokenizer and encoder."""
    found = {}
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer()
        found[name] = tokenizer, ChatEncoder(tokenizer, family.kwargs, family.stop_ids(tokenizer))
    return found


def check(name, conversation, encoders):
    """Compare the supervised tokens with the reference. Return the refused turns."""
    tokenizer, encoder = encoders[name]
    if reason := refusal(name, conversation):
        with pytest.raises(BadRecord, match=reason):
            encoder.render(conversation)
        return None
    answers, refused = expected(name, tokenizer, conversation)
    rendered = encoder.render(conversation)
    assert supervised_runs(encoder.tokenize([rendered])[0]) == answers
    assert list(rendered.supervision.refused) == refused
    assert len(answers) + len(refused) == rendered.answers
    assert rendered.answers == sum(message["role"] == "assistant" for message in conversation.messages)
    assert not rendered.supervision.notes[NO_END_TOKEN] and not rendered.supervision.notes[OTHER_END_TOKEN]
    return rendered.supervision.refused


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_supervised_or_refused_by_name(name, conversation, encoders):
    refused = check(name, Conversation(CONVERSATIONS[conversation]), encoders)
    assert all("has no reasoning" in reason for reason in (refused or {}).values())


@pytest.mark.parametrize("conversation", WITH_TOOLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_with_tools_is_supervised_or_refused_by_name(name, conversation, encoders):
    """The prompt of each answer shows the tools; calls end with a stop token; results are never supervised."""
    refused = check(name, Conversation(WITH_TOOLS[conversation], TOOLS), encoders)
    reasons = ("has no reasoning", "the chat template does not write the tool call get_")
    assert all(reason.startswith(reasons) or reasons[0] in reason for reason in (refused or {}).values())


def test_templates_with_tools_supervise_every_answer_of_an_agent(encoders):
    """So that the matrix above cannot pass by refusing everything."""
    agents = Conversation(WITH_TOOLS["agent with reasoning"], TOOLS)
    names = [name for name, family in FAMILIES.items() if family.calls and family.calls is not no_calls]
    supervised = {name: len(supervised_runs(encoders[name][1].documents(agents))) for name in names}
    assert len(names) >= 14 and supervised == dict.fromkeys(names, 6)


def test_refused_answers_are_those_of_prompts_that_open_a_reasoning_block(encoders):
    """So that the matrix above cannot pass by refusing everything."""
    refused = {
        name
        for name, (_, encoder) in encoders.items()
        if encoder.render(Conversation(CONVERSATIONS["one turn"])).supervision.refused
    }
    assert refused == {"Qwen3-Thinking", "QwQ", "DeepSeek-R1-Distill", "Nemotron Nano v2"}


def test_a_template_that_only_appends_shares_one_document(encoders):
    separate = {
        name: len(encoder.documents(Conversation(CONVERSATIONS["reasoning"])))
        for name, (_, encoder) in encoders.items()
    }
    rewriting = REWRITING | {"Kimi K2 Thinking"}  # only drops reasoning
    assert separate == {name: 3 if name in rewriting else 1 for name in FAMILIES}


@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3", "Mistral 7B v0.3", "Phi-3", "GLM-4", "SmolLM3 without thinking"])
@given(texts=st.lists(TEXT, min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_answers_of_any_text_follow_the_tokens_of_their_prompt(name, texts, encoders):
    tokenizer, encoder = encoders[name]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts[: len(texts) // 2 * 2])]
    runs = sorted(supervised_runs(encoder.documents(Conversation(messages))), key=lambda run: len(run[0]))
    for (prompt, answer), turn in zip(runs, range(1, len(messages), 2), strict=True):
        assert prompt == encoder.prompt(Conversation(messages[:turn]))
        text = tokenizer.decode(answer)
        assert text.endswith(FAMILIES[name].end) and messages[turn]["content"].strip() in text


@pytest.mark.parametrize("name", FAMILIES)
@given(texts=st.lists(TEXT, min_size=2, max_size=6), system=st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_skeleton_of_a_conversation_gives_the_same_answers(name, texts, system, encoders):
    """A conversation rendered once, with the answers located by its roles, against each answer located by itself."""
    supervisor = encoders[name][1].supervisor
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages = [SYSTEM] * (system and not FAMILIES[name].no_system) + messages[: len(texts) // 2 * 2]
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    assert supervisor.supervise(messages, turns) == supervisor._by_answer(messages, turns)


def test_most_templates_have_a_skeleton(encoders):
    """So that the comparison above is one, and preparation fast."""
    found = {
        name for name, (_, encoder) in encoders.items()
        if encoder.supervisor._by_skeleton(CONVERSATIONS["many turns"], [1, 3, 5, 7, 9]) is not None
    }  # fmt: skip
    # The end token of GLM-4 belongs to the next turn; the others rewrite history.
    assert found == FAMILIES.keys() - REWRITING - {"GLM-4"}


@pytest.mark.parametrize("name", FAMILIES)
def test_long_conversations_equal_short_ones(name, encoders):
    """Beyond CHECKED answers, prompts are assembled instead of rendered, and answers rendered without their history."""
    tokenizer, encoder = encoders[name]
    messages = [message for i in range(40) for message in (user(i), assistant(i, "One more."))]
    answers, _ = expected(name, tokenizer, Conversation(messages))
    assert supervised_runs(encoder.documents(Conversation(messages))) == answers


@pytest.mark.parametrize("name", ["Llama 3.1", "Qwen3", "Mistral 7B v0.3"])
def test_a_thousand_turns_take_seconds(name, encoders):
    encoder = encoders[name][1]
    messages = [SYSTEM, *(message for i in range(500) for message in (user(i), assistant(i)))]
    start = time.process_time()
    documents = encoder.tokenize([encoder.render(Conversation(messages), 4096)])[0]
    assert time.process_time() - start < 10
    assert len(supervised_runs(documents)) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 3.1", "Qwen3", "Mistral 7B v0.3"])
def test_an_agent_of_a_thousand_turns_takes_seconds(name, encoders):
    encoder = encoders[name][1]
    start = time.process_time()
    documents = encoder.tokenize([encoder.render(Conversation(agent(500), TOOLS), 32768)])[0]
    assert time.process_time() - start < 10
    assert len(supervised_runs(documents)) > 250


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.calls])
def test_long_agents_equal_short_ones(name, encoders):
    """Beyond CHECKED answers, prompts are assembled instead of rendered, and answers rendered without their history."""
    check(name, Conversation(agent(20, "Look it up."), TOOLS), encoders)


@pytest.mark.parametrize("limit", [10, 200, 1000])
def test_the_answers_within_the_token_limit_are_found_by_bisection(limit, encoders):
    encoder = encoders["Qwen2.5"][1]
    messages = [message for i in range(60) for message in (user(i), assistant(i))]
    rendered = encoder.render(Conversation(messages), limit)
    prompts = [len(encoder.prompt(Conversation(messages[:turn]))) for turn in range(1, 120, 2)]
    assert rendered.left_out == sum(length > limit for length in prompts) > 0
    assert sum(len(text.answers) for text in rendered.supervision.texts) == 60 - rendered.left_out
    assert rendered.answers == 60 and rendered.tokens == len(
        encoder.documents(Conversation(messages))[0].document.input_ids
    )


def test_reasoning_that_the_template_does_not_write_is_counted(encoders):
    counts = {
        name: encoder.render(Conversation(CONVERSATIONS["reasoning"])).supervision.notes[REASONING_DROPPED]
        for name, (_, encoder) in encoders.items()
    }
    assert counts["Llama 3.1"] == counts["Qwen3 without thinking"] == 3
    assert counts["Qwen3"] == counts["QwQ"] == counts["gpt-oss"] == 0


def test_reasoning_whose_opening_tag_is_in_the_prompt(encoders):
    """An answer as the target wrote it, and as text without its special tokens."""
    tokenizer, encoder = encoders["Qwen3-Thinking"]
    text = "Day 0: add 1.\n</think>\n\nShe has 1."
    for content in (text, "<think>\n" + text):
        messages = [user(0), {"role": "assistant", "content": content}]
        assert tokenizer.decode(supervised_runs(encoder.documents(Conversation(messages)))[0][1]) == text + "<|im_end|>"
    nothing = "\n</think>\n\nShe has 1."  # it thought nothing
    messages = [user(0), {"role": "assistant", "content": nothing}]
    assert tokenizer.decode(supervised_runs(encoder.documents(Conversation(messages)))[0][1]) == nothing + "<|im_end|>"


@pytest.mark.parametrize("template", ["qwen3_thinking", "guarded"])
def test_a_template_that_misreads_reasoning_is_not_followed(template, encoders):
    """A template that looks for both tags takes reasoning without the opening one for text of the answer."""
    family = FAMILIES["Qwen3-Thinking"]
    tokenizer = family.tokenizer()
    if template == "guarded":
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "elif '</think>' in reply", "elif '<think>' in reply and '</think>' in reply"
        )
    encoder = ChatEncoder(tokenizer, {}, family.stop_ids(tokenizer))
    text = "2 and 1.\n</think>\n\nShe has 3."
    documents = encoder.documents(Conversation([user(0), {"role": "assistant", "content": text}]))
    assert tokenizer.decode(supervised_runs(documents)[0][1]) == text + "<|im_end|>"


def test_a_switch_in_an_earlier_message_applies_to_later_answers(encoders):
    """Beyond CHECKED answers too, where an answer is rendered after its question alone."""
    tokenizer, encoder = encoders["Nemotron Nano v2"]
    switch = {"role": "system", "content": "Count. /no_think"}
    messages = [switch, *(message for i in range(30) for message in (user(i), assistant(i)))]
    runs = supervised_runs(encoder.documents(Conversation(messages)))
    assert [prompt for prompt, _ in runs] == [encoder.prompt(Conversation(messages[:turn])) for turn in range(2, 61, 2)]
    assert [tokenizer.decode(answer) for _, answer in runs] == [
        assistant(i)["content"] + "\n<SPECIAL_12>" for i in range(30)
    ]


def test_an_end_token_that_is_not_a_stop_token(encoders):
    """The first added token after the answer ends it, special or not, and the report mentions it."""
    for name in ("Phi-3", "Gemma 3"):
        tokenizer, _ = encoders[name]
        encoder = ChatEncoder(tokenizer, {}, [])
        rendered = encoder.render(Conversation(CONVERSATIONS["many turns"]))
        assert rendered.supervision.notes[OTHER_END_TOKEN] == 5
        answers, _ = expected(name, tokenizer, Conversation(CONVERSATIONS["many turns"]))
        assert supervised_runs(encoder.tokenize([rendered])[0]) == answers


def test_an_answer_without_an_end_token(encoders):
    tokenizer = FAMILIES["GLM-4"].tokenizer()
    encoder = ChatEncoder(tokenizer, {}, tokenizer.convert_tokens_to_ids(["<|endoftext|>"]))
    rendered = encoder.render(Conversation(CONVERSATIONS["many turns"]))
    assert rendered.supervision.notes[NO_END_TOKEN] == 5
    texts = [tokenizer.decode(answer) for _, answer in supervised_runs(encoder.tokenize([rendered])[0])]
    assert texts == [assistant(i)["content"] for i in range(5)]


NUMBERED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + loop.index | string + '\n' + m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_depends_on_the_position_of_a_message_is_rendered_in_full(tiny_tokenizer, monkeypatch):
    """Prompts of a long conversation cannot be assembled from its turns."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", NUMBERED)
    encoder = ChatEncoder(tiny_tokenizer, {})
    messages = [message for i in range(20) for message in (user(i), assistant(i))]
    prompts = [prompt for prompt, _ in supervised_runs(encoder.documents(Conversation(messages)))]
    assert prompts == [encoder.prompt(Conversation(messages[:turn])) for turn in range(1, 40, 2)]


def test_prompt_tokens_that_depend_on_the_answer():
    """Two spaces at the end of a prompt are one token, but two before a digit, as with Qwen's tokenizer."""
    backend = Tokenizer(models.BPE(vocab={" ": 0, "  ": 1, "5": 2, "a": 3, "</s>": 4}, merges=[(" ", " ")]))
    pattern = Regex(r"\p{L}+|\p{N}|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ('  ' if m['role'] == 'user' else eos_token) }}{% endfor %}"
    )
    encoder = ChatEncoder(tokenizer, {})
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "5"}]
    assert tokenizer("a  5")["input_ids"] == [3, 0, 0, 2] and encoder.prompt(Conversation(messages[:1])) == [3, 1]
    assert supervised_runs(encoder.documents(Conversation(messages))) == [([3, 1], [2, 4])]


def sentencepiece_like(kind):
    """A BPE that puts a space before each text, by a normalizer (Llama 2, Mistral 7B) or a pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = ["[INST] How many apples has she? [/INST] She has 3.", "a](b) [x](y) ](z)", "\n(b) is right. (a)"] * 50
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["normalizer", "pre-tokenizer"])
@pytest.mark.parametrize("content", ["She has 3.", "(b) is right.", " She has 3.", "\nShe has 3."])
def test_no_space_is_added_between_prompt_and_answer(kind, content):
    tokenizer = sentencepiece_like(kind)
    encoder = ChatEncoder(tokenizer, {})
    question = [{"role": "user", "content": "How many?"}]
    ((prompt, answer),) = supervised_runs(
        encoder.documents(Conversation([*question, {"role": "assistant", "content": content}]))
    )
    assert prompt == encoder.prompt(Conversation(question))
    pieces = "".join(tokenizer.convert_ids_to_tokens(answer)).replace("▁", " ")
    assert pieces == content + "</s>"


@pytest.mark.parametrize("code", ["1 + 'a'", "messages[0].missing.name", "raise_exception('no')", "unknown()"])
def test_any_error_of_a_template_is_a_bad_record(code, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ " + code + " }}")
    with pytest.raises(BadRecord, match="rejected by the target's chat template"):
        ChatEncoder(tiny_tokenizer, {}).prompt(Conversation([user(0)]))
