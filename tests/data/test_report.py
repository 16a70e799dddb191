"""The report's numbers against data with known properties."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest

from data.preprocess.chat_template import ChatEncoder
from data.preprocess.prepare import prepare
from data.preprocess.table import TokenizeSettings
from data.preprocess.tokenized import tokenize
from data.report import statistics
from data.report.answers import answer_sections
from data.report.run import main, read_again
from data.report.section import markdown
from data.sources.readers import open_sources


def chat(question, answer="It is four, and that is all there is to say about it."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


LONG = "A farmer has twelve sheep and buys seven more each year for three years in a row, how many then?"
RECORDS = [
    *(chat(f"What is {i} plus two?") for i in range(30)),
    chat("What is 3 plus two?"),  # duplicate
    chat("What is 4 plus two?"),  # second duplicate
    chat("  what IS held-out?? "),  # the first evaluation prompt, except for case and punctuation
    chat("Tell me: " + LONG),  # shares a long n-gram with the second prompt
    chat("Too long. " * 200),
    {"messages": []},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    data, prompts = folder / "data.jsonl", folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    prompts.write_text(json.dumps({"turns": ["What is held-out?"]}) + "\n" + json.dumps({"turns": [LONG]}) + "\n")
    return data, prompts


@pytest.fixture(scope="module")
def report(files, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("run")
    data, prompts = files
    call = ["+experiment=tiny", f"data.path={data}", f"data.prompts={prompts}", "data.validation_records=2"]
    done = subprocess.run(
        [sys.executable, "-m", "data.report", *call], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return cwd / "checkpoints" / "tiny" / "data_report", done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "## 38 records",
        "| kept | 34 | 89.5% | in full |",
        "| too long | 1 | 2.6% |",
        "| bad | 3 | 7.9% | rejected |",
        "* 2 conversations are exact duplicates of earlier ones.",
        "| the text is empty | 2 |",
        "| user | ",
        "* 35 answers: 34 supervised in the first document of a conversation, 1 lost to truncation or too short for a",
        "| chat | 33 | 97.1% |",
        "| 1 to 32 | 34 | 100.0% |",
        "| en | 34 | 100.0% |",
        "| an identical question | 1 |",
        "| 13 consecutive words in common | 1 |",
        "+ It is four, and that is all there is to say about it.<|im_end|>",
        "  <|im_start|>user",
    ],
)
def test_the_report_contains(line, report):
    assert line in (report[0] / "report.md").read_text()


@pytest.mark.slow
def test_terminal_files_and_rejects(report):
    folder, printed = report
    assert "38 records" in printed and "Supervised tokens by role" in printed
    assert {f.name for f in folder.iterdir()} == {"report.md", "lengths.png", "anchors.png", "rejects.jsonl"}
    assert len((folder / "rejects.jsonl").read_text().splitlines()) == 3


def test_roles_are_identified_without_the_template(files, tiny_tokenizer):
    roles = statistics.roles(
        open_sources(str(files[0]), split="train", max_records=None),
        ChatEncoder(tiny_tokenizer, {}),
        TokenizeSettings(10_000, "turn"),
    )
    assert roles.supervised["user"] == 0 and roles.supervised["assistant"] == roles.tokens["assistant"] > 0
    assert roles.supervised["template"] == roles.conversations == 35  # the end-of-turn token of every answer


REWRITES = (  # each prompt has the number of its messages in front, so each answer is a separate document
    "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("truncation", ["turn", "token"])
@pytest.mark.parametrize("template", [None, REWRITES])
def test_roles_are_counted_within_the_row_length(template, truncation, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = [turn for i in range(60) for turn in chat(f"What is {i} plus two?")["messages"]]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    encoder, settings = ChatEncoder(tokenizer, {}), TokenizeSettings(200, truncation)
    sources = open_sources(str(file), split="train", max_records=None)
    roles, documents = statistics.roles(sources, encoder, settings), tokenize(sources, encoder, settings, num_proc=1)
    assert sum(roles.tokens.values()) == documents.lengths.sum() and roles.supervised["user"] == 0
    assert sum(roles.supervised.values()) == sum(int(document.supervised.sum()) for document in documents)


def test_the_fence_of_the_example_is_longer_than_those_inside():
    text = markdown("x", [], [("Run:\n````md\n```py\n1\n```\n````", True), ("\nThanks.", False)])
    assert "\n`````diff\n+ Run:\n+ ````md\n" in text and text.endswith("\n  Thanks.\n`````\n")
    assert "\n```diff\n  Hi `x`.\n```\n" in markdown("x", [], [("Hi `x`.", False)])


def test_anchors_per_row_equal_those_of_the_rows(files, tiny_tokenizer, tmp_path):
    from data.preprocess.anchors import valid_anchors

    prepared = prepare(
        open_sources(str(files[0]), split="train", max_records=None),
        ChatEncoder(tiny_tokenizer, {}),
        max_seq_len=320,
        truncation="turn",
        bad_records="skip",
        num_proc=1,
        validation_records=5,
        block_size=4,
        seed=0,
        rejects=tmp_path / "rejects.jsonl",
    )
    rows = prepared.training
    counted = statistics.anchors_per_row(prepared.documents, rows, prepared.training_indices)
    assert counted.tolist() == [len(valid_anchors(row)) for row in rows] and np.all(counted > 0)


MIXED = [
    chat("Hello."),
    {"messages": chat("Say it.")["messages"] + chat("Compute 3 plus 4.", "It is 3 + 4 = 7, of course.")["messages"]},
    {"messages": []},
    {"messages": chat("First.")["messages"] + chat("Compute 5 + 6.", "5 + 6 = 11. " * 40)["messages"]},  # too long
    chat("Hello again.") | {"category": "coding"},
]


def test_supervised_answers_and_their_tokens_are_counted_by_kind(tiny_tokenizer, tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in MIXED))
    sources = open_sources([{"path": str(file)}, {"path": str(file), "kind": "tools"}], split="train", max_records=None)
    documents = prepare(
        sources,
        ChatEncoder(tiny_tokenizer, {}),
        max_seq_len=128,
        truncation="turn",
        bad_records="skip",
        num_proc=1,
        validation_records=0,
        block_size=4,
        seed=0,
        rejects=tmp_path / "rejects.jsonl",
    ).documents
    answers, _ = read_again(documents, sources, [])
    counts = {kind: len(tokens) for kind, tokens in answers.by_kind.items()}
    assert counts == {"chat": 3, "math": 1, "code": 1, "tools": 5} and answers.declared == 6
    assert sum(map(sum, answers.by_kind.values())) == sum(int(document.supervised.sum()) for document in documents)
    length = int(documents[0].supervised.sum())
    math = int(documents[1].supervised.sum()) - length
    assert answers.by_kind["chat"] == [length] * 3 and answers.by_kind["math"] == [math]
    by_kind, by_length, by_language = answer_sections(answers)
    assert [row[0] for row in by_kind.rows] == ["chat", "code", "math", "tools"]
    assert by_length.rows == [["1 to 32", "10", "100.0%", *by_length.rows[0][3:]]]
    assert [row[:2] for row in by_language.rows] in ([["en", "10"]], [["en", "8"], ["unknown", "2"]])


@pytest.mark.parametrize("truncation", ["turn", "token"])
def test_answers_of_a_document_have_its_supervised_tokens(truncation, tiny_tokenizer, tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in MIXED))
    sources = open_sources(str(file), split="train", max_records=None)
    settings = TokenizeSettings(max_seq_len=80, truncation=truncation)
    documents = tokenize(sources, ChatEncoder(tiny_tokenizer, {}), settings, num_proc=1)
    records, turns, tokens = documents.answer_tokens()
    assert turns.tolist() == [1, 1, 3, 1, *([3] if truncation == "token" else []), 1]
    for record, document in zip((0, 1, 3, 4), documents, strict=True):
        assert tokens[records == record].sum() == document.supervised.sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ([], "No experiment selected"),
        (["+experiment=tiny", "data.maxseqlen=3"], "Did you mean data.max_seq_len?"),
        (["+experiment=tiny", "data.truncation=cut"], "expected turn or token or drop"),
        (["+experiment=tiny", "data.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["+experiment=tiny", "data.prompts=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_invalid_calls_are_rejected(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", *call])
    with pytest.raises(SystemExit) as stopped:  # with a message: printed without a traceback, exit status 1
        main()
    assert stopped.value.code.startswith("error: ") and message in stopped.value.code
    assert not list(tmp_path.rglob("report.md"))
