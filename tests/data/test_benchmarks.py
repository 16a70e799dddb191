"""Benchmarks: prompts from records of every data set in the presets."""

import json

import pytest
from helpers.shared import ROOT
from omegaconf import OmegaConf

from data.errors import UserError
from data.sources.benchmarks import benchmark_fingerprint, read_benchmark

# One record per data set, with the columns that its Hub page documents.
RECORDS = {
    "gsm8k": {"question": "2 + 2?", "answer": "#### 4"},
    "math500": {
        "problem": "$1+1$?",
        "solution": "2",
        "answer": "2",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "x",
    },
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "canonical_solution": "",
        "test": "",
        "entry_point": "f",
    },
    "mbpp": {
        "task_id": 1,
        "prompt": "Add.",
        "code": "",
        "test_list": ["assert f(1)", "assert f(2)"],
        "test_imports": [],
    },
    "mt_bench": {"category": "math", "prompt": ["First?", "Second?"], "reference": [], "prompt_id": 1},
    "alpaca": {"instruction": "Translate.", "input": "", "output": "", "text": ""},
}
PAPER = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "benchmarks" / "paper.yaml"))


def written(tmp_path, *records) -> str:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.mark.parametrize("name", PAPER)
def test_each_preset_reads_records_of_its_data_set(name, tmp_path):
    settings = dict(PAPER[name])  # with the subset and split of the Hub dataset
    (read,) = read_benchmark(name, settings | {"path": written(tmp_path, RECORDS[name])}, limit=None)
    messages = read.messages
    assert [message["role"] for message in messages] == ["user"] * (2 if name == "mt_bench" else 1)
    text = messages[0]["content"]
    for column in ("question", "problem", "instruction"):
        assert RECORDS[name].get(column, "") in text
    assert name != "math500" or text.endswith("\\boxed{}.")
    assert name != "mbpp" or "assert f(1)\nassert f(2)" in text
    assert name != "alpaca" or text == "Translate."


def test_without_a_template_the_user_turns_are_the_prompts(tmp_path):
    turns = {"turns": ["One?", "Two?"]}
    chat = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")]}
    both = read_benchmark("mine", {"path": written(tmp_path, turns, chat)}, limit=None)
    assert [[message["role"] for message in one.messages] for one in both] == [
        ["user", "user"],
        ["system", "user", "user"],
    ]
    assert len(read_benchmark("mine", {"path": written(tmp_path, turns, chat)}, limit=1)) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "at least a path"),
        ("gsm8k.jsonl", "at least a path"),
        ({"path": "x.jsonl", "color": 1}, "benchmarks.mine.color: no such setting"),
        ({"path": "x.jsonl", "turns": "a", "template": "b"}, "turns or template, not both"),
        ({"template": "{problem}"}, "'problem'.*found keys: question"),
        ({"template": "{question"}, "`template` does not match the record"),
        ({"turns": "question"}, "expected a list of user turns"),
    ],
)
def test_unusable_settings_and_records_are_reported(settings, message, tmp_path):
    if isinstance(settings, dict) and ("template" in settings or "turns" in settings):
        settings = {"path": written(tmp_path, {"question": "2 + 2?"})} | settings
    with pytest.raises(UserError, match=message):
        read_benchmark("mine", settings, limit=None)


def test_the_fingerprint_depends_on_content_and_parsing_but_not_on_the_path(tmp_path):
    file = written(tmp_path, RECORDS["gsm8k"])
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "records.jsonl").read_bytes())
    here = benchmark_fingerprint("a", {"path": file, "template": "{question}"})
    assert here == benchmark_fingerprint("b", {"path": str(tmp_path / "copy.jsonl"), "template": "{question}"})
    assert here != benchmark_fingerprint("a", {"path": file, "template": "{question}!"})
    assert here != benchmark_fingerprint("a", {"path": written(tmp_path, RECORDS["math500"]), "template": "{question}"})
