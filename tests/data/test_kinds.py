"""Kinds of answers: rules, declared kinds, and answers of known data."""

import json
from collections import Counter

import pytest
from helpers.shared import TINY

from data.errors import UserError
from data.report.language import UNKNOWN, language
from data.sources.benchmarks import read_benchmark
from data.sources.kinds import CHAT, CODE, MATH, REASONING, TOOLS, answer_kind, declared, length_group, text_kind
from data.sources.readers import open_sources
from data.sources.records import Conversation


def answered(answer: dict | str, question: str = "Go on.", **given) -> Conversation:
    own = answer if isinstance(answer, dict) else {"content": answer}
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", **own}], **given)


@pytest.mark.parametrize(
    "kind, question, answer",
    [
        (CODE, "Reverse a list.", "Like this:\n```python\nxs[::-1]\n```"),
        (CODE, "逆序一个列表", "~~~js\nxs.reverse()\n~~~"),
        (CODE, "What is wrong?\n```\ndef f(x):\n    return x\n```", "Nothing."),
        (CODE, "", "def f(x):\n    y = x + 1\n    return y"),
        (CODE, "Write a function that adds 2 and 3.", "Sure."),
        (CODE, "Can you implement quicksort in C++?", "Yes."),
        (MATH, "Natalia sold 48 clips, then half as many. How many in total?", "She sold many."),
        (MATH, "Wie viele?", "Sie hat 3 + 4 = 7 Äpfel."),
        (MATH, "", "The answer is \\boxed{7}."),
        (MATH, "", "So \\(x^2\\) grows."),
        (MATH, "", "She is old.\n#### 72"),
        (MATH, "Solve 2x + 3 = 7.", "Two."),
        (MATH, "The area is $\\frac{1}{2} b h$, right?", "Yes."),
        (CHAT, "Tell me about the war of 1914-1918.", "It lasted from 1914 - 1918 and cost $5 million, in 3 phases."),
        (CHAT, "What is the capital of France?", "Paris."),
        (CHAT, "Write a class schedule and a training program.", "Monday: run."),
        (CHAT, "Quote it.", "```\nTo be or not to be.\n```"),
        (CHAT, "What is Java?", "An island."),
        (CHAT, "", ""),
        (CHAT, "Create a dress code for the office.", "No shorts."),
        (CHAT, "Create a workout program that builds muscle.", "Run."),
        (CHAT, "Write a story about a code breaker.", "Once upon a time."),
        (CHAT, "Make it warmer.", "<p>Hello there.</p>\n<p>How are you?</p>"),
        (CHAT, "Summarize: " + "It took 3 days. " * 80 + "How much is 2 + 3 = 5 worth?", "Days passed."),
        (CHAT, "How much is 5 dollars?", "A coffee."),
        (CODE, "Fix this code:", "Sure."),
        (CODE, "Write a Python script to rename files.", "Sure."),
        (CODE, "Make it warmer.", "<div>\n<p>Hello.</p>\n</div>\n<div>\n</div>"),
    ],
)
def test_text_is_classified_by_its_rules(kind, question, answer):
    assert text_kind(question, answer) == kind == answer_kind(answered(answer, question), 1)


@pytest.mark.parametrize(
    "kind, conversation",
    [
        (TOOLS, answered("Hello.", tools=[{"name": "f"}])),
        (TOOLS, answered({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]})),
        (REASONING, answered({"content": "```python\n1\n```", "reasoning_content": "Hm."})),
        (REASONING, answered("<think>\nHm.\n</think>\n\nYes.")),
        (REASONING, answered("<think>\nHm, cut off")),
        (REASONING, answered("Hm.\n</think>\n\nYes.")),
        (CHAT, answered("<think>\n\n</think>\n\nYes.")),
        (CHAT, answered({"content": "Yes.", "reasoning_content": " \n"})),
        (CHAT, answered("I think <b>so</b>.")),
        (CHAT, answered("The tag `</think>` ends the reasoning.")),
        (CHAT, answered("It writes <think>, then\n</think>\nand the answer.")),
        (REASONING, answered("<reasoning>Hm.</reasoning>Yes.")),
        (REASONING, answered("<thought>\nHm.\n</thought>\nYes.")),
        (REASONING, answered("◁think▷Hm.◁/think▷Yes.")),
        (CHAT, answered("◁think▷◁/think▷Yes.")),
        (REASONING, answered("<|START_THINKING|>Hm.<|END_THINKING|>Yes.")),
        (REASONING, answered("<|begin_of_thought|>Hm.<|end_of_thought|>Yes.")),
        (
            REASONING,
            answered("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."),
        ),
        (MATH, answered("<think></think>3 + 4 = 7")),
    ],
)
def test_tools_and_reasoning_come_before_the_text(kind, conversation):
    assert answer_kind(conversation, 1) == kind


def test_a_reasoning_block_may_be_opened_by_the_prompt():
    for text, kind in (("Hm, cut off", REASONING), ("Hm.</think>Yes.", REASONING), ("\n</think>\n\nYes.", CHAT)):
        assert answer_kind(answered(text), 1, reasoning=True) == kind


def test_tool_calls_after_an_answer_do_not_change_its_kind():
    later = answered("Hello.").messages + answered({"content": "", "tool_calls": [{}]}).messages
    assert [answer_kind(Conversation(later), turn) for turn in (1, 3)] == [CHAT, TOOLS]


def test_answers_of_gsm8k_are_math():
    records = [json.loads(line)["messages"] for line in (TINY / "conversations.jsonl").open(encoding="utf-8")][::10]
    found = Counter(answer_kind(Conversation(messages), 1) for messages in records)
    assert found[MATH] > 0.99 * len(records)
    prompts = [json.loads(line)["turns"][0] for line in (TINY / "prompts.jsonl").open(encoding="utf-8")]
    assert sum(text_kind(prompt, "") == MATH for prompt in prompts) > 0.95 * len(prompts)


@pytest.mark.parametrize(
    "record, kind",
    [
        ({"kind": "code"}, CODE),
        ({"category": "Math"}, MATH),
        ({"category": "coding", "kind": "a column"}, CODE),
        ({"category": "writing"}, None),
        ({"category": "reasoning"}, None),  # MT-Bench's riddles
        ({"category": "reasoning", "kind": "math"}, MATH),
        ({"category": "math", "kind": "reasoning"}, REASONING),
        ({"category": None, "kind": 3}, None),
        ([], None),
    ],
)
def test_records_may_declare_a_kind(record, kind):
    assert declared(record) == kind


def test_a_declared_kind_of_a_benchmark_or_source_takes_precedence(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        json.dumps({"turns": ["Hello."], "category": "math"}) + "\n" + json.dumps({"turns": ["Hi."]}) + "\n"
    )
    assert [talk.kind for talk in read_benchmark("x", {"path": str(file)}, None)] == [MATH, None]
    assert [talk.kind for talk in read_benchmark("x", {"path": str(file), "kind": CODE}, None)] == [CODE, CODE]
    (source,) = open_sources([{"path": str(file), "kind": CODE}], split="train", max_records=None)
    assert source.kind == CODE
    with pytest.raises(UserError, match="benchmarks.x.kind='poems': expected one of chat, code, math"):
        read_benchmark("x", {"path": str(file), "kind": "poems"}, None)
    with pytest.raises(UserError, match="data.path: .*prompts.jsonl: kind='poems': expected one of chat"):
        open_sources([{"path": str(file), "kind": "poems"}], split="train", max_records=None)


def test_length_groups_are_contiguous():
    groups = [length_group(tokens) for tokens in (0, 1, 32, 33, 128, 32768, 32769)]
    assert groups == ["0", "1 to 32", "1 to 32", "33 to 128", "33 to 128", "8,193 to 32,768", "over 32,768"]


@pytest.mark.parametrize(
    "code, text",
    [
        ("en", "The boy eats an apple in the garden of his grandmother. ```python\nfür = 1\n```"),
        ("de", "Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß warum."),
        ("zh", "小男孩在奶奶的花园里吃苹果，天气很好。"),
        ("ar", "يأكل الولد تفاحة في حديقة جدته."),
        (UNKNOWN, "Yes."),
        (UNKNOWN, "3 + 4 = 7\n#### 7"),
        (UNKNOWN, "```python\nprint('The boy eats an apple in the garden')\n```"),
    ],
)
def test_the_language_is_identified_without_code_and_numbers(code, text):
    assert language(text) == code
