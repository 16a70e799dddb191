"""Interface of the readers: a reader splits its records into chunks, and reads the raw records of a chunk on demand.

Chunks let several processes work in parallel and keep memory use constant. They hold only offsets and line numbers.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data.errors import BadRecord, UserError

CHUNK_RECORDS = 256
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A contiguous range of a reader's records."""

    start: int  # file: byte offset; table: row index
    size: int  # file: bytes; table: rows
    line: int  # file: 1-based number of the first line; table: 0-based index of the first row
    first: int  # number of records before this chunk
    records: int
    checksum: int = 0  # file: CRC-32 of the bytes


@dataclass(frozen=True)
class RawRecord:
    """A record as stored in a file or table, or the reason why it could not be read."""

    position: int  # 1-based line number or 0-based row index
    value: Any
    error: str | None = None
    text: str | None = None  # the raw line, if it is not valid JSON

    def parse(self, parser: Callable[[Any], T]) -> T:
        """Parse the value with `parser`, e.g. `data.sources.records.conversation`.

        Raises:
            BadRecord: the record could not be read, or the parser rejected it.
        """
        if self.error is not None:
            raise BadRecord(self.error)
        return parser(self.value)

    def as_text(self) -> str:
        """Return the record as text for the rejects file."""
        return json.dumps(self.value, ensure_ascii=True, default=str) if self.text is None else self.text


class Reader(Protocol):
    """Interface for reading a file, table or Hub dataset."""

    name: str
    label: str  # short name without the data directory; used in sample ids
    count: int  # number of records
    fingerprint: str  # identifies the content

    def chunks(self) -> list[Chunk]: ...
    def read(self, chunk: Chunk) -> Iterator[RawRecord]: ...
    def location(self, position: int) -> str: ...


def read_block(file: Path, name: str, chunk: Chunk) -> bytes:
    """Return the bytes of a chunk.

    Content appended to the file since it was scanned is ignored.

    Raises:
        UserError: the file cannot be read, or these bytes have changed since the scan; the message contains `name`.
    """
    try:
        with file.open("rb") as content:
            content.seek(chunk.start)
            block = content.read(chunk.size)
    except OSError as error:
        raise unreadable(name, error) from error
    if len(block) < chunk.size or zlib.crc32(block) != chunk.checksum:
        raise changed(name)
    return block


def unreadable(name: str, error: OSError) -> UserError:
    """Return the error for a file or folder that the system does not let us read."""
    return UserError(f"{name}: cannot be read ({error.strerror or error}). Check the path and its permissions.")


def changed(name: str) -> UserError:
    """Return the error for a file with different content than when it was scanned."""
    return UserError(f"{name}: the content changed while it was being read. Run the command again once it is complete.")
