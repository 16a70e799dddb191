"""Terminal output. Text is printed verbatim: rich markup in brackets and emoji codes (`:x:`) are not interpreted."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from data.errors import INTERRUPTED, UserError, interrupted

LOG_WIDTH = 120  # columns, for output that does not go to a terminal


class Terminal(Console):
    """A console that exits with a message when its output pipe is closed (`... | head`)."""

    def on_broken_pipe(self) -> NoReturn:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit would fail too
        sys.exit("stopped: the output pipe was closed. Run the same command to resume.")


def terminal() -> Console:
    """Return a console for tables. If the output is not a terminal, it is at least LOG_WIDTH columns wide."""
    console = Terminal(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


def say(text: str) -> None:
    """Print a message without wrapping long lines, so that paths and commands can be copied."""
    terminal().print(text, soft_wrap=True)


def run_command(work: Callable[[], None], stopped: str) -> None:
    """Run a command, reporting user errors and Ctrl-C without a traceback.

    Args:
        work: the body of the command.
        stopped: the message to print after Ctrl-C.
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
