"""Handling of bad records: list them in a file, then stop or skip them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.sources.readers import RawRecord, Source

RAW_CHARACTERS = 2000  # per bad record in the rejects file
SHOWN = 5  # bad records in the error message; the file lists all


def reject(source: Source, found: RawRecord, reason: str) -> dict[str, Any]:
    """Return one entry of the rejects file."""
    where, raw = source.reader.where(found.place), found.raw()[:RAW_CHARACTERS]
    return {"file": source.reader.name, "line": found.place, "where": where, "reason": printable(reason), "record": raw}


def printable(text: str) -> str:
    """Escape lone surrogates, which reasons may quote from records."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def refuse_bad(bad: Iterable[dict[str, Any]], total: int, policy: str, file: Path) -> None:
    """Write bad records to `file` with location, reason and start of each. If there are none, delete the file.

    Raises:
        UserError: bad records exist and `policy` is "stop".
    """
    temporary, count, first = file.with_suffix(f".{os.getpid()}.tmp"), 0, []
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as out:
        for count, reject in enumerate(bad, start=1):
            first += [f"  {reject['where']}: {reject['reason']}"] if count <= SHOWN else []
            out.write(json.dumps(reject) + "\n")
    if not count:
        temporary.unlink()
        file.unlink(missing_ok=True)  # stale: left by an earlier run
        return
    temporary.replace(file)
    if policy == "stop":
        raise UserError(
            f"{count:,} of {total:,} records in data.path cannot be used:\n"
            + "\n".join(first + (["  ..."] if count > SHOWN else []))
            + f"\nAll of them are in {file}. Mend them, or set data.bad_records=skip to go on without them."
        )
