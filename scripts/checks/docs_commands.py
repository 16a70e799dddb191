"""The commands that README.md and docs/*.md hold: found, joined, without prompts and comments.

A command is a line of a shell block, a line of settings in a block of its own, a Python block as a whole, or code
inside a sentence that begins with a program. What programs print is none.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = re.compile(r"(python|sbatch|scancel|scontrol|make|pip|hf|wandb|vllm|scripts/\S+) ")
VARIABLES = re.compile(r"([A-Z_]+=\S+ )*")  # in front of a program
SETTINGS = re.compile(r"[+~]?[a-z]\w*([./]\w+)*=\S+( [+~]?[a-z]\w*([./]\w+)*=\S+)*")
SHELL, PYTHON, SETTING = "shell", "python", "settings"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of its first line, and its lines."""

    language: str
    first: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """One command and where it stands."""

    page: str  # relative to the root
    line: int
    kind: str  # SHELL, PYTHON or SETTING
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and what is in docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def commands_of(file: Path, root: Path = ROOT) -> list[Command]:
    """All commands of a page, in its order."""
    page, text = str(file.relative_to(root)), file.read_text(encoding="utf-8")
    found = [(*where, kind, command) for where, kind, command in _fenced(text)]
    found += [(line, column, SHELL, span) for line, column, span in spans(text) if _is_command(span)]
    return [Command(page, line, kind, command) for line, _, kind, command in sorted(found)]


def blocks_of(text: str) -> list[Block]:
    """Fenced blocks, in order."""
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
    """Code inside sentences: line, column and text, of which a line break is a space."""
    lines = text.splitlines()
    for block in blocks_of(text):
        lines[block.first - 2 : block.first + len(block.lines)] = [""] * (len(block.lines) + 2)
    prose, found = "\n".join(lines), []
    for span in re.finditer(r"`([^`]+)`", prose):
        line = prose.count("\n", 0, span.start()) + 1
        found.append((line, span.start() - prose.rfind("\n", 0, span.start()), " ".join(span[1].split())))
    return found


def is_settings(text: str) -> bool:
    """Whether this is nothing but overrides, `key=value key=value`."""
    return bool(SETTINGS.fullmatch(text))


def _fenced(text: str) -> list[tuple[tuple[int, int], str, str]]:
    found = []
    for block in blocks_of(text):
        if block.language == "python":
            found.append(((block.first, 0), PYTHON, "\n".join(block.lines) + "\n"))
        elif block.language in ("", "sh", "bash"):
            lines = _joined(block)
            # Without a language it may be what a program printed: the first line tells.
            if block.language or (lines and (_is_command(lines[0][1]) or is_settings(lines[0][1]))):
                found += [((line, 0), SETTING if is_settings(one) else SHELL, one) for line, one in lines]
    return found


def _joined(block: Block) -> list[tuple[int, str]]:
    """Lines without comments and prompts, continued ones as one, each with the number at which it begins."""
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
