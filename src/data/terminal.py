"""What the commands print. Text stays as it is: brackets in a path or an override are no markup, `:x:` no emoji."""

import os
import sys
from typing import NoReturn

from rich.console import Console

LOG_WIDTH = 120  # columns of tables in a log, which has no width


class Terminal(Console):
    """Says why a command ends when the program that reads its output is gone (`... | head`)."""

    def on_broken_pipe(self) -> NoReturn:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails, too
        sys.exit("stopped: the program that reads the output has ended; the same command goes on")


def terminal() -> Console:
    """Where tables are printed."""
    console = Terminal(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


def say(text: str) -> None:
    """Print a message. Long lines are not cut, so that a path or a command in them can be copied."""
    terminal().print(text, soft_wrap=True)
