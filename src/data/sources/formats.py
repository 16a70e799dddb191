"""Opens a data file: the content determines the format, and compressed files are decompressed into the cache."""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import IO, Any

import pyarrow
from filelock import FileLock

from data.errors import UserError
from data.sources.cache import cache_errors, cache_folder, complete_file
from data.sources.chunks import Reader, unreadable
from data.sources.forms import KEYS, LISTS
from data.sources.json_values import JsonValues
from data.sources.jsonl import BOM, MAX_LINE_BYTES, JsonLines
from data.sources.tables import open_table

TEXT = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst")  # after the ending of a text file
FILES = ".jsonl, .ndjson, .json (also .gz or .zst), .parquet, .arrow or .feather"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f
LFS = b"version https://git-lfs.github.com/spec/"
OTHER_ARCHIVES = (b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x04\x22\x4d\x18")
ARRAY = re.compile(rb"\[\s*([\[{\]]|$)")
TWO_OBJECTS = re.compile(r"\s*,?\s*\{")
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # a key that jq accepts without quotes
TURN = {"content", "value"}  # of a turn, which may have `tools` as well
COPY_BYTES = 2**20


def is_data_file(name: str) -> bool:
    """Return whether a file with this name is read as part of a folder. Case is ignored."""
    name = name.lower()
    inner = next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), None)
    return name.endswith((*TEXT, *TABLES)) if inner is None else inner.endswith(TEXT)


def open_file(file: Path, label: str) -> Reader:
    """Open a file of any supported format.

    Raises:
        UserError: the format is not supported, or the file is damaged or cannot be read.
    """
    if (name := file.name.encode("utf-8", errors="backslashreplace").decode()) != file.name:
        raise UserError(f"{name}: the file name is not valid UTF-8. Rename the file.")
    try:
        content = _decompressed(file)
        beginning = _beginning(content)
        if beginning.startswith(LFS):
            raise UserError(f"{file} is a Git LFS pointer, not the data. Run `git lfs pull` in its repository.")
        if content != file and _compression(beginning):
            raise UserError(f"{file} is compressed more than once. Decompress it first.")
        if beginning.startswith((b"PAR1", b"ARROW1")) or file.suffix.lower() in TABLES:
            return open_table(content, label, str(file))
        _check_text(file, beginning)
        reader = _open_text(content, label, str(file))
        _check_wrapper(reader)
        return reader
    except OSError as error:
        raise unreadable(str(file), error) from error


def _beginning(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(512)


def _check_text(file: Path, beginning: bytes) -> None:
    if beginning.startswith(OTHER_ARCHIVES) or beginning[257:262] == b"ustar":
        raise UserError(f"{file} is an archive of an unsupported format. Decompress it first.")
    if beginning.startswith(bytes(4)):
        raise UserError(
            f"{file} begins with zero bytes, e.g. since a power loss or an unfinished copy. Replace the file."
        )
    if beginning and (encoding := json.detect_encoding(beginning)) not in ("utf-8", "utf-8-sig"):
        raise UserError(
            f"{file} is not UTF-8, but probably {encoding.upper()}. Convert it with: "
            f"iconv -f {encoding.upper()} -t UTF-8 {quote(str(file))} > conversations.jsonl"
        )
    if file.suffix.lower() in (".csv", ".tsv"):
        separator = ", sep='\\t'" if file.suffix.lower() == ".tsv" else ""
        code = f"pandas.read_csv({str(file)!r}{separator}).to_json('conversations.jsonl', orient='records', lines=True)"
        raise UserError(
            f"{file}: CSV and TSV files are not supported. Convert it with: python -c {quote(f'import pandas; {code}')}"
        )
    if not is_data_file(file.name) and beginning.removeprefix(BOM).strip()[:1] not in (b"{", b"[", b""):
        raise UserError(f"{file}: unsupported format. Expected {FILES}.")


def _open_text(content: Path, label: str, name: str) -> Reader:
    """Open a file with JSON in any layout."""
    with content.open("rb") as lines:
        first = b""
        while not first and (line := lines.readline(MAX_LINE_BYTES)):
            first = line.removeprefix(BOM).strip()
        if first.startswith(b"[") or not _is_json(first):
            rest = lines.read(MAX_LINE_BYTES)
            if _begins_array(first, rest) or _spans_lines(first + b"\n" + rest):
                return JsonValues(content, label, name)
    if first == b"{":
        raise UserError(
            f"{name}: an object that spans lines, and is damaged or longer than {MAX_LINE_BYTES:,} bytes. Write one "
            f"record per line. For records in a list under KEY: jq -c '.KEY[]' {quote(name)} > conversations.jsonl"
        )
    return JsonLines(content, label, name)


def _check_wrapper(reader: Reader) -> None:
    """Check that the file is not a single object with the list of records under one of its keys."""
    if reader.count != 1:
        return
    (record,) = reader.read(chunk := reader.chunks()[0])
    if isinstance(reader, JsonLines) and chunk.size > MAX_LINE_BYTES:
        raise UserError(
            f"{reader.name}: a single line of {chunk.size:,} bytes; expected one record per line, at most "
            f"{MAX_LINE_BYTES:,} bytes each. For records in a list under KEY: "
            f"jq -c '.KEY[]' {quote(reader.name)} > conversations.jsonl"
        )
    for keys in _lists_of_records(record.value):
        where = f"the records in `{'.'.join(keys)}`" if keys else "a record under each key"
        names = (f".{key}" if NAME.fullmatch(key) else f"[{json.dumps(key)}]" for key in keys)
        array = _beginning(Path(reader.name)).removeprefix(BOM).lstrip().startswith(b"[")  # with a single element
        path = f"{'[]' if array else ''}{''.join(names)}[]"
        raise UserError(
            f"{reader.name}: a single object with {where}; expected an array or one object per line. Convert it with: "
            f"jq -c {quote(path if path.startswith('.') else f'.{path}')} {quote(reader.name)} > conversations.jsonl"
        )


def _lists_of_records(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the keys of lists of records in an object, and of objects with records as values, in at most two levels."""
    fields = value.items() if isinstance(value, dict) else ()
    record = _is_record(value)  # may still have records in place of turns: {"conversations": [{"messages": ...}]}
    for key, item in fields:
        if isinstance(item, list) and item and _is_record(item[0]) and (not record or key in LISTS):
            yield *keys, key
        elif not record and _is_record(item):
            yield keys
        elif not record and not keys:
            yield from _lists_of_records(item, (key,))


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and bool(KEYS & value.keys()) and not TURN & value.keys()


def _begins_array(line: bytes, rest: bytes) -> bool:
    """Return whether the file is an array of records, or several; not JSONL after `[]` or text such as `[INFO]`."""
    if not ARRAY.match(line):
        return False
    lines = rest.lstrip().startswith(b"{") and len(line) > 1 and _is_json(line)
    return not lines or any(map(_is_record, json.loads(line)))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _spans_lines(content: bytes) -> bool:
    """Return whether the text begins with an object that spans lines, or with two objects in one line."""
    text = content.decode("utf-8", errors="replace")
    if not text.startswith("{"):
        return False
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end].strip() or bool(TWO_OBJECTS.match(text, end))


@contextmanager
def _stream(file: Path, magic: bytes) -> Iterator[Any]:
    if magic == GZIP:
        with gzip.open(file) as stream:
            yield stream
    else:
        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd") as stream:
            yield stream


def _compression(beginning: bytes) -> bytes | None:
    """Return GZIP or ZSTD if the content is compressed. A Zstandard file may begin with a skippable frame."""
    skippable = beginning[1:4] == SKIPPABLE and 0x50 <= beginning[0] <= 0x5F
    return ZSTD if skippable else next((magic for magic in (GZIP, ZSTD) if beginning.startswith(magic)), None)


def _decompressed(file: Path) -> Path:
    """Return the file itself or, if it is compressed with gzip or Zstandard, the path of a copy in the cache.

    Chunks are read in parallel, at random; a compressed file can only be read from the beginning.
    """
    if (magic := _compression(_beginning(file))) is None:
        return file
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    target = cache_folder("decompressed") / sha256
    if target.exists():  # without the lock, so that the cache may be read-only
        return target
    with cache_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # one rank decompresses, the others wait
            if not target.exists():
                with complete_file(target) as temporary, _stream(file, magic) as stream:
                    _copy(_blocks(stream, file), temporary)
    return target


def _copy(blocks: Iterator[bytes], file: Path) -> None:
    with file.open("wb") as out:
        for block in blocks:
            out.write(block)
        out.flush()
        os.fsync(out.fileno())  # otherwise the name could survive a crash without the content


def _blocks(stream: IO[bytes], file: Path) -> Iterator[bytes]:
    try:
        while block := stream.read(COPY_BYTES):
            yield block
    except (EOFError, zlib.error, OSError) as error:
        if "too much memory" in str(error):  # of Zstandard
            raise UserError(
                f"{file}: compressed with a longer window than can be read. Decompress it with: "
                f"zstd -d --long=31 {quote(str(file))}"
            ) from error
        raise UserError(f"{file}: the compressed data is damaged or incomplete ({error}). Replace the file.") from error
