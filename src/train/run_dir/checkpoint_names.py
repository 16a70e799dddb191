"""Checkpoint file names: list the checkpoints of a directory and parse their steps. Does not import torch."""

import re
from pathlib import Path

DIGEST = 16  # hex digits of the checkpoint's SHA-256 in its file name
NAMED = re.compile(rf"(step|best)-\d{{8,}}-[0-9a-f]{{{DIGEST}}}")


def checkpoints_in(directory: Path) -> list[Path]:
    """List the checkpoints in a directory, newest first. Files with other names are ignored."""
    return sorted((path for path in directory.glob("step-*.ckpt") if NAMED.fullmatch(path.stem)), reverse=True)


def step_of(path: Path) -> int:
    """Return the training step in a checkpoint's file name, e.g. 100 for `step-00000100-...`."""
    return int(path.stem.split("-")[1])
