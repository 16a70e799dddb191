"""Selects the files of one split in a folder."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import config, load_dataset_builder
from datasets.data_files import DEFAULT_PATTERNS_ALL, SPLIT_KEYWORDS, _get_data_files_patterns
from fsspec.utils import glob_translate
from huggingface_hub import metadata_load

from data.errors import UserError
from data.sources.folders import AGAIN, SHOWN, DataFile, Folder, scan, shown

ALL = "all"  # every split, as in `datasets`
SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\b")
# The splits of `datasets` besides train.
HELD_OUT = {word for split, words in SPLIT_KEYWORDS.items() if split != "train" for word in (str(split), *words)}


def open_folder(path: Path, split: str, subset: str | None, *, chosen: bool) -> tuple[Folder, bool]:
    """Find the data files of one split of a folder, or all data files if it has no splits.

    Splits are those of `DatasetDict.save_to_disk`, of the configurations in README.md or, by the rules of `datasets`,
    of the file names. A file with several names is read once.

    Args:
        path: an existing folder.
        split: name of a split, or "all".
        subset: a configuration in README.md.
        chosen: the user chose the split, so it must exist. Otherwise, the folder's only split may have another name,
            except one for held-out data such as test.

    Returns:
        The folder with the files to read, and whether it has splits.

    Raises:
        UserError: the folder is invalid, the split does not exist, or some files belong to no split.
    """
    found = scan(path)
    if not _splits_by_card(found, subset):
        if subset:
            raise UserError(f"subset={subset} has no effect on the local path {path}. Remove it.")
        _check_complete(found, split)
        _splits_by_name(found)
    splits = sorted({split for file in found.files for split in file.splits})
    if splits and split != ALL:
        _keep(found, _choice(found, splits, split, chosen))
    _keep_once(found)
    return found, bool(splits)


def missing_shards(folder: Folder) -> str:
    """Return one line that names missing shards, or an empty string if there are none.

    If train-00000-of-00002.parquet is alone, its second shard is missing: on purpose, or because a download failed.
    """
    shards: dict[tuple[str, str], set[int]] = {}
    for file in folder.files:
        if found := SHARD.match(file.name):
            shards.setdefault((found[1], found[3]), set()).add(int(found[2]))
    names = [
        f"{name}-{index:0{len(count)}}-of-{count}"
        for (name, count), present in shards.items()
        for index in range(int(count))
        if index not in present
    ]
    return f"{folder.path}: missing shards: {len(names):,} ({shown(names)})" if names else ""


def _splits_by_card(found: Folder, subset: str | None) -> bool:
    """Set the splits of a configuration in README.md. Return whether there are configurations."""
    card = found.path / config.REPOCARD_FILENAME
    if not _configs(card):
        return False
    root = found.path.resolve()  # `datasets` resolves links above the folder, but not those in it
    try:
        chosen = load_dataset_builder(str(root), subset).config.data_files
    except Exception as error:  # invalid metadata may raise anything
        reason = " ".join(str(error).partition("\nExample")[0].split()) or type(error).__name__
        raise UserError(
            f"{found.path}: subset={subset}: {reason} Set subset to one in {card.name}, or fix its metadata."
        ) from error
    splits: dict[str, set[str]] = {}
    for split, files in (chosen or {}).items():
        for file in files:
            splits.setdefault(Path(os.path.relpath(file, root)).as_posix(), set()).add(str(split))
    for file in found.files:
        file.splits = splits.get(file.name, set())
    _drop(found, [file for file in found.files if not file.splits], f"other configurations in {card.name}")
    if missing := splits.keys() - {file.name for file in found.files}:
        raise UserError(f"{found.path}: {card.name} lists {shown(sorted(missing))}, which cannot be read.")
    return True


def _configs(card: Path) -> list[Any]:
    """Return the configurations in the metadata of a README.md, which may not exist."""
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except Exception as error:  # the YAML parser has its own exceptions
        reason = " ".join(str(error).split())
        raise UserError(f"{card}: invalid YAML between the --- lines ({reason}). Fix or remove the file.") from error
    return metadata.get("configs") or [] if isinstance(metadata, dict) else []


def _check_complete(found: Folder, split: str) -> None:
    """Check that the folders of a split are those that `DatasetDict.save_to_disk` lists."""
    missing = [name for name, absent in found.missing.items() if split.lower() in (absent.lower(), ALL)]
    if missing:
        raise UserError(
            f"{found.path}: {shown(missing)} is missing, but {config.DATASETDICT_JSON_FILENAME} lists it. Restore the "
            "folder, or choose another split."
        )
    if found.missing:
        found.notes.append(f"{found.path}: folders of other splits are missing ({shown(list(found.missing))})")


def _splits_by_name(found: Folder) -> None:
    """Set the splits that `datasets` derives from the names, and name files in several of them. Case is ignored.

    `datasets` returns a pattern for all files if it finds no splits.
    """
    files = [file for file in found.files if not file.splits]

    def matching(pattern: str) -> list[str]:
        match = _matcher(pattern)
        names = [file.name for file in files if match(file.name)]
        if not names:
            raise FileNotFoundError(pattern)
        return names

    if not files:
        return
    patterns = _get_data_files_patterns(matching)
    if patterns == DEFAULT_PATTERNS_ALL:
        return
    for split, given in patterns.items():
        matches = [_matcher(pattern) for pattern in given]
        for file in files:
            file.splits |= {str(split)} if any(match(file.name) for match in matches) else set()
    if several := [f"{file.name}: {' and '.join(sorted(file.splits))}" for file in files if len(file.splits) > 1]:
        found.notes.append(f"{found.path}: by their names, some files are in several splits ({shown(several)})")


def _matcher(pattern: str) -> Callable[[str], object]:
    return re.compile(glob_translate(pattern), re.IGNORECASE).match


def _choice(found: Folder, splits: list[str], split: str, chosen: bool) -> str:
    example = f"{{path: {found.path}, split: {split if split in splits else splits[0]}}}"
    advice = f"Choose one, as in {example}, or read all files with split: {ALL}."
    others = [file.name for file in found.files if not file.splits]
    if others and not chosen:
        named = shown([file.name for file in found.files if file.splits])
        raise UserError(
            f"{found.path}: by their names, {named} are in the splits {', '.join(splits)}, "
            f"and {shown(others)} in none. {advice}"
        )
    if split in splits:
        return split
    if same := [name for name in splits if name.lower() == split.lower()]:
        return same[0]
    replaceable = not chosen and not found.missing and (_is_held_out(split) or not _is_held_out(splits[0]))
    if len(splits) == 1 and replaceable:
        found.notes.append(f"{found.path}: no split {split!r}; read the only one, {splits[0]!r}")
        return splits[0]
    raise UserError(f"{found.path}: no split {split!r}; found {', '.join(splits)}. {advice}")


def _is_held_out(split: str) -> bool:
    """Return whether a split is for validation or tests, by the words in its name: test, test_sft, eval."""
    words = set(re.split(r"[^a-z]+", split.lower()))
    return not words.isdisjoint(HELD_OUT) and "train" not in words


def _keep(found: Folder, split: str) -> None:
    _drop(found, [file for file in found.files if not file.splits], "no split")
    others = sorted({name for file in found.files for name in file.splits} - {split})
    for other in others:
        unread = [file for file in found.files if other in file.splits and split not in file.splits]
        _drop(found, unread, f"split {other}" if len(others) <= SHOWN else "other splits")


def _keep_once(found: Folder) -> None:
    """Drop further names of a file, such as links."""
    seen: set[tuple[int, int]] = set()
    again = []
    for file in found.files:
        state = os.stat(file.path) if file.path.exists() else None  # opening a broken link reports it
        identity = (state.st_dev, state.st_ino) if state else None
        if identity in seen:
            again.append(file)
        elif identity:
            seen.add(identity)
    _drop(found, again, AGAIN)


def _drop(found: Folder, files: list[DataFile], reason: str) -> None:
    dropped = set(map(id, files))  # a name may occur twice
    if files:
        found.passed_over[reason] += sorted(file.name for file in files)
        found.files = [file for file in found.files if id(file) not in dropped]
