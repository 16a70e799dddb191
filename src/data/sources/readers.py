"""Readers for JSONL files, Parquet and Arrow tables and Hub datasets, and mixtures of them.

Sources are read in chunks, so that several processes can work in parallel and memory use stays constant. A chunk holds
only offsets and line numbers; its records are read on demand.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

from datasets import Dataset, config, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_metadata

from data.errors import BadRecord, UserError

CHUNK_RECORDS = 256
CHUNK_BYTES = 2**23
MAX_LINE_BYTES = 2**24  # longer lines are rejected: parsing holds several copies of a line in memory
FORMATS = {".jsonl": "JSONL", ".parquet": "Parquet", ".arrow": "Arrow"}
FILES = ".jsonl, .parquet or .arrow"
T = TypeVar("T")
SETTINGS = ("path", "weight", "split", "subset")


class SourceSettings(TypedDict):
    """The settings of a single source, e.g. an entry in `data.path`, with defaults filled in."""

    path: Any
    weight: float | None
    split: str
    subset: str | None


@dataclass(frozen=True)
class Chunk:
    """A contiguous range of a reader's records."""

    start: int  # file: byte offset; table: row index
    size: int  # file: bytes; table: rows
    line: int  # file: 1-based number of the first line; table: 0-based index of the first row
    first: int  # number of records before this chunk
    records: int


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


class Table:
    """A memory-mapped dataset from an Arrow file, a Parquet file or the Hub."""

    def __init__(self, name: str, dataset: Dataset, fingerprint: str, label: str = "") -> None:
        self.label = label or name
        self.name, self.dataset, self.fingerprint, self.count = name, dataset, fingerprint, len(dataset)

    def chunks(self) -> list[Chunk]:
        starts = range(0, self.count, CHUNK_RECORDS)
        return [Chunk(s, n := min(CHUNK_RECORDS, self.count - s), s, s, n) for s in starts]

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        columns = self.dataset[chunk.start : chunk.start + chunk.size]
        for i in range(chunk.size):
            record = {name: values[i] for name, values in columns.items()}
            yield RawRecord(chunk.start + i, record)

    def location(self, position: int) -> str:
        return f"{self.name}[{position}]"


@dataclass(frozen=True)
class Source:
    """A reader, and the number of evenly spaced records to take from it."""

    reader: Reader
    take: int

    def selects(self, index: int) -> bool:
        """Return whether the record with this index (not counting blank lines) is selected."""
        return (index + 1) * self.take // self.reader.count > index * self.take // self.reader.count

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        """Yield the selected records in a chunk."""
        for index, raw in enumerate(self.reader.read(chunk), start=chunk.first):
            if self.selects(index):
                yield raw


def read_all(sources: list[Source]) -> Iterator[tuple[Source, RawRecord]]:
    """Yield the selected records of all sources in order, each with its source."""
    for source in sources:
        for chunk in source.reader.chunks():
            for raw in source.read(chunk):
                yield source, raw


def open_sources(path: Any, *, split: str, max_records: int | None, setting: str = "data.path") -> list[Source]:
    """Open the sources in a setting: a path, a Hub ID, a dict with the keys in `SETTINGS`, or a list of these.

    If the sources have weights, take as many records as possible in those proportions without repeating any; otherwise
    take all records. `max_records` caps the total.

    Raises:
        UserError: a source is missing or empty, or the mixture is invalid.
    """
    given = [_settings(item, split, setting) for item in (path if isinstance(path, list) else [path])]
    if not given:
        raise UserError(f"{setting} is an empty list. Specify a file, a folder or a Hub dataset.")
    weights = [item["weight"] for item in given]
    if len({weight is None for weight in weights}) > 1:
        raise UserError(f"{setting}: only some sources have a weight. Set a weight for every source or for none.")
    opened = [_open(str(item["path"]), item["split"], item["subset"]) for item in given]
    empty = [item["path"] for item, readers in zip(given, opened, strict=True) if not sum(r.count for r in readers)]
    if empty:
        raise UserError(
            f"{setting}={empty[0]} contains no records. Expected one JSON object per line, or a table with rows."
        )
    takes = mix([sum(r.count for r in readers) for readers in opened], weights, max_records)
    return [
        Source(reader, count)
        for readers, take in zip(opened, takes, strict=True)
        for reader, count in zip(readers, mix([r.count for r in readers], [None] * len(readers), take), strict=True)
        if count
    ]


def mix(counts: list[int], weights: list[float | None], max_records: int | None) -> list[int]:
    """Return how many records to take from each source, in proportion to the weights and without repeating any."""
    ratios = [count if weight is None else weight for count, weight in zip(counts, weights, strict=True)]
    most = min(count * sum(ratios) / ratio for count, ratio in zip(counts, ratios, strict=True) if ratio)
    total = min(round(most), sum(counts), max_records if max_records is not None else sum(counts))
    edges = [round(total * sum(ratios[:i]) / sum(ratios)) for i in range(len(ratios) + 1)]
    return [min(after - before, count) for before, after, count in zip(edges, edges[1:], counts, strict=False)]


def fingerprint(sources: list[Source]) -> list[list[Any]]:
    """Return each reader's fingerprint with the number of records taken, independent of local paths and mtimes."""
    return [[source.reader.fingerprint, source.take] for source in sources]


def _settings(item: Any, split: str, setting: str) -> SourceSettings:
    if isinstance(item, str):
        return {"path": item, "weight": None, "split": split, "subset": None}
    if not isinstance(item, dict) or "path" not in item or item.keys() - set(SETTINGS):
        raise UserError(
            f"{setting}: invalid source {item!r}; expected a path, or a mapping with keys from {', '.join(SETTINGS)}."
        )
    weight = item.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
        raise UserError(f"{setting}: weight={weight!r} for {item['path']} must be a number > 0.")
    subset = item.get("subset")
    unused = next((key for key in ("split", "subset") if item.get(key)), None)
    if unused and setting == "data.path" and Path(str(item["path"])).exists():
        raise UserError(
            f"{setting}: {unused}={item[unused]} has no effect on the local path {item['path']}. Remove it."
        )
    return {"path": item["path"], "weight": weight, "split": item.get("split") or split, "subset": subset}


def _open(path: str, split: str, subset: str | None) -> list[Reader]:
    local = Path(path)
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.suffix in FORMATS and file.is_file())
        if not files:
            raise UserError(f"{path}: the folder contains no {FILES} files.")
        return [_open_file(file, str(file.relative_to(local))) for file in files]
    if local.is_file():
        return [_open_file(local, local.name)]
    if local.suffix in (*FORMATS, ".json") or local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise UserError(f"{path}: no such file or folder. Specify a file ({FILES}), a folder or a Hub ID (owner/name).")
    return [_open_hub(path, split, subset)]


def _open_file(file: Path, label: str) -> Reader:
    if file.suffix not in (".parquet", ".arrow"):
        return JsonLines(file, label)
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    # Key the cache by content hash, because `datasets` identifies files by path and mtime.
    cache = str(Path(config.HF_DATASETS_CACHE) / "flexdraft" / "parquet" / sha256)
    try:
        if file.suffix == ".arrow":
            dataset = Dataset.from_file(str(file))
        elif read_metadata(file).num_rows:
            dataset = Dataset.from_parquet(str(file), cache_dir=cache)
        else:
            dataset = Dataset.from_dict({})  # `datasets` cannot read an empty shard
    except (OSError, ValueError, DatasetsError) as error:  # pyarrow errors are ValueErrors
        raise UserError(f"{file}: invalid {FORMATS[file.suffix]} file ({error}). Replace or remove it.") from error
    return Table(str(file), dataset, sha256, label)


def _open_hub(name: str, split: str, subset: str | None) -> Reader:
    try:
        dataset = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"{name}: no such file or folder, and loading split {split!r} from the Hub failed "
            f"({type(error).__name__}: {error}). Check the name, the network and your login (`hf auth login`)."
        ) from error
    label = "/".join(filter(None, (name, subset, split)))
    return Table(label, dataset, f"{label}/{dataset._fingerprint}")


def read_strictly(path: Any, parse: Callable[[Any], T], *, split: str, limit: int | None, setting: str) -> list[T]:
    """Read and parse the first `limit` records of a small dataset, e.g. evaluation prompts, or all if None.

    Raises:
        UserError: a record is invalid; the message gives its file and line.
    """
    parsed: list[T] = []
    for source, raw in islice(read_all(open_sources(path, split=split, max_records=None, setting=setting)), limit):
        try:
            parsed.append(raw.parse(parse))
        except BadRecord as error:
            location = source.reader.location(raw.position)
            raise UserError(f"{setting}: {location}: {error}. Fix or remove the record.") from None
    return parsed
