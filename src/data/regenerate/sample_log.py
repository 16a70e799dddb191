"""Finished samples: an append-only log, and the files of an earlier run. A kill neither loses nor repeats samples."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.errors import UserError
from data.regenerate.conversation import IN_PART, KEPT, Asked

FORMER_ID = "former_id"  # in an entry of the log that replaces one with the same question and another id


class Stored(NamedTuple):
    """Location of a finished sample, and what is needed to decide whether it is still valid."""

    file: Path
    start: int  # byte offset of its line
    size: int  # length of its line in bytes
    outcome: str


class SampleLog:
    """A JSONL log of finished samples in completion order, indexed by sample id and question.

    Samples in the output and dropped files of an earlier run count as finished as well. `assign` finds the finished
    sample of each question. It may have another id: line numbers change when lines are removed or inserted.
    """

    def __init__(self, path: Path, earlier: Iterable[Path] = ()) -> None:
        """Index the earlier files, then the log. The log is created with its first entry.

        An incomplete last line of the log, left by a kill, is removed: its sample counts as unfinished. Entries of the
        log replace earlier ones with the same id and question. Blank lines are skipped, and the last line of an earlier
        file needs no newline.

        Raises:
            UserError: a line is not a finished sample, e.g. because the file was edited.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.offsets: dict[Asked, Stored] = {}
        self.assigned: dict[Asked, Asked] = {}  # question -> key of its finished sample
        for file in earlier:
            if file.exists():
                self._index(file)
        self._end = 0
        if path.exists():
            self._end = self._index(path, appended=True)
            os.truncate(path, self._end)
        self._file: IO[bytes] | None = None

    def _index(self, file: Path, *, appended: bool = False) -> int:
        """Index the lines of a file and return the offset of their end. If `appended`, stop at an incomplete line."""
        end = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if appended and not line.endswith(b"\n"):
                    break
                try:
                    if line.strip():
                        entry = json.loads(line)
                        key = Asked(entry["id"], entry.get("digest"))
                        check_entry(entry)
                        self.offsets.pop(Asked(entry.get(FORMER_ID), key.digest), None)
                        self.offsets[key] = Stored(file, end, len(line), outcome_of(entry))
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    fix = "delete it" if appended else "set overwrite=true"
                    raise UserError(
                        f"{file}:{number}: expected a sample written by this command "
                        f"({type(error).__name__}: {error}). Restore the file, or {fix} to start over."
                    ) from error
                end += len(line)
        return end

    def assign(self, samples: Iterable[Asked]) -> None:
        """Assign a finished sample to each question: the one with its id, or an unused one of the same question."""
        samples = list(samples)
        self.assigned = {asked: asked for asked in samples if asked in self.offsets}
        unused: dict[str | None, list[Asked]] = defaultdict(list)
        for key in reversed(self.offsets):
            if key not in self.assigned and key.digest is not None:
                unused[key.digest].append(key)
        for asked in samples:
            if asked not in self.assigned and unused.get(asked.digest):
                self.assigned[asked] = unused[asked.digest].pop()

    def has(self, asked: Asked) -> bool:
        """Return whether a question has a finished sample."""
        return asked in self.assigned

    def unassigned(self) -> list[Asked]:
        """Return the keys of the kept samples that belong to no question."""
        used = set(self.assigned.values())
        return [key for key, stored in self.offsets.items() if key not in used and is_kept(stored.outcome)]

    def most_common_outcomes(self, limit: int) -> list[str]:
        """Return the most frequent outcomes, each after its count."""
        counts = Counter(stored.outcome for stored in self.offsets.values())
        return [f"{count:,} {outcome:.200}" for outcome, count in counts.most_common(limit)]

    def kept(self) -> int:
        """Return the number of samples with an answer that was kept."""
        return sum(is_kept(stored.outcome) for stored in self.offsets.values())

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, sample_id: str, entry: dict[str, Any]) -> None:
        """Append a finished sample. If the write is incomplete, truncate the file to its previous end.

        Args:
            sample_id: id of the sample.
            entry: the sample's `digest`, `outcome`, messages and so on.

        Raises:
            ValueError: the sample is already in the log.
            UserError: the write failed, e.g. because the disk is full.
        """
        key = Asked(sample_id, entry.get("digest"))
        if key in self.offsets:
            raise ValueError(f"sample {sample_id!r} is already in the log")
        line = json.dumps({"id": sample_id, **entry}, ensure_ascii=False).encode() + b"\n"
        self._append(key, line, outcome_of(entry))
        self.assigned[key] = key

    def secure(self, file: Path, samples: Iterable[Asked]) -> None:
        """Append the samples to the log that are in an earlier file, before it is replaced, or have another id.

        Each entry has the id of its question, as in the output, and names the former id, whose entry it replaces.

        Raises:
            UserError: the write failed, e.g. because the disk is full.
        """
        moved = [asked for asked in samples if self._moves(asked, file)]
        for asked, entry in zip(moved, self.read([self.assigned[asked] for asked in moved]), strict=True):
            former = self.assigned[asked]
            entry |= {"id": asked.id} | ({} if former == asked else {FORMER_ID: former.id})
            self._append(asked, json.dumps(entry, ensure_ascii=False).encode() + b"\n", outcome_of(entry))
            self.assigned[asked] = asked
            if former != asked:
                del self.offsets[former]

    def _moves(self, asked: Asked, file: Path) -> bool:
        key = self.assigned[asked]
        stored = self.offsets[key]
        return stored.file == file or (stored.file == self.path and key != asked)

    def _append(self, key: Asked, line: bytes, outcome: str) -> None:
        try:
            # Unbuffered: every finished sample reaches the operating system immediately.
            self._file = self._file or self.path.open("ab", buffering=0)
            written = self._file.write(line)
        except OSError:
            written = 0
        if written != len(line):
            if self.path.exists():
                os.truncate(self.path, self._end)
            raise UserError(
                f"{self.path}: write failed; is the disk full? All samples written so far are intact. Free up space "
                "and run the same command to resume."
            )
        self.offsets[key] = Stored(self.path, self._end, len(line), outcome)
        self._end += len(line)

    def read(self, keys: Iterable[Asked]) -> Iterator[dict[str, Any]]:
        """Yield the entries with the given keys, in order."""
        files = {file: file.open("rb") for file in {stored.file for stored in self.offsets.values()}}
        try:
            for key in keys:
                stored = self.offsets[key]
                files[stored.file].seek(stored.start)
                yield json.loads(files[stored.file].read(stored.size))
        finally:
            for file in files.values():
                file.close()

    def remove(self) -> None:
        """Close and delete the log. The earlier files stay."""
        if self._file:
            self._file.close()
        self.path.unlink(missing_ok=True)


def check_entry(entry: dict[str, Any]) -> None:
    """Check the types of an entry that the log, the output or the dropped file holds.

    Raises:
        LookupError, TypeError: an entry has no id, or a kept one no answer.
    """
    if not isinstance(entry["id"], str):
        raise TypeError(f"id={entry['id']!r}")
    if not is_kept(outcome_of(entry)):
        return
    messages = entry.get("messages")
    if not isinstance(messages, list) or "assistant" not in [message["role"] for message in messages]:
        raise TypeError("messages: expected a list with an answer")
    if not isinstance(entry.get("unverified", 0), int):
        raise TypeError(f"unverified={entry['unverified']!r}")


def outcome_of(entry: dict[str, Any]) -> str:
    """Return the outcome of an entry of the log, the output or the dropped file."""
    if outcome := entry.get("outcome") or entry.get("reason"):
        return str(outcome)
    return f"{IN_PART}: {entry['ended_early']}" if entry.get("ended_early") else KEPT


def is_kept(outcome: str) -> bool:
    """Return whether an outcome belongs to a sample in the output."""
    return outcome == KEPT or outcome.startswith(IN_PART)
