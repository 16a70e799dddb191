"""What the commands print. Text stays as it is: brackets in a path or an override are no markup, `:x:` no emoji."""

from rich.console import Console

LOG_WIDTH = 120  # columns of tables in a log, which has no width


def terminal() -> Console:
    """Where tables are printed."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


def say(text: str) -> None:
    """Print a message. Long lines are not cut, so that a path or a command in them can be copied."""
    terminal().print(text, soft_wrap=True)
