"""Files that are derived from the data: their folder in the cache of `datasets`, and errors of its disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import config

from data.errors import UserError

NAMES = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOENT ENOTDIR EIO ESTALE"
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of the Arrow format
FILE_SYSTEM = {getattr(errno, name) for name in NAMES.split()}  # errors of a disk, not of a network or a format


def cache_folder(*names: str) -> Path:
    """Return a folder in the cache, `HF_DATASETS_CACHE`; it may not exist yet."""
    return Path(config.HF_DATASETS_CACHE).joinpath("flexdraft", *names)


@contextmanager
def cache_errors() -> Iterator[None]:
    """Report system errors in the block, or in libraries that it calls, as errors of the cache.

    Raises:
        UserError: the cache cannot be written or read, e.g. because its disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (cause := system_error(error)) is None:
            raise
        read_only = cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        raise UserError(
            f"HF_DATASETS_CACHE={config.HF_DATASETS_CACHE}: the cache cannot be used ({cause.strerror or cause}). "
            f"{'Make it writable' if read_only else 'Free space there'}, or set HF_DATASETS_CACHE to a folder "
            f"{'with write permission' if read_only else 'on another disk'}."
        ) from error


def system_error(error: BaseException | None) -> OSError | None:
    """Return the error of the file system that caused `error`, or None if another OSError or none did."""
    while error is not None and not (isinstance(error, OSError) and error.errno in FILE_SYSTEM):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def complete_file(target: Path) -> Iterator[Path]:
    """Provide the path of a temporary file that becomes `target` only if the block succeeds.

    Several processes may create the same target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Write a file's content to the disk. Otherwise, its name could survive a power loss without the content."""
    with file.open("rb") as content:
        os.fsync(content.fileno())


def stream_ends(file: Path) -> bool:
    """Return whether an Arrow stream has its end marker, which is optional, but which all common writers write.

    After a power loss, the end of a file may be zeros. Four zero bytes are a valid end of a stream, but no end marker.
    """
    with file.open("rb") as content:
        content.seek(-min(len(STREAM_END), file.stat().st_size), os.SEEK_END)
        return content.read() == STREAM_END
