"""Opens data sources (files, folders, Hub datasets) and mixes them."""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import has_magic
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypedDict

from data.errors import BadRecord, UserError
from data.sources.chunks import Chunk, RawRecord, Reader, T, unreadable
from data.sources.formats import FILES, is_data_file, open_file
from data.sources.hub import open_hub
from data.sources.kinds import check_kind
from data.sources.splits import missing_shards, open_folder
from data.sources.tables import Table

SETTINGS = ("path", "weight", "split", "subset", "kind")


class SourceSettings(TypedDict):
    """The settings of a single source, e.g. an entry in `data.path`."""

    path: str
    weight: float | None
    split: str | None
    subset: str | None
    kind: str | None


@dataclass(frozen=True)
class Source:
    """A reader, and the number of evenly spaced records to take from it."""

    reader: Reader
    take: int
    kind: str | None = None  # kind of its answers (`data.sources.kinds`), if the source declares one

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


def open_sources(
    path: Any,
    *,
    split: str,
    max_records: int | None,
    setting: str = "data.path",
    default_split: str = "train",
    warn: Callable[[str], None] = lambda text: None,
) -> list[Source]:
    """Open the sources in a setting: a path, a Hub ID, a dict with the keys in `SETTINGS`, or a list of these.

    If the sources have weights, take as many records as possible in those proportions without repeating any; otherwise
    take all records.

    Args:
        path: the value of the setting.
        split: the split to read of sources that have splits and do not set their own.
        max_records: limit for the total, or None.
        setting: name of the setting, for messages.
        default_split: the value of `split` if the user did not choose one. Another one must have an effect.
        warn: called with one line per source with files or columns that are not read.

    Raises:
        UserError: a source is missing, empty or damaged, or the mixture is invalid.
    """
    given = [_settings(item, setting) for item in (path if isinstance(path, list) else [path])]
    if not given:
        raise UserError(f"{setting} is an empty list. Specify a file, a folder or a Hub dataset.")
    weights = [item["weight"] for item in given]
    if len({weight is None for weight in weights}) > 1:
        raise UserError(f"{setting}: only some sources have a weight. Set a weight for every source or for none.")
    opened = [_open(item, split, split != default_split, setting, warn) for item in given]
    if split != default_split and not any(source.uses_split for source in opened):
        raise UserError(
            f"data.split={split} has no effect: every source in {setting} is a file or folder without splits, or "
            "sets its own split. Remove it."
        )
    counts = [sum(reader.count for reader in source.readers) for source in opened]
    if not all(counts):
        empty = given[counts.index(0)]["path"]
        raise UserError(f"{setting}={empty} contains no records. Expected JSON objects, or a table with rows.")
    takes = mix(counts, weights, max_records)
    return [
        Source(reader, count, item["kind"])
        for item, source, take in zip(given, opened, takes, strict=True)
        for reader, count in zip(source.readers, _spread(source.readers, take), strict=True)
        if count
    ]


def _spread(readers: list[Reader], take: int) -> list[int]:
    return mix([reader.count for reader in readers], [None] * len(readers), take)


def mix(counts: list[int], weights: list[float | None], max_records: int | None) -> list[int]:
    """Return how many records to take from each source, in proportion to the weights and without repeating any."""
    ratios = [count if weight is None else weight for count, weight in zip(counts, weights, strict=True)]
    ratio_sum = sum(ratios)
    most = min(count * ratio_sum / ratio for count, ratio in zip(counts, ratios, strict=True) if ratio)
    total = min(round(most), sum(counts), max_records if max_records is not None else sum(counts))
    edges = [round(total * before / ratio_sum) for before in accumulate(ratios, initial=0)]
    return [min(after - before, count) for before, after, count in zip(edges, edges[1:], counts, strict=False)]


def fingerprint(sources: list[Source]) -> list[list[Any]]:
    """Return each reader's fingerprint with the number of records taken, independent of local paths and mtimes."""
    return [[source.reader.fingerprint, source.take] for source in sources]


def _settings(item: Any, setting: str) -> SourceSettings:
    item = {"path": item} if isinstance(item, str) else item
    if not isinstance(item, dict) or not isinstance(item.get("path"), str) or item.keys() - set(SETTINGS):
        raise UserError(
            f"{setting}: invalid source {item!r}; expected a path, or a mapping with keys from {', '.join(SETTINGS)}."
        )
    weight = item.get("weight")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf
    ):
        raise UserError(f"{setting}: weight={weight!r} for {item['path']} must be a number > 0.")
    if (kind := item.get("kind")) is not None:
        check_kind(kind, f"{setting}: {item['path']}: kind")
    split, subset = item.get("split"), item.get("subset")
    return {"path": item["path"], "weight": weight, "split": split, "subset": subset, "kind": kind}


def _open(item: SourceSettings, split: str, chosen: bool, setting: str, warn: Callable[[str], None]) -> "_Opened":
    path, own, subset = item["path"], item["split"], item["subset"]
    local = Path(os.path.expanduser(path))  # keeps the name of an unknown user, in contrast to pathlib
    try:
        is_folder, is_file = local.is_dir(), local.is_file()
    except OSError as error:  # e.g. a parent folder without permission
        raise unreadable(path, error) from error
    if is_folder:
        folder, has_splits = open_folder(local, own or split, subset, chosen=chosen or own is not None)
        readers = [open_file(file.path, file.name) for file in folder.files]
        notes = [*folder.notes, folder.note(), missing_shards(folder)]
    elif is_file:
        readers, notes, has_splits = [open_file(local, local.name)], [], False
    else:
        _check_id(path, local)
        readers, notes, has_splits = [open_hub(path, own or split, subset)], [], True
    if unused := next((key for key, value in (("split", own), ("subset", subset)) if value and not has_splits), None):
        raise UserError(
            f"{setting}: {unused}={own if unused == 'split' else subset} has no effect on the local path {path}. "
            "Remove it."
        )
    notes += [f"{r.name}: {note}" for r in readers if isinstance(r, Table) for note in r.notes]
    for note in filter(None, notes):
        warn(note)
    return _Opened(readers, has_splits and own is None)


@dataclass(frozen=True)
class _Opened:
    """The readers of one source, and whether they depend on the split given for all sources."""

    readers: list[Reader]
    uses_split: bool


def _check_id(path: str, local: Path) -> None:
    """Check that a path without a local file can be the ID of a Hub dataset.

    Raises:
        UserError: it cannot; the message gives the cause.
    """
    if local.is_symlink():
        raise UserError(f"{path} is a link to {os.readlink(local)}, which does not exist. Fix or remove the link.")
    if local.exists():
        raise UserError(f"{path} is neither a file nor a folder, but e.g. a pipe. Write its content to a file first.")
    hint = ""
    if "\\" in path or re.match(r"[A-Za-z]:", path):
        hint = " On this system, paths have forward slashes and no drive letter."
    elif has_magic(path):
        hint = " Wildcards are not expanded."
    if is_data_file(path) or hint or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{path}: no such file or folder.{hint} Specify a file ({FILES}), a folder, a list of these or a Hub ID "
            "(owner/name)."
        )


def read_strictly(
    path: Any,
    parse: Callable[[Any], T],
    *,
    split: str,
    limit: int | None,
    setting: str,
    warn: Callable[[str], None] = lambda text: None,
) -> list[T]:
    """Read and parse the first `limit` records of a small dataset, e.g. evaluation prompts, or all if None.

    Args:
        path, setting, warn: see `open_sources`.
        parse: returns the parsed record, or raises BadRecord.
        split: the split to read if the source has splits and sets none.
        limit: number of records.

    Raises:
        UserError: a record is invalid; the message gives its file and line.
    """
    parsed: list[T] = []
    sources = open_sources(path, split=split, default_split=split, max_records=None, setting=setting, warn=warn)
    for source, raw in islice(read_all(sources), limit):
        try:
            parsed.append(raw.parse(parse))
        except BadRecord as error:
            location = source.reader.location(raw.position)
            raise UserError(f"{setting}: {location}: {error}. Fix or remove the record.") from None
    return parsed
