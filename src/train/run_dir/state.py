"""State of a run directory: which stages have started and finished, with which settings and inputs."""

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
    """Write a file atomically: write to a temporary file, sync, rename. Return the final path.

    Readers see the complete file or none, even after a power failure. The file mode follows the umask and does not
    depend on the mode set by `write`.

    Args:
        write: writes the content to the given path.
        name: computes the final path from the temporary file; defaults to `path`.
        needed: size of the content in bytes, reported if the disk is full.

    Raises:
        DiskError: the file cannot be written, e.g. because the disk is full or read-only. An existing file is kept.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # unique per writer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        published = name(temporary) if name else path
        os.replace(temporary, published)
        sync(path.parent)  # persist the new directory entry
    except Exception as error:
        reason = why_not_written(temporary, error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # a partial file would waste space on a full disk
        if isinstance(reason, OSError) and not isinstance(reason, DiskError):
            raise disk_error(reason, path, needed) from error
        raise
    return published


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. NaN and infinities become null because JSON cannot represent them."""
    text = json.dumps(_null_for_nan(value), indent=2, sort_keys=True, allow_nan=False) + "\n"
    publish(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read a JSON file written by `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(file: Path) -> dict[str, Any] | None:
    """Read a stage record. Settings renamed since it was written get their current names.

    Returns:
        The record, or None if the file does not exist; an empty record if it is damaged.
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
    """Record of one stage in `<run>/records/`: `<stage>.begun.json` at its start, `<stage>.done.json` at its end.

    Stored outside the stage's directory so that the export directory contains only the artifact.
    """

    def __init__(self, run_dir: Path, stage: str, settings: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.begun = run_dir / "records" / f"{stage}.begun.json"
        self.done = run_dir / "records" / f"{stage}.done.json"
        self.settings = json.loads(json.dumps(settings))  # normalized to what reading the record returns

    def begin(self, restart: bool) -> None:
        """Record the settings before the first step.

        Args:
            restart: start a new run of the stage; otherwise keep the run ID and SLURM job of an earlier start.
        """
        before = {} if restart else read_record(self.begun) or {}
        identity = {"id": before.get("id") or uuid.uuid4().hex[:12], "job": before.get("job") if before else job()}
        write_json(self.begun, {"settings": self.settings, "environment": environment(), **identity})

    def drop(self) -> None:
        """Invalidate the records so that the stage's files can be deleted. The process may be killed at any point."""
        if self.begun.exists() or self.done.exists():
            write_json(self.begun, {"dropped": True})
            self.done.unlink(missing_ok=True)

    def finish(self, result: dict[str, Any], files: list[Path], **how: Any) -> None:
        """Mark the stage as finished.

        Args:
            result: results of the stage, stored in the record.
            files: output files of the stage within the run directory; their hashes are stored in the record.
            how: additional entries for readers of the record; resuming ignores them.
        """
        hashes = {str(file.relative_to(self.run_dir)): file_sha256(file) for file in files}
        record = {"settings": self.settings, "environment": environment(), "result": result, "files": hashes}
        write_json(self.done, record | how)


def check_written(run_dir: Path, found: dict[str, str]) -> None:
    """Check that the input files of a stage are unchanged since earlier stages wrote them.

    Args:
        found: SHA-256 of each file, keyed by its path within the run directory. Files without a recorded hash are
            skipped.

    Raises:
        UserError: a file is damaged or was replaced.
    """
    for name, sha in found.items():
        stage = name.split("/")[0]
        record = read_record(run_dir / "records" / f"{stage}.done.json") or {}
        if record.get("files", {}).get(name, sha) != sha:
            raise UserError(
                f"{run_dir / name} is damaged or was replaced: its SHA-256 is {sha[:12]}, but stage {stage} "
                f"recorded {record['files'][name][:12]}. Restore the file or rerun the stage with overwrite={stage}."
            )


def job() -> dict[str, Any] | None:
    """Return the ID and requeue count of the current SLURM job, or None outside SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return {"id": os.environ["SLURM_JOB_ID"], "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def is_requeue_of(earlier: Any) -> bool:
    """Return whether the current SLURM job is a requeue of `earlier`, which `job` returned in another process."""
    here = job()
    return bool(
        here and isinstance(earlier, dict) and here["id"] == earlier["id"] and here["restart"] > earlier["restart"]
    )


def run_id(run_dir: Path, stage: str) -> str | None:
    """Return the ID of the stage's current run, or None before its first start. Resuming keeps the ID."""
    return (read_record(run_dir / "records" / f"{stage}.begun.json") or {}).get("id")


def environment() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    packages = ("torch", "transformers", "lightning", "numpy", "deepspeed")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
