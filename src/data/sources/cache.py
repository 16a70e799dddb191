"""Files that are derived from the data: their folder in the cache of `datasets`, and errors of its disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import config

from data.errors import UserError

NAMES = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOENT ENOTDIR EIO ESTALE"
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
        raise UserError(
            f"HF_DATASETS_CACHE={config.HF_DATASETS_CACHE}: the cache cannot be used ({cause.strerror or cause}). "
            "Free space there, or set HF_DATASETS_CACHE to a folder on another disk."
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
