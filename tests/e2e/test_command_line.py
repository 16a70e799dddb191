"""Output and exit status of the commands: verbatim text, one-line errors, correct status."""

import ast
import signal
import subprocess
import sys

import pytest
from helpers.shared import ROOT, SHORT, command_stopped_at_checkpoint

from data.errors import UserError, interrupted
from data.terminal import say
from train.__main__ import options_first
from train.terminal import say as say_once


def test_brackets_and_colons_in_messages_are_printed_verbatim(capsys):
    text = "/data/[old]/run [/old] [red]x[/red] :smile: Run stages=[export,evaluate] overwrite=true " + "long " * 50
    for print_it in (say, say_once):
        print_it(text)
        assert capsys.readouterr().out == text + "\n"


def test_consoles_are_created_in_one_place():
    for file in (ROOT / "src").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        made = any(
            getattr(call.func, "id", getattr(call.func, "attr", "")) in ("Console", "Terminal") for call in calls
        )
        assert not made or file.name == "terminal.py", f"{file}: use data.terminal, which takes no text for markup"


@pytest.mark.slow
def test_ctrl_c_during_training_saves_a_checkpoint_and_prints_how_to_resume(tmp_path):
    call = (*SHORT, "stages=[attention_tuning]", "runtime.workers=1", "stage.attention_tuning.steps=400")
    done = command_stopped_at_checkpoint(*call, cwd=tmp_path, stage="attention_tuning", number=signal.SIGINT)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert "stopped by SIGINT; rerun the command to resume" in done.stderr


def test_ctrl_c_is_recognized_in_errors_of_worker_pools():
    with pytest.raises(TimeoutError) as found:
        try:
            raise KeyboardInterrupt
        finally:
            raise TimeoutError
    assert interrupted(found.value) and not interrupted(UserError("x")) and not interrupted(None)


def test_a_closed_output_pipe_is_reported():
    code = "from data.terminal import say\nfor number in range(10**5): say(str(number))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        shown = process.stderr.read().decode()
    assert (
        process.returncode == 1 and shown.startswith("stopped: the output pipe was closed") and shown.count("\n") == 1
    )


def test_the_multirun_option_may_appear_anywhere():
    given = ["+experiment=tiny", "seed=1,2", "-m", "name=${seed}"]
    assert options_first(given) == ["-m", "+experiment=tiny", "seed=1,2", "name=${seed}"]
