"""Opens data sources (files, folders, Hub datasets) and mixes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from data.errors import BadRecord, UserError
from data.sources.chunks import Chunk, RawRecord, Reader, T
from data.sources.jsonl import JsonLines
from data.sources.tables import open_hub, open_table

SUFFIXES = (".jsonl", ".parquet", ".arrow")
FILES = ".jsonl, .parquet or .arrow"
SETTINGS = ("path", "weight", "split", "subset")


class SourceSettings(TypedDict):
    """The settings of a single source, e.g. an entry in `data.path`, with defaults filled in."""

    path: Any
    weight: float | None
    split: str
    subset: str | None


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
        files = sorted(file for file in local.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path}: the folder contains no {FILES} files.")
        return [_open_file(file, str(file.relative_to(local))) for file in files]
    if local.is_file():
        return [_open_file(local, local.name)]
    if local.suffix in (*SUFFIXES, ".json") or local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise UserError(f"{path}: no such file or folder. Specify a file ({FILES}), a folder or a Hub ID (owner/name).")
    return [open_hub(path, split, subset)]


def _open_file(file: Path, label: str) -> Reader:
    return open_table(file, label) if file.suffix in (".parquet", ".arrow") else JsonLines(file, label)


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
