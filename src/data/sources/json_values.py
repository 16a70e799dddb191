"""Reads JSON files in any layout other than one object per line: arrays, or objects one after another."""

import codecs
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import BadRecord, UserError
from data.sources.chunks import CHUNK_RECORDS, Chunk, RawRecord, read_block
from data.sources.jsonl import CHUNK_BYTES, MAX_LINE_BYTES

READ_BYTES = 2**20
SHOWN = 200  # characters of damaged text in the rejects file
SPACE = re.compile(r"[ \t\n\r\ufeff]*")  # concatenated files may have byte-order marks inside
LITERAL = len("\\u0000")  # longest token whose error is at its beginning, besides strings
DECODER = json.JSONDecoder()


class JsonValues:
    """A file with JSON arrays of records, or with records separated by white space or commas, e.g. pretty-printed.

    If the end of the file is cut off, the incomplete record is a bad record. Other damage is an error, because the
    records after it cannot be found.
    """

    def __init__(self, file: Path, label: str = "", name: str = "") -> None:
        """Scan the file once, in constant memory, to split it into chunks, count its records and hash its content.

        Args: see `JsonLines`.

        Raises:
            UserError: the file is damaged, not only cut off.
        """
        self.file, self.name, self.label, self.count = file, name or str(file), label or file.name, 0
        self._chunks: list[Chunk] = []
        self._damage: tuple[str, str] | None = None  # reason and text of the last record, if the file is damaged
        with file.open("rb") as content:
            window = _Window(content)
            self._scan(window)
            self.fingerprint = window.digest()

    def _scan(self, window: "_Window") -> None:
        start = end = records = checksum = 0
        try:
            for piece in window.values():
                if not piece:  # between arrays
                    self._add(start, end, records, checksum)
                    records = checksum = 0
                    continue
                end = window.position
                start = start if records else end - len(piece)
                checksum = zlib.crc32(piece, checksum)
                records += 1
                if records == CHUNK_RECORDS or end - start > CHUNK_BYTES:
                    self._add(start, end, records, checksum)
                    records = checksum = 0
        except BadRecord as error:
            lost, size = self.file.stat().st_size - window.position, self.file.stat().st_size
            if not window.is_cut_off:
                reason = str(error).partition("; nothing")[0]
                raise UserError(
                    f"{self.name}: {reason}; {lost:,} of {size:,} bytes cannot be read. Fix or remove the text there."
                ) from error
            self._damage = f"{error} ({lost:,} of {size:,} bytes)", window.beginning()
        self._add(start, end, records, checksum)
        if self._damage:
            self._add(window.position, window.position, 1, 0)

    def _add(self, start: int, end: int, records: int, checksum: int) -> None:
        if records:
            self._chunks.append(Chunk(start, end - start, self.count, self.count, records, checksum))
            self.count += records

    def chunks(self) -> list[Chunk]:
        return self._chunks

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        if not chunk.size and self._damage:
            yield RawRecord(chunk.line, None, *self._damage)
            return
        # Escape invalid bytes: JSON syntax is ASCII, so they can only be inside a string.
        text = read_block(self.file, self.name, chunk).decode("utf-8", errors="surrogateescape")
        end = 0
        for index in range(chunk.line, chunk.line + chunk.records):
            start = _skip(text, end, ",")
            value, end = _decode(text, start)
            yield _checked(index, value, text[start:end])

    def location(self, position: int) -> str:
        return f"{self.name}[{position}]"


@dataclass
class _Window:
    """A sliding window over the text of a file."""

    content: BinaryIO
    position: int = 0  # byte offset of the end of the last value
    line: int = 1  # line number at `position`
    text: str = ""
    at: int = 0  # index of `position` in `text`

    def __post_init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._end = False
        self.is_cut_off = False  # whether the error of `values` is at the end of the file
        self._grow()

    def values(self) -> Iterator[bytes]:
        """Yield the bytes of each value, with the separators before it, and move the window behind it.

        Yield an empty piece at the beginning and end of each array.

        Raises:
            BadRecord: the text is not valid JSON.
        """
        array, separator = False, ""
        while True:
            character, comma = self._next(separator), self._next() == ","
            if array and separator and character not in ("]", "") and not comma:
                raise self._error("expected a comma or the end of the array")
            if not character:
                break
            if character == ("]" if array else "["):
                self._advance(_skip(self.text, self.at, separator) + 1)
                array = not array
                separator = "" if array else ","
                yield b""
            else:
                yield self._advance(self._value(separator))
                separator = ","
        if array:
            self.is_cut_off = True
            raise self._error("the array has no end")

    def digest(self) -> str:
        """Read the rest of the file, and return the hash of its content."""
        while block := self.content.read(READ_BYTES):
            self._sha256.update(block)
        return self._sha256.hexdigest()

    def beginning(self) -> str:
        """Return the beginning of the text at the window's position."""
        return _printable(self.text[self.at : self.at + SHOWN])

    def _value(self, separator: str) -> int:
        """Return the index after the next value, reading on until it is complete."""
        while True:
            try:
                end = _decode(self.text, _skip(self.text, self.at, separator))[1]
                if end < len(self.text) or self._end:
                    return end
            except (ValueError, RecursionError) as error:
                cut_off = _is_cut_off(self.text, error)
                too_long = len(self.text) - self.at > MAX_LINE_BYTES
                if self._end or too_long and not cut_off:
                    self.is_cut_off = self._end and cut_off
                    raise self._error(str(error).partition(": line")[0]) from None
            if len(self.text) - self.at > MAX_LINE_BYTES:
                raise self._error(f"no complete value within {MAX_LINE_BYTES:,} characters")
            self._grow()

    def _next(self, separator: str = "") -> str:
        """Return the next character after white space and a separator, or an empty string at the end of the file."""
        while (start := _skip(self.text, self.at, separator)) == len(self.text) and not self._end:
            self._grow()
        return self.text[start : start + 1]

    def _grow(self) -> None:
        """Read more text. The window doubles, so that the number of attempts at a long value stays small."""
        block = self.content.read(max(READ_BYTES, len(self.text) - self.at))
        self._end = not block
        self._sha256.update(block)
        self.text, self.at = self.text[self.at :] + self._decoder.decode(block, final=self._end), 0

    def _advance(self, end: int) -> bytes:
        piece, self.at = self.text[self.at : end], end
        self.line += piece.count("\n")
        encoded = piece.encode("utf-8", errors="surrogateescape")
        self.position += len(encoded)
        return encoded

    def _error(self, reason: str) -> BadRecord:
        line = self.line + self.text[self.at : _skip(self.text, self.at, ",")].count("\n")
        return BadRecord(f"invalid JSON at line {line}: {reason}; nothing after it can be read")


def _skip(text: str, start: int, separator: str = "") -> int:
    """Return the index after white space and at most one separator."""
    start = SPACE.match(text, start).end()  # type: ignore[union-attr]  # matches the empty string
    if separator and text.startswith(separator, start):
        start = SPACE.match(text, start + 1).end()  # type: ignore[union-attr]
    return start


def _decode(text: str, start: int) -> tuple[Any, int]:
    """Return the value at an index and the index after it. The value may be the error that Python raises for it."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer with more than 4,300 digits
        return error, json.JSONDecoder(parse_int=len).raw_decode(text, start)[1]


def _is_cut_off(text: str, error: Exception) -> bool:
    """Return whether an error is that of a text without its end."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or len(text.rstrip()) - error.pos < LITERAL


def _checked(index: int, value: Any, text: str) -> RawRecord:
    if isinstance(value, ValueError):
        return RawRecord(index, None, f"invalid JSON: {value}", _printable(text[:SHOWN]))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"invalid UTF-8: byte 0x{ord(text[error.start]) - 0xDC00:02x}"
        return RawRecord(index, None, reason, _printable(text))
    return RawRecord(index, value)


def _printable(text: str) -> str:
    """Write invalid bytes as escapes."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
