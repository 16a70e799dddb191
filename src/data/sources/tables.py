"""Reads tables: Parquet files, Arrow files and Hub datasets."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, config, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_metadata

from data.errors import UserError
from data.sources.chunks import CHUNK_RECORDS, Chunk, RawRecord

FORMATS = {".parquet": "Parquet", ".arrow": "Arrow"}


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


def open_table(file: Path, label: str) -> Table:
    """Open a Parquet or Arrow file.

    Raises:
        UserError: the file is damaged.
    """
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


def open_hub(name: str, split: str, subset: str | None) -> Table:
    """Load a dataset from the Hub, or from the cache of `datasets`.

    Raises:
        UserError: the dataset, subset or split does not exist, or cannot be downloaded.
    """
    try:
        dataset = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"{name}: no such file or folder, and loading split {split!r} from the Hub failed "
            f"({type(error).__name__}: {error}). Check the name, the network and your login (`hf auth login`)."
        ) from error
    label = "/".join(filter(None, (name, subset, split)))
    return Table(label, dataset, f"{label}/{dataset._fingerprint}")
