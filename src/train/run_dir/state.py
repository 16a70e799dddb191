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

from data.config.renamed import with_current_names
from data.errors import UserError
from train.run_dir.disk import DiskError, disk_error, why_not_written


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


def read_record(file: Path) -> dict[str, Any] | None:
    """A stage record, its settings under their current names.

    Returns:
        None without a file; an empty record if the file is damaged.
    """
    try:
        found = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return found | ({"settings": with_current_names(found["settings"])} if "settings" in found else {})


class StageRecord:
    """The record of one stage in `<run>/records/`: `<stage>.begun.json` from its start, `<stage>.done.json` at its end.

    Kept out of the stage's own directory, so that an exported directory holds nothing but the artifact.
    """

    def __init__(self, run_dir: Path, stage: str, settings: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.begun = run_dir / "records" / f"{stage}.begun.json"
        self.done = run_dir / "records" / f"{stage}.done.json"
        self.settings = json.loads(json.dumps(settings))  # as they will be read back

    def begin(self, anew: bool) -> None:
        """Record the settings before the first step. `anew`: what was begun before counts for nothing."""
        before = {} if anew else read_record(self.begun) or {}
        identity = {"id": before.get("id") or uuid.uuid4().hex[:12], "job": before.get("job") if before else job()}
        write_json(self.begun, {"settings": self.settings, "environment": environment(), **identity})

    def drop(self) -> None:
        """What was begun or done counts for nothing any more, and its files may go: also after a kill at any moment."""
        if self.begun.exists() or self.done.exists():
            write_json(self.begun, {"dropped": True})
            self.done.unlink(missing_ok=True)

    def finish(self, result: dict[str, Any], files: list[Path], **how: Any) -> None:
        """Mark the stage as done.

        Args:
            files: its result, within the run directory; their hashes go on record.
            how: what else a reader should know; the outcome does not depend on it.
        """
        hashes = {str(file.relative_to(self.run_dir)): file_sha256(file) for file in files}
        record = {"settings": self.settings, "environment": environment(), "result": result, "files": hashes}
        write_json(self.done, record | how)


def check_written(run_dir: Path, found: dict[str, str]) -> None:
    """The files that a stage starts from are those that their stages wrote.

    Args:
        found: path within the run directory -> SHA-256. Files that no record speaks of are passed over.

    Raises:
        UserError: a file was damaged or replaced.
    """
    for name, sha in found.items():
        stage = name.split("/")[0]
        record = read_record(run_dir / "records" / f"{stage}.done.json") or {}
        if record.get("files", {}).get(name, sha) != sha:
            raise UserError(
                f"{run_dir / name} is not the file that stage {stage} wrote (SHA-256 {sha[:12]}, its record has "
                f"{record['files'][name][:12]}): damaged or replaced. Put it back, or do the stage again with "
                f"overwrite={stage}."
            )


def job() -> dict[str, Any] | None:
    """The SLURM job that this is part of, and how often it has been requeued."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return {"id": os.environ["SLURM_JOB_ID"], "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def is_requeue_of(earlier: Any) -> bool:
    """Whether this is the same SLURM job as an `earlier` one of `job`, which has ended since and been requeued."""
    here = job()
    return bool(
        here and isinstance(earlier, dict) and here["id"] == earlier["id"] and here["restart"] > earlier["restart"]
    )


def run_id(run_dir: Path, stage: str) -> str | None:
    """What names this run of a stage, the same after every restart; None before its first."""
    return (read_record(run_dir / "records" / f"{stage}.begun.json") or {}).get("id")


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("torch", "transformers", "lightning", "numpy", "deepspeed")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
