"""Handling of bad records: list them in a file, then stop or skip them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from data.errors import UserError
from data.sources.readers import Source

TEXT_CHARACTERS = 2000  # per bad record in the rejects file
SHOWN = 5  # bad records in the error message; the file lists all


class Reject(TypedDict):
    """An entry of the rejects file."""

    file: str
    line: int  # line number from 1, or row index from 0
    where: str  # file and line
    reason: str
    record: str  # up to TEXT_CHARACTERS of the record


def reject(source: Source, position: int, reason: str, text: str) -> Reject:
    """Return the entry of a bad record for the rejects file."""
    return {
        "file": source.reader.name,
        "line": position,
        "where": source.reader.location(position),
        "reason": printable(reason),
        "record": text[:TEXT_CHARACTERS],
    }


def printable(text: str) -> str:
    """Escape lone surrogates, which reasons may quote from records."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def handle_rejects(rejects: Iterable[Reject], total: int, policy: str, file: Path) -> None:
    """Write the rejects of `total` records to `file`. If there are none, delete the file.

    Raises:
        UserError: there are rejects, and `policy` is "stop".
    """
    temporary, count = file.with_suffix(f".{os.getpid()}.tmp"), 0
    shown: list[str] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as out:
        for count, entry in enumerate(rejects, start=1):
            shown += [f"  {entry['where']}: {entry['reason']}"] if count <= SHOWN else []
            out.write(json.dumps(entry) + "\n")
    if not count:
        temporary.unlink()
        file.unlink(missing_ok=True)  # stale: left by an earlier run
        return
    temporary.replace(file)
    if policy == "stop":
        raise UserError(
            f"{count:,} of {total:,} records in data.path are invalid:\n"
            + "\n".join(shown + (["  ..."] if count > SHOWN else []))
            + f"\nFull list: {file}. Fix these records, or set data.bad_records=skip to skip them."
        )
