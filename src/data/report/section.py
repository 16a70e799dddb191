"""Sections of the report, and their output to the terminal and as Markdown."""

import re
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from data.terminal import say, terminal


@dataclass
class Section:
    """A table in the report, with its title and notes."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def print_report(title: str, sections: list[Section], example: list[tuple[str, bool]]) -> None:
    """Print the sections and the example, whose (text, supervised) spans are colored."""
    console = terminal()
    console.rule(title)
    for section in sections:
        table = Table(title=section.title, title_justify="left", show_header=any(section.header))
        for name in section.header:
            table.add_column(name)
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for note in section.notes:
            say(note)
        console.print()
    green = Text("supervised tokens in green", "bold green")
    console.print(Text.assemble("Example conversation in the target's chat template; ", green, ":"))
    console.print(Text.assemble(*((text, "bold green" if supervised else "dim") for text, supervised in example)))


def markdown(title: str, sections: list[Section], example: list[tuple[str, bool]]) -> str:
    """Format the report as a Markdown document."""
    lines = [f"# {title}", "", "![lengths](lengths.png) ![anchors](anchors.png)", ""]
    for section in sections:
        lines += [f"## {section.title}", "", _table_line(section.header), "|---" * len(section.header) + "|"]
        lines += [*map(_table_line, section.rows), "", *(f"* {note}" for note in section.notes), ""]
    lines += ["## Example conversation", "", "In the target's chat template. Supervised lines start with `+`."]
    shown = [("+ " if supervised else "  ") + line for text, supervised in example for line in text.split("\n")]
    fence = "`" * (1 + max([2, *(len(run) for line in shown for run in re.findall("`+", line))]))
    return "\n".join([*lines, "", f"{fence}diff", *shown, fence, ""])


def _table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
