"""Writes the output and the dropped file of a finished run."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data.errors import UserError
from data.regenerate.conversation import IN_PART, KEPT, Asked, Sample, beside
from data.regenerate.sample_log import FORMER_ID, SampleLog, is_kept, outcome_of

REMOVED = "no longer in data.path"
STATE = {"outcome", "tokens", "reason", "ended_early", FORMER_ID}  # keys of an entry that depend on the file


def dropped_file(output: Path) -> Path:
    """Return the path of the file that lists dropped samples with their reasons."""
    return beside(output, ".dropped.jsonl")


def entry_of(sample: Sample) -> dict[str, Any]:
    """Return the log entry of a finished sample, without its id."""
    unverified = {"unverified": sample.unverified} if sample.unverified else {}
    head = {"digest": sample.digest, "outcome": sample.outcome, "tokens": sample.tokens}
    return {**head, **unverified, **sample.record()}


@dataclass
class Summary:
    """Counts of a finished run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    by_ids: int = 0  # answers kept as token ids
    as_text: int = 0
    unverified: int = 0  # of these, answers that may read back as other tokens
    truncated: int = 0
    removed: int = 0  # samples that are no longer in the data

    def count(self, entry: dict[str, Any], outcome: str) -> None:
        """Count a sample."""
        self.outcomes[outcome.partition(":")[0]] += 1
        if not is_kept(outcome):
            return
        answers = [m for m in entry["messages"] if m["role"] == "assistant" and m.get("train", True)]
        known = sum("token_ids" in answer for answer in answers)
        self.by_ids, self.as_text = self.by_ids + known, self.as_text + len(answers) - known
        self.unverified += entry.get("unverified", 0)
        self.truncated += sum(bool(answer.get("truncated")) for answer in answers)

    @property
    def kept(self) -> int:
        """Number of samples in the output."""
        return self.outcomes[KEPT] + self.outcomes[IN_PART]

    def describe(self) -> str:
        """Return a sentence on the samples and one on the answers in the output."""
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in self.outcomes.items())
        text = f"{self.outcomes.total():,} conversations: {outcomes}\n{self.by_ids + self.as_text:,} answers: "
        parts = [f"{self.by_ids:,} as token ids"] if self.by_ids else []
        if self.as_text:
            read_back = self.as_text - self.unverified
            parts.append(
                f"{self.as_text:,} as text, of which {read_back:,} read back as the number of tokens that the server "
                f"counted and {self.unverified:,} cannot be verified"
            )
        cut_off = f"; {self.truncated:,} of them cut off at the token limit" if self.truncated else ""
        return text + ("; ".join(parts) or "none") + cut_off


def write_output(log: SampleLog, samples: list[Asked], output: Path) -> Summary:
    """Write kept and dropped samples to separate files, in the order of `samples`, and return the counts.

    Kept samples of removed or changed questions go to the dropped file, from where they can be used again.

    Raises:
        UserError: a write failed, e.g. because the disk is full. The log and the earlier files have every sample.
    """
    files = [output, dropped_file(output)]
    temporary = [file.with_suffix(file.suffix + ".tmp") for file in files]
    try:
        with temporary[0].open("w", encoding="utf-8") as kept, temporary[1].open("w", encoding="utf-8") as dropped:
            summary = _write_all(log, samples, kept, dropped)
        # A kill between the two replacements loses no sample: those that leave the dropped file are in the log, and
        # those that leave the output are in the new dropped file.
        log.secure(files[1], samples)
        for new, file in reversed(list(zip(temporary, files, strict=True))):
            os.replace(new, file)
    except OSError as error:
        raise UserError(
            f"{output}: write failed ({error}). All samples written so far are intact. Free up space and run the same "
            "command to resume."
        ) from error
    return summary


def _write_all(log: SampleLog, samples: list[Asked], kept: IO[str], dropped: IO[str]) -> Summary:
    summary = Summary()
    for asked, entry in zip(samples, log.read(log.assigned[asked] for asked in samples), strict=True):
        outcome = outcome_of(entry)
        summary.count(entry, outcome)
        _write(kept if is_kept(outcome) else dropped, {**entry, "id": asked.id}, outcome)
    for entry in log.read(log.unassigned()):
        state = {"outcome": outcome_of(entry), "reason": REMOVED}  # the outcome is needed to use the sample again
        content = {key: value for key, value in entry.items() if key != FORMER_ID}
        dropped.write(json.dumps({**content, **state}, ensure_ascii=False) + "\n")
        summary.removed += 1
    return summary


def _write(file: IO[str], entry: dict[str, Any], outcome: str) -> None:
    content = {key: value for key, value in entry.items() if key not in STATE}
    if outcome.startswith(IN_PART):
        content["ended_early"] = outcome.removeprefix(f"{IN_PART}: ")
    elif outcome != KEPT:
        content["reason"] = outcome
    file.write(json.dumps(content, ensure_ascii=False) + "\n")
