"""Append-only log of finished samples. No sample is lost or repeated, even if the process is killed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError


class SampleLog:
    """A JSONL log of finished samples in completion order, indexed by sample id."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Remove an incomplete last line left by a kill: its sample counts as unfinished."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.offsets: dict[str, tuple[int, int]] = {}  # id -> (byte offset, length) of its line
        end = 0
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self.offsets[json.loads(line)["id"]] = (end, len(line))
                    end += len(line)
            os.truncate(path, end)
        # Unbuffered: every finished sample reaches the operating system immediately.
        self._file = path.open("ab", buffering=0)
        self._end = end

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self.offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, sample_id: str, entry: dict[str, Any]) -> None:
        """Append a finished sample. If the write is incomplete, truncate the file to its previous end.

        Raises:
            ValueError: the sample is already in the log.
            UserError: the write failed, e.g. because the disk is full.
        """
        if sample_id in self:
            raise ValueError(f"sample {sample_id!r} is already in the log")
        line = json.dumps({"id": sample_id, **entry}, ensure_ascii=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError:
            written = 0
        if written != len(line):
            os.truncate(self.path, self._end)
            raise UserError(
                f"{self.path}: write failed; is the disk full? All samples written so far are intact. Free up space "
                "and run the same command to resume."
            )
        self.offsets[sample_id] = (self._end, len(line))
        self._end += len(line)

    def read(self, ids: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the log entries for the given sample ids, in order."""
        with self.path.open("rb") as file:
            for sample_id in ids:
                start, size = self.offsets[sample_id]
                file.seek(start)
                yield json.loads(file.read(size))

    def remove(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self.path.unlink()
