"""Readers for JSONL files, Parquet and Arrow tables, Hub data sets, and mixtures of them.

Sources are read in chunks, so that processes can work in parallel and memory use stays constant. A chunk stores its
offset and line numbers; its records are read on demand.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from datasets import Dataset, config, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_metadata

from data.errors import BadRecord, UserError

CHUNK_RECORDS = 256
CHUNK_BYTES = 2**23
MAX_LINE_BYTES = 2**24  # longer lines are rejected: parsing would hold several copies in memory
FILES = (".jsonl", ".parquet", ".arrow")
T = TypeVar("T")
SETTINGS = ("path", "weight", "split", "subset")


@dataclass(frozen=True)
class Chunk:
    """A range of consecutive records in a source."""

    start: int  # file: byte offset; table: row index
    size: int  # file: bytes; table: rows
    line: int  # file: number of the first line, from 1; table: index of the first row, from 0
    first: int  # number of records before the chunk
    records: int


@dataclass(frozen=True)
class RawRecord:
    """A raw record, or the reason why it could not be read."""

    place: int  # line or row number
    record: Any
    problem: str | None = None
    line: str | None = None  # raw text of the line if it is not valid JSON

    def raw(self) -> str:
        """Return the record as text for the rejects file."""
        return json.dumps(self.record, ensure_ascii=True, default=str) if self.line is None else self.line


class Reader(Protocol):
    """A file, table or data set."""

    name: str
    label: str  # short and independent of the data directory; used in sample ids
    count: int  # number of records
    fingerprint: str  # hash of the content

    def chunks(self) -> list[Chunk]: ...
    def read(self, chunk: Chunk) -> Iterator[RawRecord]: ...
    def where(self, place: int) -> str: ...


class JsonLines:
    """A file with one JSON object per line. Blank lines are skipped."""

    def __init__(self, file: Path, label: str = "") -> None:
        """Scan the file once: split it into chunks, count the records and hash the content.

        Raises:
            UserError: the file is a JSON array, or compressed.
        """
        self.name, self.label = str(file), label or file.name
        self._chunks: list[Chunk] = []
        sha256 = hashlib.sha256()
        with file.open("rb") as lines:
            start = size = records = number = self.count = 0
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
            raise UserError(f"{self.name} is compressed. Unpack it first.")
        if piece.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise UserError(
                f"{self.name} begins with a JSON array; expected one object a line. "
                f"Convert it with: jq -c '.[]' {self.name} > conversations.jsonl"
            )

    def chunks(self) -> list[Chunk]:
        return self._chunks

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        if chunk.records == 1 and chunk.size > MAX_LINE_BYTES:
            problem = f"{chunk.size:,} bytes; a record may have at most {MAX_LINE_BYTES:,}"
            yield RawRecord(chunk.line, None, problem, "")
            return
        with open(self.name, "rb") as file:
            file.seek(chunk.start)
            block = file.read(chunk.size)
        for number, line in enumerate(block.split(b"\n"), start=chunk.line):
            if line.strip():
                yield _decoded(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)

    def where(self, place: int) -> str:
        return f"{self.name}:{place}"


def _decoded(number: int, line: bytes) -> RawRecord:
    try:
        return RawRecord(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {error}"
    return RawRecord(number, None, problem, line.decode("utf-8", errors="backslashreplace").strip())


class Table:
    """A memory-mapped data set from an Arrow file, a Parquet file or the Hub."""

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

    def where(self, place: int) -> str:
        return f"{self.name}[{place}]"


@dataclass(frozen=True)
class Source:
    """A source and the number of records to take from it, spread evenly over the source."""

    reader: Reader
    take: int

    def taken(self, record: int) -> bool:
        """Return whether the record with this index (blank lines not counted) is selected."""
        return (record + 1) * self.take // self.reader.count > record * self.take // self.reader.count

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        """Yield the selected records of a chunk."""
        for number, found in enumerate(self.reader.read(chunk), start=chunk.first):
            if self.taken(number):
                yield found


def read_all(sources: list[Source]) -> Iterator[tuple[Source, RawRecord]]:
    """Yield the selected records of all sources, in order."""
    for source in sources:
        for chunk in source.reader.chunks():
            for found in source.read(chunk):
                yield source, found


def open_sources(path: Any, *, split: str, max_records: int | None, setting: str = "data.path") -> list[Source]:
    """Open the sources of a setting: a path, a Hub id, or a list of these or of `{path, weight, split, subset}`.

    With weights, take as many records as possible in these proportions without repeating any; without weights, take
    all records. `max_records` limits the total.

    Raises:
        UserError: a source is missing or empty, or the mixture is invalid.
    """
    given = [_settings(item, split, setting) for item in (path if isinstance(path, list) else [path])]
    if not given:
        raise UserError(f"{setting} is an empty list. Name a file, a folder or a data set on the Hub.")
    weights = [item["weight"] for item in given]
    if len({weight is None for weight in weights}) > 1:
        raise UserError(f"{setting}: some sources have a weight and some have none. Give all of them one, or none.")
    opened = [_open(str(item["path"]), item["split"], item["subset"]) for item in given]
    empty = [item["path"] for item, readers in zip(given, opened, strict=True) if not sum(r.count for r in readers)]
    if empty:
        raise UserError(f"{setting}={empty[0]} holds no record. Expected one JSON object a line, or rows of a table.")
    takes = mix([sum(r.count for r in readers) for readers in opened], weights, max_records)
    return [
        Source(reader, share)
        for readers, take in zip(opened, takes, strict=True)
        for reader, share in zip(readers, mix([r.count for r in readers], [None] * len(readers), take), strict=True)
        if share
    ]


def mix(counts: list[int], weights: list[float | None], max_records: int | None) -> list[int]:
    """Return the number of records to take from each source: proportional to the weights, without repetition."""
    shares = [count if weight is None else weight for count, weight in zip(counts, weights, strict=True)]
    total = min(count * sum(shares) / share for count, share in zip(counts, shares, strict=True) if share)
    total = min(round(total), sum(counts), max_records if max_records is not None else sum(counts))
    edges = [round(total * sum(shares[:i]) / sum(shares)) for i in range(len(shares) + 1)]
    return [min(after - before, count) for before, after, count in zip(edges, edges[1:], counts, strict=False)]


def fingerprint(sources: list[Source]) -> list[list[Any]]:
    """Return everything that affects the records of the sources: file contents, not paths or dates."""
    return [[source.reader.fingerprint, source.take] for source in sources]


def _settings(item: Any, split: str, setting: str) -> dict[str, Any]:
    if isinstance(item, str):
        return {"path": item, "weight": None, "split": split, "subset": None}
    if not isinstance(item, dict) or "path" not in item or item.keys() - set(SETTINGS):
        raise UserError(f"{setting}: {item!r} is no source. Expected a path, or an object with {', '.join(SETTINGS)}.")
    weight = item.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
        raise UserError(f"{setting}: weight {weight!r} of {item['path']}; expected a number above 0.")
    subset = item.get("subset")
    named = next((key for key in ("split", "subset") if item.get(key)), None)
    if named and setting == "data.path" and Path(str(item["path"])).exists():
        raise UserError(
            f"{setting}: {named}={item[named]} of {item['path']} has no effect on local files. Leave it out."
        )
    return {"path": item["path"], "weight": weight, "split": item.get("split") or split, "subset": subset}


def _open(path: str, split: str, subset: str | None) -> list[Reader]:
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in FILES and file.is_file())
        if not files:
            raise UserError(f"{path}: no {', '.join(FILES)} file in this folder.")
        return [_open_file(file, str(file.relative_to(place))) for file in files]
    if place.is_file():
        return [_open_file(place, place.name)]
    if place.suffix in (*FILES, ".json") or place.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise UserError(
            f"No file at {path}. Give a file ({', '.join(FILES)}), a folder of them, or a Hub id (owner/name)."
        )
    return [_open_hub(path, split, subset)]


def _open_file(file: Path, label: str) -> Reader:
    if file.suffix not in (".parquet", ".arrow"):
        return JsonLines(file, label)
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    # Key the cache by content hash: `datasets` identifies files by path and modification time.
    cache = str(Path(config.HF_DATASETS_CACHE) / "flexdraft" / "parquet" / sha256)
    try:
        if file.suffix == ".arrow":
            dataset = Dataset.from_file(str(file))
        elif read_metadata(file).num_rows:
            dataset = Dataset.from_parquet(str(file), cache_dir=cache)
        else:
            dataset = Dataset.from_dict({})  # `datasets` cannot read an empty shard
    except (OSError, ValueError, DatasetsError) as error:  # pyarrow errors are ValueErrors
        raise UserError(f"{file}: does not read as a {file.suffix[1:]} table ({error}).") from error
    return Table(str(file), dataset, sha256, label)


def _open_hub(name: str, split: str, subset: str | None) -> Reader:
    try:
        dataset = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"{name}: no file or folder of that name here, and the Hub did not give split {split!r} of it "
            f"({type(error).__name__}: {error}). Check the name, the network and `hf auth login`."
        ) from error
    label = "/".join(filter(None, (name, subset, split)))
    return Table(label, dataset, f"{label}/{dataset._fingerprint}")


def read_strictly(path: Any, parse: Callable[[Any], T], *, split: str, limit: int | None, setting: str) -> list[T]:
    """Read and parse the first `limit` records of a small set, such as evaluation prompts, allowing no bad records.

    Raises:
        UserError: a record is bad; the message gives its file and line.
    """
    parsed = []
    for source, found in islice(read_all(open_sources(path, split=split, max_records=None, setting=setting)), limit):
        try:
            if found.problem:
                raise BadRecord(found.problem)
            parsed.append(parse(found.record))
        except BadRecord as error:
            where = source.reader.where(found.place)
            raise UserError(f"{setting}: {where}: {error}. Mend or remove the record.") from None
    return parsed
