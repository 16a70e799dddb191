"""Checkpoint files: atomic writes, verification against the digest in the file name, selection for resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from train.run_dir.checkpoint_names import DIGEST, checkpoints_in
from train.run_dir.state import file_sha256, publish


class CheckpointFiles(CheckpointIO):
    """Lightning plugin that stores each checkpoint in a file whose name contains a digest of its content.

    Example: `step-00000050-<sha256>.ckpt`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint, adding its digest to the file name in `path`."""
        needed = bytes_of(checkpoint)
        publish_named(Path(path), lambda temporary: torch.save(checkpoint, temporary), needed)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint to the CPU. Only tensors and plain values are loaded, so a file cannot execute code."""
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def usable_checkpoint(directory: Path, say: Callable[[str], None] = print, run: str | None = None) -> Path | None:
    """Return the newest intact checkpoint whose best weights are also intact, or None if no checkpoint is intact.

    Resuming from an older checkpoint recreates the damaged files. If no intact checkpoint refers to intact best
    weights, the newest intact one is returned, and the best weights are selected from future validations. The result is
    the same on every rank.

    Args:
        say: called with one line per skipped file.
        run: id of the stage's run (`run_dir.state.run_id`). Checkpoints from other runs are skipped; those from earlier
            versions have no id and are accepted.
    """
    found = checkpoints_in(directory)
    intact = []
    for path in found:
        if not is_intact(path):
            say(f"{path}: skipped because it is damaged (its SHA-256 does not match its name).")
            continue
        callbacks = torch.load(path, mmap=True, map_location="cpu", weights_only=True).get("callbacks", {})
        state = callbacks.get("Checkpoints", {})
        if run and state.get("run") not in (None, run):
            say(f"{path}: skipped because it belongs to a different run of this stage ({state['run']}, not {run}).")
            continue
        intact.append(path)
        best = state.get("best", {})
        if not best or is_intact(directory / best["file"]):
            return path
        say(f"{directory / best['file']} is damaged or missing, but {path.name} refers to it.")
    if intact:
        say(f"{directory}: no intact best weights; they will be selected from future validations.")
    elif found:
        say(f"{directory}: no usable checkpoint; restarting the stage.")
    return intact[0] if intact else None


def publish_named(path: Path, write: Callable[[Path], Any], needed: int) -> Path:
    """Write a file to `path` with its digest added to the file name, and return the final path."""
    named = lambda written: path.with_stem(f"{path.stem}-{file_sha256(written)[:DIGEST]}")  # noqa: E731
    return publish(path, write, named, needed=needed)


def bytes_of(value: Any) -> int:
    """Return the total size in bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(bytes_of, parts))


def is_intact(path: Path) -> bool:
    """Return whether a file exists and matches the digest in its name."""
    return path.exists() and file_sha256(path).startswith(path.stem.rpartition("-")[2])
