"""Faults of chat templates that lose or alter text: the answer follows its true prompt, or is refused by name."""

import pytest
from helpers.chat import supervised_runs

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
    "long questions": f"{{% if messages[-1].content | length > 20 %}}{EMPTY}{{% endif %}}",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_in_a_question_changes_the_prompt_of_its_answer(switch, encoder_of):
    encoder = encoder_of(PLAIN.replace("assistant\n{% endif %}", f"assistant\n{SWITCHES[switch]}{{% endif %}}"))
    question = user("How many are there? /no_think")
    for messages in ([question], [user("How?"), assistant("So."), question]):
        assert check(encoder, [*messages, assistant("3.")])[0][-1] == "3.<|im_end|>"
    if switch != "long questions":  # the skeleton compares the last prompt
        assert check(encoder, [question, assistant("3."), user("How?"), assistant("So.")])[0][0] == "3.<|im_end|>"
