"""Reads tables: Parquet files, Arrow files and Hub datasets."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Json, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from datasets.features.features import generate_from_arrow_type
from filelock import FileLock
from pyarrow import Schema
from pyarrow.parquet import read_metadata

from data.errors import UserError
from data.sources.cache import cache_errors, cache_folder, complete_file, stream_ends, sync, system_error
from data.sources.chunks import CHUNK_RECORDS, Chunk, RawRecord, changed
from data.sources.records import KEYS

SPECIAL = set("*?[]{}:")


class Table:
    """A memory-mapped dataset from an Arrow file, a Parquet file or the Hub."""

    def __init__(self, name: str, dataset: Dataset, fingerprint: str, label: str = "", notes: tuple[str, ...] = ()):
        """Store the dataset and its identity.

        Args:
            name: path or Hub ID, for messages.
            dataset: the rows.
            fingerprint: identifies the content.
            label: see `Reader`; default: the name.
            notes: what may be missing, for the user.
        """
        self.name, self.label, self.dataset, self.count = name, label or name, dataset, len(dataset)
        self.fingerprint, self.notes = fingerprint, notes
        self._nested = {name for name, feature in dataset.features.items() if _depth(feature) > 1}
        self._files = {Path(file["filename"]): _state(Path(file["filename"])) for file in dataset.cache_files}

    def chunks(self) -> list[Chunk]:
        starts = range(0, self.count, CHUNK_RECORDS)
        return [Chunk(s, n := min(CHUNK_RECORDS, self.count - s), s, s, n) for s in starts]

    def read(self, chunk: Chunk) -> Iterator[RawRecord]:
        if any(_state(file) != state for file, state in self._files.items()):
            raise changed(self.name)
        try:
            columns = self.dataset[chunk.start : chunk.start + chunk.size]
        except Exception:  # decoding a value may raise anything; find out which rows are affected
            yield from map(self._row, range(chunk.start, chunk.start + chunk.size))
            return
        for i in range(chunk.size):
            record = {name: values[i] for name, values in columns.items()}
            yield RawRecord(chunk.start + i, self._without_filler(record))

    def _row(self, index: int) -> RawRecord:
        try:
            return RawRecord(index, self._without_filler(self.dataset[index]))
        except Exception as error:
            return RawRecord(index, None, f"the row cannot be decoded: {type(error).__name__}: {error}", "")

    def _without_filler(self, record: dict[str, Any]) -> dict[str, Any]:
        """Remove nulls from nested columns: in a table, tool schemas and arguments have the keys of all other rows."""
        return record | {name: _without_nulls(record[name]) for name in self._nested}

    def location(self, position: int) -> str:
        return f"{self.name}[{position}]"


def open_table(file: Path, label: str, name: str) -> Table:
    """Open a Parquet file, or an Arrow file in the stream format or the file format (Feather).

    Columns with media or of types unknown to `datasets` are not read, unless a conversation may be in them.

    Args:
        file: the file.
        label: see `Reader`.
        name: path for messages, if the file is a decompressed copy.

    Raises:
        UserError: the file is damaged, or cannot be converted in the cache.
    """
    before = _state(file)
    with file.open("rb") as content:
        beginning = content.read(6)
        content.seek(0)
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    columnar = beginning.startswith(b"PAR1") or name.lower().endswith(".parquet")
    with cache_errors():
        try:
            if columnar:
                dataset, notes = _read_parquet(file, sha256)
            else:
                dataset, notes = _read_arrow(file, sha256, in_file_format=beginning == b"ARROW1")
        except (OSError, ValueError, DatasetsError) as error:  # pyarrow errors are ValueErrors
            if system_error(error):
                raise
            kind = "Parquet" if columnar else "Arrow"
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"{name}: invalid {kind} file ({reason}). Replace or remove it.") from error
    if _state(file) != before:
        raise changed(name)
    return Table(name, dataset, sha256, label, notes)


def _read_parquet(file: Path, sha256: str) -> tuple[Dataset, tuple[str, ...]]:
    metadata = read_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    columns, notes = select_columns(schema)
    if not metadata.num_rows:
        return Dataset.from_dict({}), notes  # `datasets` cannot read an empty shard
    # Key the cache by content hash, because `datasets` identifies files by path and mtime.
    cache = cache_folder("parquet", sha256)
    options: dict[str, Any] = {}
    if notes:  # without features, `datasets` would infer those of all columns
        selected = pyarrow.schema([schema.field(name) for name in columns], metadata=schema.metadata)
        options = {"columns": columns, "features": Features.from_arrow_schema(selected)}

    def read() -> Dataset:
        return Dataset.from_parquet(str(_plain(file, cache)), cache_dir=str(cache), **options)

    return _converted(read, cache, columns, metadata.num_rows), notes


def _read_arrow(file: Path, sha256: str, *, in_file_format: bool) -> tuple[Dataset, tuple[str, ...]]:
    if in_file_format:  # `datasets` maps only the stream format; it converts the other one
        cache = cache_folder("arrow", sha256)

        def read() -> Dataset:
            path = str(_plain(file, cache))
            return load_dataset("arrow", data_files=path, split="train", cache_dir=str(cache))

        with pyarrow.memory_map(str(file)) as content:
            names = pyarrow.ipc.open_file(content).schema.names
        dataset = _converted(read, cache, names)
    else:
        _check_one_stream(file)
        dataset = Dataset.from_file(str(file))
        for batch in dataset.data.table.to_batches():
            batch.validate(full=True)  # reading damaged offsets would end the process; conversions check this, too
    columns, notes = select_columns(dataset.features.arrow_schema)
    dataset = dataset.select_columns(columns) if notes else dataset
    if not in_file_format and not stream_ends(file):
        notes += ("the end marker of the stream is missing; the file may be incomplete",)
    return dataset, notes


def _check_one_stream(file: Path) -> None:
    """Check that an Arrow stream is the only one in its file, because `datasets` reads only the first.

    Raises:
        ValueError: there is more content after the end of the stream.
    """
    with pyarrow.memory_map(str(file)) as content:
        with pyarrow.ipc.open_stream(content) as stream:
            for _ in stream:
                pass
        rest = content.size() - content.tell()
    if rest:
        raise ValueError(f"found {rest:,} bytes after the end of the stream; expected a single stream")


def _converted(read: Callable[[], Dataset], cache: Path, columns: list[str], rows: int | None = None) -> Dataset:
    """Convert a file in the cache, or open an earlier result if it is complete.

    Args:
        read: converts the file.
        cache: the folder of this file's conversions.
        columns: the columns to read.
        rows: number of rows in the file, if known.
    """
    if dataset := _complete(cache, columns, rows):  # without the lock, so that the cache may be read-only
        return dataset
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):
        if not (dataset := _complete(cache, columns, rows)):
            for folder in cache.iterdir():  # damaged, e.g. since a power loss
                if folder.is_dir():
                    shutil.rmtree(folder, ignore_errors=True)
            dataset = read()
            for file in dataset.cache_files:
                sync(Path(file["filename"]))
    return dataset


def _complete(cache: Path, columns: list[str], rows: int | None) -> Dataset | None:
    """Return the conversion in a folder of the cache, or None if it is missing or damaged."""
    files = sorted(file for file in cache.rglob("*.arrow") if not file.parent.name.endswith(".incomplete"))
    try:
        if not files or not all(map(stream_ends, files)):
            return None
        dataset = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    except (OSError, ValueError, DatasetsError):
        return None
    return dataset if dataset.column_names == columns and rows in (None, len(dataset)) else None


def _plain(file: Path, cache: Path) -> Path:
    """Return a path without the characters that `datasets` takes for wildcards or URLs: a link, if necessary."""
    if not SPECIAL & set(str(file)):
        return file
    with complete_file(cache / "data") as link:  # without an ending: `_complete` finds conversions by theirs
        link.symlink_to(file.absolute())
    return cache / "data"


def select_columns(schema: Schema) -> tuple[list[str], tuple[str, ...]]:
    """Return the columns to read, and notes on those with media or of unknown types, which conversations cannot use."""
    unknown = [field.name for field in schema if field.name not in KEYS and not _is_supported(field)]
    known = pyarrow.schema([field for field in schema if field.name not in unknown], metadata=schema.metadata)
    features = Features.from_arrow_schema(known)
    media = [name for name, feature in features.items() if name not in KEYS and _has_media(feature)]
    reasons = {"images, audio or other media": media, "types that `datasets` cannot read": unknown}
    notes = tuple(
        f"passed over the columns {', '.join(names)} ({reason})" for reason, names in reasons.items() if names
    )
    return [name for name in features if name not in media], notes


def _is_supported(field: pyarrow.Field) -> bool:
    try:
        generate_from_arrow_type(field.type)
    except (ValueError, NotImplementedError, TypeError):
        return False
    return True


def _has_media(feature: Any) -> bool:
    """Return whether values of a feature are decoded from images, audio, video or other media."""
    if isinstance(feature, dict):
        return any(map(_has_media, feature.values()))
    if hasattr(feature, "feature"):  # a list
        return _has_media(feature.feature)
    return hasattr(feature, "decode_example") and not isinstance(feature, Json)


def _depth(feature: Any) -> int:
    """Return the number of structs inside one another in a feature."""
    if isinstance(feature, dict):
        return 1 + max(map(_depth, feature.values()), default=0)
    if isinstance(feature, list):
        return _depth(feature[0])
    return _depth(feature.feature) if hasattr(feature, "feature") else 0


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _state(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is rewritten: its size and modification time. None if there is no such file."""
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns
