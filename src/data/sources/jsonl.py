"""Reads JSONL files."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from data.sources.chunks import CHUNK_RECORDS, Chunk, RawRecord, read_block

CHUNK_BYTES = 2**23
MAX_LINE_BYTES = 2**24  # longer lines are rejected: parsing holds several copies of a line in memory
BOM = b"\xef\xbb\xbf"


class JsonLines:
    """A file with one JSON object per line. Blank lines are skipped, and byte-order marks before a line.

    Such a mark is inside a file that was concatenated from several.
    """

    def __init__(self, file: Path, label: str = "", name: str = "") -> None:
        """Scan the file once to split it into chunks, count its records and hash its content.

        Args:
            file: an uncompressed file.
            label: see `Reader`; default: the file name.
            name: path for messages, if the file is a decompressed copy.
        """
        self.file, self.name, self.label, self.count = file, name or str(file), label or file.name, 0
        self._chunks: list[Chunk] = []
        sha256 = hashlib.sha256()
        with file.open("rb") as lines:
            start = size = records = number = checksum = 0
            line = 1
            while piece := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                here, huge = len(piece), len(piece) > MAX_LINE_BYTES
                sha256.update(piece)
                blank = not piece.removeprefix(BOM).strip()
                if huge or records == CHUNK_RECORDS or size > CHUNK_BYTES:
                    self._add(start, size, line, records, checksum)
                    start, size, line, records, checksum = start + size, 0, number, 0, 0
                checksum = zlib.crc32(piece, checksum)
                while huge and not piece.endswith(b"\n") and (piece := lines.readline(MAX_LINE_BYTES)):
                    sha256.update(piece)
                    here += len(piece)
                size += here
                records += not blank
                if huge:
                    self._add(start, size, line, records, checksum)
                    start, size, line, records, checksum = start + size, 0, number + 1, 0, 0
            self._add(start, size, line, records, checksum)
        self.fingerprint = sha256.hexdigest()

    def _add(self, start: int, size: int, line: int, records: int, checksum: int) -> None:
        if records:
            self._chunks.append(Chunk(start, size, line, self.count, records, checksum))
            self.count += records

    def chunks(self) -> list[Chunk]:
        return self._chunks

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        if chunk.records == 1 and chunk.size > MAX_LINE_BYTES:
            reason = f"the line is too long; expected at most {MAX_LINE_BYTES:,} bytes, found {chunk.size:,}"
            yield RawRecord(chunk.line, None, reason, "")
            return
        for number, line in enumerate(read_block(self.file, self.name, chunk).split(b"\n"), start=chunk.line):
            if (text := line.removeprefix(BOM)).strip():
                yield _decoded(number, text)

    def location(self, position: int) -> str:
        return f"{self.name}:{position}"


def _decoded(number: int, line: bytes) -> RawRecord:
    try:
        return RawRecord(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8: byte 0x{line[error.start]:02x} at offset {error.start}"
    except (ValueError, RecursionError) as error:
        reason = f"invalid JSON: {error}"
    return RawRecord(number, None, reason, line.decode("utf-8", errors="backslashreplace").strip())
