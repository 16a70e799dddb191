"""Which files of a directory are checkpoints, and of which step. Needs no torch."""

import re
from pathlib import Path

DIGEST = 16  # hex digits of a checkpoint's SHA-256 in its name
NAMED = re.compile(rf"(step|best)-\d{{8,}}-[0-9a-f]{{{DIGEST}}}")


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a directory, the newest first; not what a user has put beside them."""
    return sorted((path for path in directory.glob("step-*.ckpt") if NAMED.fullmatch(path.stem)), reverse=True)


def step_of(path: Path) -> int:
    """The step that a file of this directory is about."""
    return int(path.stem.split("-")[1])
