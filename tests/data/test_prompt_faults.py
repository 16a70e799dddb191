"""Faults of chat templates that lose or alter text: the answer follows its true prompt, or is refused by name."""

import pytest
from helpers.chat import supervised_runs

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder
from data.sources.records import Conversation

START, END = "<|im_start|>", "<|im_end|>"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **others):
    return {"role": "assistant", "content": text, **others}


@pytest.fixture
def encoder_of(tiny_tokenizer, monkeypatch):
    """Return the encoder of a chat template."""

    def encoder(template):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        return ChatEncoder(tiny_tokenizer, {})

    return encoder


def check(encoder, messages, tools=None):
    """Check that each answer follows its prompt. Return the texts of the answers, and the reasons of refusals."""
    rendered = encoder.render(Conversation(messages, tools))
    turns = [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and i + 1 not in rendered.supervision.refused
    ]
    runs = sorted(supervised_runs(encoder.tokenize([rendered])[0]), key=lambda run: len(run[0]))
    for (prompt, _), turn in zip(runs, turns, strict=True):
        assert prompt == encoder.prompt(Conversation(messages[:turn], tools))
    return [encoder.backend.decode(answer, skip_special_tokens=False) for _, answer in runs], [
        *rendered.supervision.refused.values()
    ]


EMPTY = "<think>\n\n</think>\n\n"
SWITCHES = {
    "at the end": f"{{% if messages[-1].content.endswith('/no_think') %}}{EMPTY}{{% endif %}}",
    "anywhere": f"{{% if '/no_think' in messages[-1].content %}}{EMPTY}{{% endif %}}",
    "in a variable": f"{{% set switch = '/no_think' %}}{{% if switch in messages[-1].content %}}{EMPTY}{{% endif %}}",
    "of any case": f"{{% if '/no_think' in messages[-1].content | lower %}}{EMPTY}{{% endif %}}",
    "sliced": f"{{% if messages[-1].content[-9:] == '/no_think' %}}{EMPTY}{{% endif %}}",
    "the question": f"{{% if messages[-1].content == 'How many are there? /no_think' %}}{EMPTY}{{% endif %}}",
    "long questions": f"{{% if messages[-1].content | length > 20 %}}{EMPTY}{{% endif %}}",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_in_a_question_changes_the_prompt_of_its_answer(switch, encoder_of):
    encoder = encoder_of(PLAIN.replace("assistant\n{% endif %}", f"assistant\n{SWITCHES[switch]}{{% endif %}}"))
    question = user("How many are there? /no_think")
    for messages in ([question], [user("How?"), assistant("So."), question]):
        assert check(encoder, [*messages, assistant("3.")])[0][-1] == "3.<|im_end|>"
    assert check(encoder, [question, assistant("3."), user("How?"), assistant("So.")])[0][0] == "3.<|im_end|>"


EXAONE = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% set c = c.split('</thought>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<thought>\n{% endif %}"
)
NO_REASONING = "the prompt opens a reasoning block, but the answer has no reasoning"


@pytest.mark.parametrize("tag", ["<thought>", "<reasoning>", "[THINK]", "◁think▷", "<inner_voice>"])
def test_a_prompt_may_open_a_reasoning_block_with_any_tag(tag, encoder_of):
    close = f"{tag[0]}/{tag[1:]}"
    encoder = encoder_of(EXAONE.replace("<thought>", tag).replace("</thought>", close))
    assert check(encoder, [user("How?"), assistant("So.")]) == ([], [NO_REASONING])
    text = f"2 + 1\n{close}\n\n3."
    for answer in (assistant("3.", reasoning_content="2 + 1"), assistant(text)):
        assert check(encoder, [user("How?"), answer]) == ([text + END], [])


CUT = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}")
ALTERED = "the chat template drops or changes the text of the answer"
REWRITTEN = "the prompt ends with text that the chat template does not write before the finished answer"


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        (CUT, "Write </think> to close the block. Then go on.", ALTERED),
        (PLAIN.replace("m.content", "m.content[:10]"), "An answer of some length.", ALTERED),
        (PLAIN.replace("m.content", "m.content | e"), "a < b", ALTERED),
        (PLAIN.replace("assistant\n{% endif %}", "assistant\nOkay, {% endif %}"), "So.", REWRITTEN),
    ],
)
def test_an_answer_that_the_template_alters_is_refused(template, answer, reason, encoder_of):
    assert check(encoder_of(template), [user("How?"), assistant(answer)]) == ([], [reason])


@pytest.mark.parametrize("thought", ["2 and 1", "3"])
def test_reasoning_that_is_part_of_the_answer_is_missed_as_well(thought, encoder_of):
    text = f"<think>\n{thought}\n</think>\n\nShe has 3."
    assert check(encoder_of(CUT), [user("How?"), assistant(text)]) == ([text + END], [])


def test_an_answer_after_many_is_compared_with_its_history(encoder_of):
    label = "{% if m.role == 'assistant' and 'json' in messages[40].content %}JSON: {% endif %}"
    template = PLAIN.replace(
        "{{ m.content }}", label.replace("messages[40]", "(messages[40] or m)") + "{{ m.content }}"
    )
    messages = [m for i in range(30) for m in (user(f"q{i}" + " json" * (i == 20)), assistant(f"a{i}"))]
    answers, _ = check(encoder_of(template), messages)
    assert answers == [("JSON: " if i >= 20 else "") + f"a{i}{END}" for i in range(30)]


PARTS = "{% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
BARE = (
    "{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}{% endfor %}<|im_end|>\n{% endfor %}'
)


FIRST = "{{ m.content[0]['text'] }}"  # an error for a string


def mixed(roles, parts):
    """Return a template that reads parts for some roles and strings for others."""
    return PLAIN.replace(
        "{{ m.content }}", f"{{% if m.role in {roles} %}}{parts}{{% else %}}{{{{ m.content + '' }}}}{{% endif %}}"
    )


@pytest.mark.parametrize("parts", [PARTS, FIRST])
@pytest.mark.parametrize(
    "roles",
    [["system", "user", "assistant", "tool"], ["user"], ["system", "assistant"], ["assistant", "tool"], ["tool"]],
)
def test_a_template_gets_content_parts_for_the_roles_that_need_them(roles, parts, encoder_of):
    template, system = mixed(roles, parts), {"role": "system", "content": "Be brief."}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    called = [user("How?"), assistant("f", tool_calls=[call]), {"role": "tool", "content": "Rain."}, assistant("So.")]
    for messages in ([system, user("How?"), assistant("So.")], called):
        answers, refused = check(encoder_of(template), messages)
        assert answers[-1] == "So.<|im_end|>" and not refused
        prompt = encoder_of(template).prompt(Conversation(messages[:-1]))
        text = encoder_of(template).backend.decode(prompt, skip_special_tokens=False)
        assert all(f"{m['role']}\n{m['content']}<|im_end|>" in text for m in messages[:-1])


THINKING = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'thinking' %}[THINK]{{ THOUGHT }}[/THINK]{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)


@pytest.mark.parametrize("thought", ["p.thinking", "p.thinking[0].text"])
def test_reasoning_is_a_part_where_the_template_reads_it_as_a_part(thought, encoder_of):
    """As in Magistral's templates."""
    encoder = encoder_of(PLAIN.replace("{{ m.content }}", THINKING.replace("THOUGHT", thought)))
    messages = [user("How?"), assistant("So.", reasoning_content="Hm."), user("Sure?"), assistant("Yes.")]
    assert check(encoder, messages) == (["[THINK]Hm.[/THINK]So.<|im_end|>", "Yes.<|im_end|>"], [])


KIMI = (
    "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %} of {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("given", [None, "call_", "functions.f:", "functions.f:1"])
def test_ids_name_the_function_where_the_template_writes_them_in_place_of_the_name(given, encoder_of):
    """As in Kimi K2's templates."""

    def call(number):
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": number}}}
        return call | ({"id": f"{given}{number}"} if given else {})

    def result(number):
        return {"role": "tool", "content": f"r{number}"} | ({"tool_call_id": f"{given}{number}"} if given else {})

    encoder = encoder_of(PLAIN.replace("<|im_end|>\n{% endfor %}", KIMI))
    messages = [user("How?"), assistant("", tool_calls=[call(0), call(1)]), result(0), result(1)]
    messages += [assistant("", tool_calls=[call(2)]), result(2), assistant("So.")]
    answers, refused = check(encoder, messages)
    start = given if given and given.startswith("functions") else "functions.f:"
    calls = [f'{start}0 {{"x": 0}}{start}1 {{"x": 1}}<|im_end|>', f'{start}2 {{"x": 2}}<|im_end|>']
    assert (answers, refused) == ([*calls, "So.<|im_end|>"], [])
    prompt = encoder.backend.decode(encoder.prompt(Conversation(messages[:-1])))
    assert all(f"r{i} of {start}{i}" in prompt for i in range(3))


def test_a_system_prompt_that_the_template_drops_is_refused(encoder_of):
    encoder = encoder_of("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + PLAIN)
    with pytest.raises(BadRecord, match="does not write the system prompt"):
        encoder.render(Conversation([{"role": "system", "content": "Be brief."}, user("How?"), assistant("So.")]))


def test_arguments_that_the_template_prints_bare_are_json_text(encoder_of):
    encoder = encoder_of(PLAIN.replace("<|im_end|>\n{% endfor %}", BARE))
    function = {"name": "f", "arguments": {"on": True, "to": None}}
    messages = [user("How?"), assistant("", tool_calls=[{"type": "function", "function": function}])]
    assert check(encoder, messages)[0] == ['{"name": "f", "arguments": {"on": true, "to": null}}<|im_end|>']


@pytest.mark.parametrize(
    ("opening", "close", "expected"),
    [
        ("<analysis>", "</analysis>", ("hm\n</analysis>\n\nyes<|im_end|>", None)),
        ("<cot>", "</cot>", ("hm\n</cot>\n\nyes<|im_end|>", None)),
        ("<|begin_of_thought|>", "<|end_of_thought|>", (None, REWRITTEN)),
    ],
)
def test_an_answer_does_not_repeat_the_tag_that_its_prompt_opens(opening, close, expected, encoder_of):
    encoder = encoder_of(EXAONE.replace("<thought>", opening).replace("</thought>", close))
    answers, refused = check(encoder, [user("q"), assistant(f"{opening}\nhm\n{close}\n\nyes")])
    assert (*answers, *refused) == tuple(text for text in expected if text)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Lisbon"}}}
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
AGENT = PLAIN.replace("<|im_end|>\n{% endfor %}", CALLS).replace("{% for m", "{{ tools | tojson }}{% for m", 1)
TOOL = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("text", ["", "I look."])
@pytest.mark.parametrize("tag", ["<think>", "<analysis>"])
def test_reasoning_before_a_call_replaces_the_empty_block_of_the_template(tag, text, encoder_of):
    """As in EXAONE 4, which writes an empty block before each finished answer, and in templates with other tags."""
    close = tag.replace("<", "</")
    block = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" if tag == "<think>" else ""
    template = AGENT.replace("{{ m.content }}", block + "{{ m.content }}")
    encoder = encoder_of(template.replace("assistant\n{% endif %}", f"assistant\n{tag}\n{{% endif %}}"))
    messages = [user("How?"), assistant(text, reasoning_content="Look up.", tool_calls=[CALL])]
    (answer,), refused = check(encoder, messages, [TOOL])
    assert answer.startswith(f"Look up.\n{close}\n\n{text}<call>") and answer.count("<") == 4 and not refused


SEPARATED = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<think>{% if m.reasoning_content %}{{ m.reasoning_content }}{% endif %}</think>\n"
    "{% endif %}{{ m.content.split('</think>')[-1] }}",
).replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")


@pytest.mark.parametrize(
    "answer",
    [assistant("3."), assistant("3.", reasoning_content="2 + 1"), assistant("<think>\n2 + 1\n</think>\n\n3.")],
)
def test_an_answer_after_a_closed_block_is_written_as_one_without_reasoning(answer, encoder_of):
    """As in GLM-4.5, which writes a line break between the block and the answer."""
    for messages in ([], [user("How?"), assistant("So.")] * 20):
        answers, refused = check(encoder_of(SEPARATED), [*messages, user("How many?"), answer])
        assert answers[-1] == "\n3.<|im_end|>" and not refused


@pytest.mark.parametrize("tag", ["<think>", "<thought>", "[THINK]", "<Scratchpad>"])
def test_any_reasoning_tag_counts_after_a_closed_block(tag, encoder_of):
    """Also under a template without conditions on contents, so that other conversations have a skeleton."""
    written = f"{tag}\n2 + 1\n{tag[0]}/{tag[1:]}\n\n3."
    template = PLAIN.replace(
        "{{ m.content }}", f"{{% if m.role == 'assistant' %}}{EMPTY}{{% endif %}}{{{{ m.content }}}}"
    )
    encoder = encoder_of(template.replace("assistant\n{% endif %}", f"assistant\n{EMPTY}{{% endif %}}"))
    assert check(encoder, [user("How many?"), assistant(written)]) == (["3.<|im_end|>"], [])
