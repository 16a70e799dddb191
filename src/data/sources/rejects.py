"""Handles bad records: lists them in a file, then stops the run or skips them."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from data.errors import UserError
from data.sources.readers import Source

TEXT_CHARACTERS = 2000  # length limit for each record in the rejects file
SHOWN = 5  # maximum number of bad records in the error message; the file lists all


class Reject(TypedDict):
    """An entry in the rejects file."""

    file: str
    line: int  # 1-based line number or 0-based row index
    where: str  # file and line
    reason: str
    record: str  # the record's first TEXT_CHARACTERS characters


def reject(source: Source, position: int, reason: str, text: str) -> Reject:
    """Return the entry for a bad record in the rejects file."""
    return {
        "file": source.reader.name,
        "line": position,
        "where": source.reader.location(position),
        "reason": printable(reason),
        "record": text[:TEXT_CHARACTERS],
    }


def printable(text: str) -> str:
    """Escape lone surrogates, which error messages may quote from a record."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def common_reasons(rejects: Iterable[Reject], limit: int) -> list[tuple[str, int, str]]:
    """Return the `limit` most frequent reasons, ignoring numbers, each with its count and first location."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for entry in rejects:
        reason = re.sub(r"^turn \d+: |\d[\d,]*", "", entry["reason"].partition(";")[0])
        counts[reason] += 1
        first.setdefault(reason, entry["where"])
    return [(reason, count, first[reason]) for reason, count in counts.most_common(limit)]


def handle_rejects(
    rejects: Iterable[Reject], total: int, policy: str, file: Path, also_listed: Iterable[Reject] = ()
) -> None:
    """Write all entries to `file`, or delete the file if there are none.

    Args:
        rejects: entries for bad records.
        total: total number of records, valid or not; shown in the error message.
        policy: `data.bad_records`.
        file: the rejects file.
        also_listed: entries for records that are only partly usable.

    Raises:
        UserError: `rejects` is not empty, and `policy` is "stop"; or the file cannot be written.
    """
    shown: list[str] = []
    try:
        count = _write(rejects, also_listed, file, shown)
    except OSError as error:
        raise UserError(
            f"{file}: write failed ({error.strerror or error}). Free up space or correct the permissions, and run the "
            "same command again."
        ) from error
    if count and policy == "stop":
        raise UserError(
            f"{count:,} of {total:,} records in data.path are invalid:\n"
            + "\n".join(shown + (["  ..."] if count > SHOWN else []))
            + f"\nFull list: {file}. Fix the records, or set data.bad_records=skip to skip them."
        )


def _write(rejects: Iterable[Reject], also_listed: Iterable[Reject], file: Path, shown: list[str]) -> int:
    """Write the file, or delete it if there are no entries. Return the number of `rejects`.

    Args:
        shown: receives the lines for the error message.
    """
    temporary, count = file.with_suffix(f".{os.getpid()}.tmp"), 0
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as out:
            for count, entry in enumerate(rejects, start=1):
                shown += [f"  {entry['where']}: {entry['reason']}"] if count <= SHOWN else []
                out.write(json.dumps(entry) + "\n")
            for entry in also_listed:
                out.write(json.dumps(entry) + "\n")
            empty = not out.tell()
        if empty:
            file.unlink(missing_ok=True)  # stale: left by an earlier run
        else:
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return count
