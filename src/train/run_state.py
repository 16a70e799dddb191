"""What has been done in a run directory: which stages are finished, with which settings, from which inputs."""

import hashlib
import json
import math
import os
import platform
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.errors import UserError
from train.disk import DiskError, disk_error, why_not_written


def publish(
    path: Path,
    write: Callable[[Path], Any],
    name: Callable[[Path], Path] | None = None,
    *,
    needed: int | None = None,
) -> Path:
    """Write under a temporary name, sync, rename: a reader sees all of it or none of it, after a power cut too.

    The file gets the mode that the umask gives, whatever mode `write` leaves.

    Args:
        write: writes the content to the path that it is given.
        name: makes the final path of the one that was written; `path` without it.
        needed: bytes of the content, for the message if there is no room.

    Raises:
        DiskError: the disk is full or read-only, or there is no permission; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # no two writers share it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        published = name(temporary) if name else path
        os.replace(temporary, published)
        sync(path.parent)  # the name, too
    except Exception as error:
        reason = why_not_written(temporary, error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk has no room for half a file
        if isinstance(reason, OSError) and not isinstance(reason, DiskError):
            raise disk_error(reason, path, needed) from error
        raise
    return published


def sync(path: Path) -> None:
    """Until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """A whole JSON file or none. What is not a number becomes null: JSON has no word for it."""
    text = json.dumps(_null_for_nan(value), indent=2, sort_keys=True, allow_nan=False) + "\n"
    publish(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StageRecord:
    """The record of one stage in `<run>/records/`: `<stage>.begun.json` from its start, `<stage>.done.json` at its end.

    Kept out of the stage's own directory, so that an exported directory holds nothing but the artifact.
    """

    def __init__(self, run_dir: Path, stage: str, settings: dict[str, Any]) -> None:
        self.begun = run_dir / "records" / f"{stage}.begun.json"
        self.done = run_dir / "records" / f"{stage}.done.json"
        self.settings = json.loads(json.dumps(settings))  # as they will be read back

    def finished(self) -> bool:
        """Whether the stage was finished with these settings.

        Raises:
            UserError: it was begun or finished with others.
        """
        for file in (self.done, self.begun):
            if not file.exists():
                continue
            changes = _differences(read_json(file)["settings"], self.settings)
            if changes:
                raise UserError(
                    f"{file}: this stage was run with other settings: {'; '.join(changes)}.\n"
                    "Choose another name=..., or overwrite=true to do the chosen stages again."
                )
        return self.done.exists()

    def begin(self, anew: bool) -> None:
        """Record the settings before the first step. `anew`: what was begun before counts for nothing."""
        self.begun.parent.mkdir(parents=True, exist_ok=True)
        self.done.unlink(missing_ok=True)
        before = read_json(self.begun) if self.begun.exists() and not anew else {}
        identity = {"id": before.get("id", uuid.uuid4().hex[:12])}
        write_json(self.begun, {"settings": self.settings, "environment": environment(), **identity})

    def forget(self) -> None:
        """What was begun or done counts for nothing any more."""
        self.begun.unlink(missing_ok=True)
        self.done.unlink(missing_ok=True)

    def finish(self, result: dict[str, Any], **how: Any) -> None:
        """Mark the stage as done. `how`: what else a reader should know of it; the outcome does not depend on it."""
        write_json(self.done, {"settings": self.settings, "environment": environment(), "result": result, **how})


def overwrites(config: DictConfig) -> bool:
    """Whether stages are done again. Not in a job that SLURM has put back into its queue: it has begun them anew."""
    return config.overwrite and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"


def run_id(run_dir: Path, stage: str) -> str | None:
    """What names this run of a stage, the same after every restart; None before its first."""
    begun = run_dir / "records" / f"{stage}.begun.json"
    return read_json(begun).get("id") if begun.exists() else None


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("torch", "transformers", "lightning", "numpy", "deepspeed")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path}: {old} -> {new}"]
