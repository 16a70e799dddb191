"""Terminal output. Text is printed verbatim: brackets are not parsed as markup, `:x:` not as an emoji."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from data.errors import INTERRUPTED, UserError, interrupted

LOG_WIDTH = 120  # columns; logs have no terminal width


class Terminal(Console):
    """Console that exits with a message when the reader of its output exits (`... | head`)."""

    def on_broken_pipe(self) -> NoReturn:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails as well
        sys.exit("stopped: the program that reads the output has exited. Run the same command to resume.")


def terminal() -> Console:
    """Return the console for tables, at least LOG_WIDTH columns wide if the output is not a terminal."""
    console = Terminal(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


def say(text: str) -> None:
    """Print a message without wrapping long lines, so that paths and commands can be copied."""
    terminal().print(text, soft_wrap=True)


def run_command(work: Callable[[], None], stopped: str) -> None:
    """Run a command; report user errors and Ctrl-C in one line, without a traceback.

    Args:
        work: the command.
        stopped: message after Ctrl-C.
    """
    try:
        work()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BaseException as error:
        if not interrupted(error):
            raise
        print(stopped, file=sys.stderr)
        sys.exit(INTERRUPTED)
