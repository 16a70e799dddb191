"""Extract commands from README.md and docs/**/*.md, joining continued lines and removing prompts and comments.

A command is a line of a shell block, a line of settings in a separate block, an entire Python block, or inline code
that starts with the name of a program. Program output is skipped.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = re.compile(r"(python|sbatch|scancel|scontrol|make|pip|hf|wandb|vllm|scripts/\S+) ")
VARIABLES = re.compile(r"([A-Z_]+=\S+ )*")  # before a program
SETTINGS = re.compile(r"[+~]?[a-z]\w*([./]\w+)*=\S+( [+~]?[a-z]\w*([./]\w+)*=\S+)*")
SHELL, PYTHON, SETTING = "shell", "python", "settings"


@dataclass(frozen=True)
class Block:
    """A fenced block: language, number of the first line, and lines."""

    language: str
    first: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command and its location."""

    page: str  # relative to the root
    line: int
    kind: str  # SHELL, PYTHON or SETTING
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages(root: Path = ROOT) -> list[Path]:
    """List README.md and all pages in docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def commands_of(file: Path, root: Path = ROOT) -> list[Command]:
    """Return all commands of a page, in order."""
    page, text = str(file.relative_to(root)), file.read_text(encoding="utf-8")
    found = [(*where, kind, command) for where, kind, command in _fenced(text)]
    found += [(line, column, SHELL, span) for line, column, span in spans(text) if _is_command(span)]
    return [Command(page, line, kind, command) for line, _, kind, command in sorted(found)]


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks, in order."""
    blocks: list[Block] = []
    opened: tuple[str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif opened is None:
            opened, lines = (line.strip().removeprefix("```"), number + 1), []
        else:
            blocks.append(Block(*opened, tuple(lines)))
            opened = None
    return blocks


def spans(text: str) -> list[tuple[int, int, str]]:
    """Return inline code as line, column and text, with line breaks replaced by spaces."""
    lines = text.splitlines()
    for block in blocks_of(text):
        lines[block.first - 2 : block.first + len(block.lines)] = [""] * (len(block.lines) + 2)
    prose, found = "\n".join(lines), []
    for span in re.finditer(r"`([^`]+)`", prose):
        line = prose.count("\n", 0, span.start()) + 1
        found.append((line, span.start() - prose.rfind("\n", 0, span.start()), " ".join(span[1].split())))
    return found


def is_settings(text: str) -> bool:
    """Return whether a text consists only of overrides, `key=value key=value`."""
    return bool(SETTINGS.fullmatch(text))


def _fenced(text: str) -> list[tuple[tuple[int, int], str, str]]:
    found = []
    for block in blocks_of(text):
        if block.language == "python":
            found.append(((block.first, 0), PYTHON, "\n".join(block.lines) + "\n"))
        elif block.language in ("", "sh", "bash"):
            lines = _joined(block)
            # A block without a language may be program output; the first line decides.
            if block.language or (lines and (_is_command(lines[0][1]) or is_settings(lines[0][1]))):
                found += [((line, 0), SETTING if is_settings(one) else SHELL, one) for line, one in lines]
    return found


def _joined(block: Block) -> list[tuple[int, str]]:
    """Return the lines without comments and prompts, joining continued lines, each with its first line number."""
    joined: list[tuple[int, str]] = []
    continued = False
    for number, line in enumerate(block.lines, block.first):
        line = _without_comment(line).strip().removeprefix("$ ")
        part = line.removesuffix("\\").strip()
        if continued:
            joined[-1] = (joined[-1][0], f"{joined[-1][1]} {part}")
        elif part:
            joined.append((number, part))
        continued = line.endswith("\\")
    return joined


def _without_comment(line: str) -> str:
    for sign in re.finditer(r"(?:^|\s)#", line):
        before = line[: sign.start()]
        if not any(before.count(quote) % 2 for quote in "'\""):
            return before
    return line


def _is_command(text: str) -> bool:
    variables = VARIABLES.match(text)
    return bool(PROGRAM.match(text, variables.end() if variables else 0))
