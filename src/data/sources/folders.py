"""Finds the data files in a folder."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import config
from datasets.data_files import FILES_TO_IGNORE

from data.errors import UserError
from data.sources.chunks import unreadable
from data.sources.formats import COMPRESSED, FILES, TABLES, TEXT, is_data_file

METADATA = {*FILES_TO_IGNORE, config.DATASET_STATE_JSON_FILENAME}
CACHE = "cache of datasets"
AGAIN = "read already under another name"
# Written by data.regenerate beside its output, and by runs; dropped answers must not be trained on.
SIDE_FILES = (".dropped.jsonl", ".unfinished.jsonl", ".settings.json")
REJECTS = ("rejects.jsonl", "regenerate_rejects.jsonl")
SHOWN = 3  # number of names in a message
UNREAD = "compressed or other data, not read"
# Endings of data that is not read, wherever they are in a name: data.jsonl.xz, data.parquet.incomplete, data.jsonl.1.
DATA_LIKE = {
    *TEXT, *TABLES, *COMPRESSED, ".7z", ".avro", ".bz2", ".csv", ".db", ".incomplete", ".lz4", ".orc", ".part", ".rar",
    ".sqlite", ".tar", ".tbz2", ".tgz", ".tsv", ".txz", ".xlsx", ".xz", ".zip", ".zstd",
}  # fmt: skip


@dataclass
class DataFile:
    """A data file in a folder."""

    path: Path
    name: str  # relative to the folder, with forward slashes
    splits: set[str] = field(default_factory=set)


@dataclass
class Folder:
    """The data files in a folder, in reading order, and the names of the entries passed over, by reason."""

    path: Path
    files: list[DataFile] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    missing: dict[str, str] = field(default_factory=dict)  # name: split, of those in a dataset_dict.json without files
    notes: list[str] = field(default_factory=list)

    def note(self) -> str:
        """Return one line that names what was passed over, data first, or an empty string."""
        reasons = sorted(self.passed_over, key=lambda reason: reason != UNREAD)
        parts = [f"{reason} ({shown(self.passed_over[reason])})" for reason in reasons]
        return f"{self.path}: passed over: {', '.join(parts)}" if parts else ""


def scan(folder: Path) -> Folder:
    """Find all data files below a folder.

    Of a `Dataset.save_to_disk`, only the listed files count. Files of a `DatasetDict.save_to_disk` get their splits.
    Links are followed. Hidden files, metadata, caches and side files of this project are passed over.

    Raises:
        UserError: the folder has no data files, is incomplete, or cannot be read.
    """
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        raise UserError(f"{folder} is a repository in the Hub cache. Use its ID (owner/name) or a snapshot.")
    found = Folder(folder)
    try:
        found.files = list(_walk(folder, "", found, set(), set()))
    except OSError as error:
        raise unreadable(error.filename or str(folder), error) from error
    if not found.files:
        note = found.note().removeprefix(f"{folder}: p")
        raise UserError(f"{folder}: the folder contains no data files ({FILES}).{f' P{note}.' if note else ''}")
    return found


def shown(names: list[str]) -> str:
    """Return the first names, for a message."""
    escaped = [name.encode("utf-8", errors="backslashreplace").decode() for name in names[:SHOWN]]
    return ", ".join(escaped) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _walk(folder: Path, prefix: str, found: Folder, parents: set[str], visited: set[str]) -> Iterator[DataFile]:
    """Yield the data files below a folder, sorted by name.

    Args:
        folder: the folder.
        prefix: its name relative to the root, with a slash at its end.
        found: other entries and missing folders of splits are added to it.
        parents: real paths of the folders that contain this one; they stop cycles of links.
        visited: real paths of all folders so far; this one is added. Folders that link to one another are read once.
    """
    parents = parents | {real := os.path.realpath(folder)}
    visited.add(real)
    passed_over = found.passed_over
    if saved := _saved(folder):
        yield from _listed(folder, prefix, saved, passed_over)
        return
    splits = [name for name in _read_list(folder / config.DATASETDICT_JSON_FILENAME, "splits") if isinstance(name, str)]
    found.missing |= {prefix + name: name for name in splits}
    for entry in sorted(folder.iterdir()):
        name, is_folder = prefix + entry.name, entry.is_dir()
        if entry.name.startswith(".") or is_folder and entry.name.startswith("__"):
            passed_over["hidden"].append(name)
        elif is_folder and os.path.realpath(entry) in parents:
            passed_over["links to a parent folder"].append(name)
        elif is_folder and os.path.realpath(entry) in visited:
            passed_over[AGAIN].append(name)
        elif is_folder:
            files = list(_walk(entry, f"{name}/", found, parents, visited))
            if files:
                found.missing.pop(name, None)
            for file in files:
                file.splits |= {entry.name} if entry.name in splits else set()
            yield from files
        elif entry.name == config.DATASETDICT_JSON_FILENAME and splits:
            continue
        elif entry.name in METADATA:
            passed_over["metadata"].append(name)
        elif _is_cache(entry.name):
            passed_over[CACHE].append(name)
        elif entry.name in REJECTS or entry.name.endswith(SIDE_FILES):
            passed_over["rejects and side files of regeneration"].append(name)
        elif not is_data_file(entry.name):
            passed_over[UNREAD if _is_data_like(entry.name) else "other formats"].append(name)
        elif entry.is_file() or entry.is_symlink():  # opening a broken link reports it
            yield DataFile(entry, name)
        else:
            passed_over["pipes or devices"].append(name)


def _is_data_like(name: str) -> bool:
    """Return whether a file that is not read may contain data, by the endings in its name."""
    return not DATA_LIKE.isdisjoint(suffix.rstrip("~") for suffix in Path(name.lower()).suffixes)


def _is_cache(name: str) -> bool:
    """Return whether `datasets` wrote this file beside the data, for `map`, `shuffle` or `filter`."""
    return name.startswith("cache-") and name.endswith(".arrow")


def _saved(folder: Path) -> list[str]:
    """Return the files that `Dataset.save_to_disk` lists, or an empty list for any other folder."""
    state = folder / config.DATASET_STATE_JSON_FILENAME
    if _read_list(state, "_indices_data_files") or _read_list(state, "_indices_files"):
        raise UserError(f"{folder} was saved by an old version of `datasets`. Load it and save it again.")
    files = _read_list(state, "_data_files")
    return [str(file["filename"]) for file in files if isinstance(file, dict) and "filename" in file]


def _listed(folder: Path, prefix: str, names: list[str], passed_over: dict[str, list[str]]) -> Iterator[DataFile]:
    for entry in sorted(folder.iterdir()):
        if entry.name not in names and entry.name not in METADATA:
            reason = CACHE if _is_cache(entry.name) else f"not in {config.DATASET_STATE_JSON_FILENAME}"
            passed_over[reason].append(prefix + entry.name)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing, but {config.DATASET_STATE_JSON_FILENAME} lists it.")
        yield DataFile(folder / name, prefix + name)


def _read_list(file: Path, key: str) -> list[Any]:
    """Return a list in a metadata file of `datasets`, or an empty one if the file or the list is missing or invalid."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []
