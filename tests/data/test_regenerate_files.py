"""Files of regeneration: no answer is lost when questions move, change or return, or when a run fails or is killed."""

import json
from contextlib import suppress
from functools import partial, partialmethod

import pytest
from helpers.regeneration import read, run, server, write
from helpers.stub_server import StubServer
from omegaconf import OmegaConf

from data.errors import UserError
from data.regenerate import output as module
from data.regenerate import run as run_module
from data.regenerate.conversation import KEPT, Asked, Sampling, beside
from data.regenerate.output import dropped_file, write_output
from data.regenerate.questions import read_questions
from data.regenerate.sample_log import SampleLog
from data.regenerate.settings import SettingsFile
from data.sources.readers import open_sources
from data.sources.rejects import handle_rejects

SAMPLING = Sampling(0.0, 1.0, 64, seed=0, drop_cut_off=False, repeat_words=9, repeat_times=0)


def finish(folder, questions):
    """Answer the new questions and write the output. Return the new questions and the answers in the output."""
    file = folder / "out.jsonl"
    log = SampleLog(folder / "log", (file, dropped_file(file)))
    samples = [Asked(name, question) for name, question in questions]
    log.assign(samples)
    new = [asked for asked in samples if not log.has(asked)]
    for asked in new:
        messages = [{"role": "user", "content": asked.digest}, {"role": "assistant", "content": f"to {asked.digest}"}]
        log.add(asked.id, {"digest": asked.digest, "outcome": KEPT, "messages": messages})
    write_output(log, samples, file)
    log.remove()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(entry["id"], entry["digest"]) for entry in found] == questions
    return "".join(asked.digest for asked in new), "".join(entry["messages"][1]["content"][-1] for entry in found)


def by_line(questions):
    return [(str(line), question) for line, question in enumerate(questions, start=1)]


@pytest.mark.parametrize(
    ("versions", "asked"),
    [
        (["abcd", "bcd", "abcd"], ["abcd", "", ""]),  # the first line removed, and back
        (["abc", "xabc"], ["abc", "x"]),  # a line inserted
        (["abc", "aBc", "abc", "aBc"], ["abc", "B", "", ""]),  # changed, and back
        (["aab", "ab", "aab", "aaab"], ["aab", "", "", "a"]),  # the same question twice has two answers
        (["abc", "c", "cba"], ["abc", "", ""]),
    ],
)
def test_answers_follow_their_questions(versions, asked, tmp_path):
    for version, new in zip(versions, asked, strict=True):
        assert finish(tmp_path, by_line(version)) == (new, version)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(("before", "after"), [("abcd", "bcd"), ("bcd", "abcd"), ("abcd", "xdc")])
def test_a_kill_while_the_output_is_written_loses_no_answer(before, after, failing, tmp_path, monkeypatch):
    finish(tmp_path, by_line("abcd"))
    finish(tmp_path, by_line(before))
    replace, calls = module.os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) > failing:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.os, "replace", killed)
        finish(tmp_path, by_line(after))
    assert finish(tmp_path, by_line("abcd")) == ("", "abcd")


@pytest.mark.parametrize("versions", [["abc", "ab", "cab"], ["xabc", "abc", "xcab"], ["aab", "ab", "baa"]])
@pytest.mark.parametrize(
    "kills", [(3, 3, 0), (3, 3, 1), (3, 3, 2), (0, 0, 2), (0, 1, 2), (0, 2, 2), (3, 2, 1)], ids=str
)
def test_after_kills_every_answer_is_in_one_place(versions, kills, tmp_path, monkeypatch):
    for version, kill in zip(versions, kills, strict=True):
        steps, replace, remove = iter(range(9)), module.os.replace, SampleLog.remove

        def killed(call, *args, steps=steps, kill=kill):  # before the first or second file, or the log's removal
            if next(steps) == kill:
                raise KeyboardInterrupt
            call(*args)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(module.os, "replace", partial(killed, replace))
            patch.setattr(SampleLog, "remove", partialmethod(lambda log, call: killed(call, log), remove))
            finish(tmp_path, by_line(version))
    assert finish(tmp_path, by_line(versions[-1])) == ("", versions[-1])
    file = tmp_path / "out.jsonl"
    stored = [json.loads(line) for path in (file, dropped_file(file)) for line in path.open()]
    assert sorted(entry["digest"] for entry in stored) == sorted(versions[0])
    assert not any("former_id" in entry for entry in stored)


MESSAGES = [None, [], "x", ["x"], [{"content": "x"}], [{"role": 5}], {"role": "assistant"}]


def test_a_full_disk_while_the_output_is_written_loses_no_answer(tmp_path, monkeypatch):
    finish(tmp_path, by_line("abc"))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"out.jsonl: write failed .*No space left"):
        patch.setattr(module, "_write", full)
        finish(tmp_path, by_line("abcd"))
    assert finish(tmp_path, by_line("abcd")) == ("", "abcd")


@pytest.mark.parametrize("edit", [lambda text: text[:-1], lambda text: text + "\n", lambda text: "\n" + text])
def test_the_output_may_have_blank_lines_or_no_final_newline(edit, tmp_path):
    finish(tmp_path, by_line("abc"))
    file = tmp_path / "out.jsonl"
    file.write_text(edit(file.read_text()))
    assert finish(tmp_path, by_line("abc")) == ("", "abc")


def test_a_truncated_output_is_an_error(tmp_path):
    finish(tmp_path, by_line("abc"))
    file = tmp_path / "out.jsonl"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(UserError, match=r"out.jsonl:3: expected a sample"):
        finish(tmp_path, by_line("abc"))


@pytest.mark.parametrize("edit", [*({"messages": found} for found in MESSAGES), {"id": 5}, {"unverified": "x"}])
def test_an_edited_output_is_an_error(edit, tmp_path):
    finish(tmp_path, by_line("abc"))
    file = tmp_path / "out.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | edit), lines[2]]))
    with pytest.raises(UserError, match=r"out.jsonl:2: expected a sample .*overwrite=true"):
        finish(tmp_path, by_line("abcd"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"settings": null}', '{"settings": []}'])
def test_edited_settings_are_an_error_until_they_are_overwritten(content, regenerate, tmp_path):
    regenerate(lambda _: "old")
    (tmp_path / "out.settings.json").write_text(content)
    with pytest.raises(UserError, match=r"out.settings.json: not a settings file .*overwrite=true"):
        regenerate(lambda _: "new", "abcd")
    assert regenerate(lambda _: "new", overwrite=True) == ["new"] * 3


@pytest.mark.parametrize("replaced", [None, 5, {"settings": None}])
def test_edited_settings_to_restore_are_an_error(replaced, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"settings": {}, "replaces_output": replaced}))
    with pytest.raises(UserError, match="not a settings file"):
        SettingsFile(file, {}, [], {}).changes()


def test_a_full_disk_at_the_settings_or_rejects_is_an_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match=r"settings.json: write failed .*No space left"):
        SettingsFile(tmp_path / "settings.json", {}, [], {}).write()
    monkeypatch.setattr("data.sources.rejects.json.dumps", full)
    entry = {"where": "a", "reason": "b"}
    with pytest.raises(UserError, match=r"rejects.jsonl: write failed .*No space left"):
        handle_rejects([entry], 1, "skip", tmp_path / "rejects.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ['{"question": "%s", "answer": "x"}', '[{"question": "%s", "answer": "x"}]'])
def test_data_that_changes_during_a_run_is_an_error(form, tmp_path):
    file = tmp_path / "data.json"
    file.write_text(form.replace("%s", "a"))
    questions = read_questions(open_sources(str(file), split="train", max_records=None), "stop", tmp_path / "rejects")
    file.write_text(form.replace("%s", "b"))
    with pytest.raises(UserError, match="the content changed"):
        list(questions.unanswered(lambda _: False, None))


def test_each_output_has_its_own_files(tmp_path):
    names = ["t0.7", "t0.8", "t.jsonl", "t.v2.jsonl"]
    assert [beside(tmp_path / name, ".x").name for name in names] == ["t0.7.x", "t0.8.x", "t.x", "t.v2.x"]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_overwriting_that_fails_before_its_first_answer_leaves_the_output_valid(temperature, tmp_path):
    write(tmp_path, [{"question": "q0", "answer": "x"}])
    with StubServer() as stub:
        run(tmp_path, *server(stub))
        stub.faults = [404] * 100
        run(tmp_path, *server(stub), f"regenerate.temperature={temperature}", "overwrite=true", status=1)
        stub.faults.clear()
        before = stub.asked["q0"]
        write(tmp_path, [{"question": f"q{i}", "answer": "x"} for i in range(2)])
        run(tmp_path, *server(stub))
    assert stub.asked["q0"] == before and len(read(tmp_path)) == 2


class Backend:
    """Answers with `says`: question -> text; None leaves the question open, an exception stops the run."""

    def __init__(self, says):
        self.says = says

    def run(self, samples, on_finish, *, answered_before, on_tokens):
        for sample in samples:
            said = self.says(sample.ask().messages[-1]["content"])
            if isinstance(said, Exception):
                raise said
            if said is not None:
                sample.answer({"content": said}, None, complete=True, tokens=1, sampling=SAMPLING)
                on_finish(sample)


@pytest.fixture
def regenerate(tmp_path, monkeypatch):
    """Return a function that regenerates `questions` and returns the answers in the output."""

    def run_with(says, questions="abc", *, temperature=0, overwrite=False):
        write(tmp_path, [{"question": question, "answer": "x"} for question in questions])
        data = {"path": str(tmp_path / "questions.jsonl"), "split": "train", "max_records": None, "bad_records": "stop"}
        config = OmegaConf.create({"data": data, "run_dir": str(tmp_path), "overwrite": overwrite})
        settings = {"temperature": temperature}
        file = SettingsFile(tmp_path / "out.settings.json", settings, [len(questions)], {})
        monkeypatch.setattr(run_module, "settings_file", lambda *_: file)
        monkeypatch.setattr(run_module, "_backend", lambda _: (Backend(says), None))
        run_module._regenerate(config, tmp_path / "out.jsonl")
        return [json.loads(line)["messages"][1]["content"] for line in (tmp_path / "out.jsonl").open()]

    return run_with


@pytest.mark.parametrize(("says", "reason"), [("", "3 empty"), (None, "3 unanswered")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_overwriting_that_keeps_no_answer_leaves_the_output_valid(temperature, says, reason, regenerate, tmp_path):
    regenerate(lambda _: "old")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for _ in range(2):  # the second run does not resume the first
        with pytest.raises(UserError, match=f"out.jsonl is unchanged: {reason}"):
            regenerate(lambda _: says, temperature=temperature, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert regenerate(lambda _: "new", "abcd") == ["old"] * 3 + ["new"]


def test_overwriting_does_not_resume_an_interrupted_append(regenerate):
    regenerate(lambda _: "old")
    with pytest.raises(UserError, match="down"):
        regenerate(lambda question: UserError("down") if question == "e" else "old", "abcde")
    assert regenerate(lambda _: "new", "abcde", overwrite=True) == ["new"] * 5
