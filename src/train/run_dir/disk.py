"""One-line disk errors that give the path, the reason and the sizes. Does not import torch."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data.errors import UserError

# Disk errors that a user can fix. Any other OSError is treated as a bug and keeps its traceback.
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "the file exceeds the size limit of the shell (ulimit -f) or the file system",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "missing permission",
    errno.EPERM: "missing permission, or the file is immutable",
    errno.ENOTDIR: "part of the path is a file, not a directory",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk reports an I/O error",
    errno.ESTALE: "the file handle on the network file system is stale",
    errno.EBUSY: "the file is in use",
}
UNNAMED = ("/dev/shm if runtime.workers > 0", "the datasets cache HF_DATASETS_CACHE", "TMPDIR")
PROBE = 2**16  # bytes written to find out why a write failed


class DiskError(UserError, OSError):
    """A file could not be written, read or deleted."""


def disk_error(error: OSError, path: Path | None = None, needed: int | None = None) -> DiskError:
    """Convert an OSError to a one-line DiskError with the path, the reason, and the needed and free space.

    Args:
        path: the file or directory being written; defaults to the one named in the error.
        needed: size of the content in bytes.
    """
    named = error.filename if isinstance(error.filename, str) else None
    place = Path(path or named or tempfile.gettempdir())
    reason, detail = REASONS.get(error.errno or 0), error.strerror or error
    unnamed = f"A file that the system did not name (possibly in {', '.join(UNNAMED)})"
    text = f"{place if path or named else unnamed}: "
    text += f"{reason} ({detail})." if reason else f"{detail}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or needed:
        free = free_bytes(place)
        sizes = [f"{size(needed)} needed"] if needed else []
        sizes += [] if free is None else [f"{size(free)} free"]
        text += f" {', '.join(sizes)}." if sizes else ""
    return DiskError(f"{text} Earlier files are intact. Fix the problem, then rerun the command to resume.")


def as_user_error(error: BaseException) -> BaseException:
    """Return the user error or disk error that caused `error`, or `error` itself if there is none.

    The exception chain is searched because libraries raise further errors while cleaning up after the first one.
    """
    for cause in _chain(error):
        if isinstance(cause, UserError):
            return cause
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in REASONS:
            return disk_error(cause)
        if isinstance(cause, RuntimeError) and "shared memory" in str(cause):  # a DataLoader worker died
            shm = Path("/dev/shm")
            free = size(free_bytes(shm) or 0)
            return UserError(
                f"runtime.workers: a data loader worker died; {shm} has {free} free. "
                f"Enlarge {shm} (docker run --shm-size=1g) or set runtime.workers=0. ({cause})"
            )
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, following the chain that a traceback shows. `raise ... from None` ends it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def why_not_written(file: Path, error: Exception) -> Exception:
    """Find the OSError behind a failed write. Return `error` itself if there is none.

    torch and safetensors hide the system's error; appending `PROBE` bytes to the file triggers it again.
    """
    if isinstance(error, OSError):
        return error
    try:
        with file.open("ab") as out:
            out.write(bytes(PROBE))
            out.flush()
            os.fsync(out.fileno())
    except OSError as reason:
        return reason
    return error


def free_bytes(place: Path) -> int | None:
    """Return the free bytes on the file system of an existing or future path, or None if unknown."""
    for existing in (place, *place.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(existing).free
    return None


def used_bytes(*places: Path) -> int:
    """Return the total size in bytes of all files below the directories, excluding symbolic links."""
    files = [file for place in places if place.is_dir() for file in place.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def size(count: float) -> str:
    """Format a byte count in decimal units (bytes, kB, MB, GB)."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def check_access(*directories: Path) -> None:
    """Create the directories and check that they are writable by writing a temporary file to each.

    Raises:
        DiskError: a directory cannot be created or written to.
    """
    for directory in directories:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(b"x")
                file.flush()
        except OSError as error:
            raise disk_error(error, directory) from error


def check_no_link(*places: Path) -> None:
    """Check that no directory about to be replaced is a symbolic link.

    Raises:
        DiskError: a directory is a symbolic link; the files behind it may belong to another run.
    """
    for place in places:
        if place.is_symlink():
            raise DiskError(
                f"{place} is a symbolic link to {os.readlink(place)}. Linked files are never deleted. "
                "Remove the link, and delete the files that it points to if they are no longer needed."
            )


def remove_tree(directory: Path) -> None:
    """Delete a directory tree or a file. A missing path is not an error.

    Raises:
        DiskError: a file cannot be deleted, or the path is a symbolic link, whose files may belong to another run.
    """
    check_no_link(directory)
    try:
        if directory.is_dir():
            shutil.rmtree(directory)
        elif directory.exists():
            directory.unlink(missing_ok=True)
    except OSError as error:
        name = Path(error.filename).name if isinstance(error.filename, str) else directory.name
        raise DiskError(
            f"{directory}: cannot delete {name}: {error.strerror or error}. Before rerunning the stage, delete it "
            "manually (as its owner; chattr -i if it is immutable), or choose a different name=..."
        ) from error
