"""Reads JSONL files."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError
from data.sources.chunks import CHUNK_RECORDS, Chunk, RawRecord

CHUNK_BYTES = 2**23
MAX_LINE_BYTES = 2**24  # longer lines are rejected: parsing holds several copies of a line in memory


class JsonLines:
    """A file with one JSON object per line. Blank lines are skipped."""

    def __init__(self, file: Path, label: str = "") -> None:
        """Scan the file once to split it into chunks, count its records and hash its content.

        Raises:
            UserError: the file is compressed, or contains a JSON array.
        """
        self.name, self.label, self.count = str(file), label or file.name, 0
        self._chunks: list[Chunk] = []
        sha256 = hashlib.sha256()
        with file.open("rb") as lines:
            start = size = records = number = 0
            line = 1
            while piece := lines.readline(MAX_LINE_BYTES + 1):
                if number == 0:
                    self._check_beginning(piece)
                number += 1
                here, huge = len(piece), len(piece) > MAX_LINE_BYTES
                sha256.update(piece)
                blank = not piece.strip()
                while huge and not piece.endswith(b"\n") and (piece := lines.readline(MAX_LINE_BYTES)):
                    sha256.update(piece)
                    here += len(piece)
                if huge or records == CHUNK_RECORDS or size > CHUNK_BYTES:
                    self._add(start, size, line, records)
                    start, size, line, records = start + size, 0, number, 0
                size += here
                records += not blank
                if huge:
                    self._add(start, size, line, records)
                    start, size, line, records = start + size, 0, number + 1, 0
            self._add(start, size, line, records)
        self.fingerprint = sha256.hexdigest()

    def _add(self, start: int, size: int, line: int, records: int) -> None:
        if records:
            self._chunks.append(Chunk(start, size, line, self.count, records))
            self.count += records

    def _check_beginning(self, piece: bytes) -> None:
        if piece.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
            raise UserError(f"{self.name} is compressed. Decompress it first.")
        if piece.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise UserError(
                f"{self.name} starts with a JSON array; expected one JSON object per line. "
                f"Convert it with: jq -c '.[]' {self.name} > conversations.jsonl"
            )

    def chunks(self) -> list[Chunk]:
        return self._chunks

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        if chunk.records == 1 and chunk.size > MAX_LINE_BYTES:
            reason = f"the line is too long; expected at most {MAX_LINE_BYTES:,} bytes, found {chunk.size:,}"
            yield RawRecord(chunk.line, None, reason, "")
            return
        with open(self.name, "rb") as file:
            file.seek(chunk.start)
            block = file.read(chunk.size)
        for number, line in enumerate(block.split(b"\n"), start=chunk.line):
            if line.strip():
                yield _decoded(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)

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
