"""Invalid calls end with one message with the value and a fix, and leave no files."""

import json
import shutil

import pytest
from helpers.calls import CALLS
from helpers.forked import forked_command
from helpers.shared import TINY


def jsonl(path, *records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def chat(answer: str, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": "Why?"}, {"role": "assistant", "content": answer}]}


def assert_refused(done, words, cwd):
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not list(cwd.glob("checkpoints/*/*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CALLS)
def test_wrong_setting(case, tmp_path):
    overrides, words = CALLS[case]
    experiment = [] if case in ("no experiment", "unknown experiment") else ["+experiment=tiny"]
    assert_refused(forked_command(*experiment, *overrides, cwd=tmp_path), words, tmp_path)


DATA = {
    "empty file": ((), ["contains no records"]),
    "unknown role": (
        (chat("Because.", role="wizard"),),
        ["data.jsonl:1: turn 1", "'wizard'", "system, user, assistant"],
    ),
    "no messages": (({"text": "?"},), ["data.jsonl:1", "`messages`", "found keys: text"]),
    "content of a wrong type": (
        ({"messages": [{"role": "user", "content": 3}]},),
        ["turn 1: expected a string", "a number"],
    ),
    "answers shorter than a block": ((chat("No."), chat("Yes.")), ["block_size=8", "longest answer"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DATA)
def test_wrong_data(case, tmp_path):
    records, words = DATA[case]
    path = jsonl(tmp_path / "data.jsonl", *records)
    done = forked_command("+experiment=tiny", f"data.path={path}", "data.validation_records=0", cwd=tmp_path)
    assert_refused(done, words, tmp_path)


@pytest.mark.slow
def test_broken_json_is_named_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(chat("Because.")) + "\n{broken\n", encoding="utf-8")
    done = forked_command("+experiment=tiny", f"data.path={path}", cwd=tmp_path)
    assert_refused(done, ["data.jsonl:2", "invalid JSON"], tmp_path)


@pytest.mark.slow
def test_tokenizer_of_another_target(tmp_path):
    other = tmp_path / "target"
    shutil.copytree(TINY / "target", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    done = forked_command("+experiment=tiny", f"model.target.name={other}", cwd=tmp_path)
    assert_refused(done, ["token id 2047", "largest token id is 999", "model.target.tokenizer"], tmp_path)
