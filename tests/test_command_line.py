"""What the commands print and how they end: text as it is, one line for an error, the right exit status."""

import ast

from conftest import ROOT

from data.terminal import say
from train.terminal import say as say_once


def test_brackets_and_colons_in_messages_are_printed_as_they_are(capsys):
    text = "/data/[old]/run [/old] [red]x[/red] :smile: Run stages=[export,evaluate] overwrite=true " + "long " * 50
    for print_it in (say, say_once):
        print_it(text)
        assert capsys.readouterr().out == text + "\n"


def test_only_one_place_makes_consoles():
    for file in (ROOT / "src").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        made = any(getattr(call.func, "id", getattr(call.func, "attr", "")) == "Console" for call in calls)
        assert not made or file.name == "terminal.py", f"{file}: use data.terminal, which takes no text for markup"
