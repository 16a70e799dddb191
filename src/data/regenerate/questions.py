"""The questions of a dataset, with ids that stay the same when more data is appended."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import BadRecord, UserError
from data.regenerate.conversation import Asked, Checker, Sample
from data.sources.chunks import RawRecord
from data.sources.kinds import declared
from data.sources.readers import Source, read_all
from data.sources.records import Conversation, parsed, questions
from data.sources.rejects import Reject, handle_rejects, printable, reject
from data.terminal import say


@dataclass(frozen=True)
class Questions:
    """The samples of a dataset, in order. Records are read again when they are asked, so memory holds only the ids."""

    sources: list[Source]
    asked: dict[tuple[int, int], list[Asked]]  # (source index, position) -> samples of the record

    def __len__(self) -> int:
        return sum(map(len, self.asked.values()))

    def samples(self) -> Iterator[Asked]:
        """Yield the identity of every sample."""
        return (asked for record in self.asked.values() for asked in record)

    def unanswered(self, is_finished: Callable[[Asked], bool], checker: Checker | None) -> Iterator[Sample]:
        """Yield the samples without an answer, ready to be asked.

        Args:
            is_finished: whether a sample has been answered.
            checker: checks every answer.
        """
        for number, source, raw in _numbered(self.sources):
            record = self.asked.get((number, raw.position), [])
            if any(not is_finished(asked) for asked in record):
                for asked, conversation in zip(record, raw.parse(tasks), strict=True):
                    if not is_finished(asked):
                        kind = source.kind or declared(raw.value)
                        yield Sample(asked.id, conversation.messages, conversation.tools, asked.digest, kind, checker)


def tasks(record: object) -> list[Conversation]:
    """Return what the target is asked for a record: its questions, answered turn by turn with the target's own history.

    The results of tools belong to the recorded calls. In a record with such results, the target is therefore asked for
    each answer to train on separately, after the recorded history.

    Raises:
        BadRecord: the record is not a valid conversation.
    """
    found = parsed(record)
    if all(message["role"] != "tool" for message in found.messages):
        return [questions(record)]
    ends = [
        turn
        for turn, message in enumerate(found.messages)
        if message["role"] == "assistant" and turn not in found.untrained
    ]
    if found.messages[-1]["role"] != "assistant":
        ends.append(len(found.messages))
    if not ends:
        raise BadRecord("no assistant turn to answer: weight or train excludes all of them")
    return [Conversation(found.messages[:end], found.tools) for end in ends]


def read_questions(sources: list[Source], bad_records: str, rejects: Path) -> Questions:
    """Identify all samples.

    A sample's id is the `id` field of its record, otherwise its file and line. If an earlier source has the same id,
    the source's label is put before it. With tool results, the number of the answer's turn follows. Invalid records,
    and those with an id that occurs twice in a source, are written to `rejects`.

    Raises:
        UserError: there are bad records and `bad_records` is "stop", or no record is usable.
    """
    asked: dict[tuple[int, int], list[Asked]] = {}
    first_use: dict[str, tuple[int, str]] = {}  # id -> source index, file and line
    labels, bad = _labels(sources), list[Reject]()
    for number, source, raw in _numbered(sources):
        try:
            conversations = raw.parse(tasks)
            parts = [f"#{len(c.messages) + 1}" if len(conversations) > 1 else "" for c in conversations]
            ids = _sample_ids(raw, labels[number], number, parts, first_use)
        except BadRecord as error:
            bad.append(reject(source, raw.position, str(error), raw.as_text()))
        else:
            first_use |= dict.fromkeys(ids, (number, source.reader.location(raw.position)))
            pairs = zip(ids, conversations, strict=True)
            asked[number, raw.position] = [Asked(name, _digest(c)) for name, c in pairs]
    total = len(asked) + len(bad)
    handle_rejects(bad, total, bad_records, rejects)
    if not asked:
        raise UserError(f"data.path contains no questions to answer. The rejected records are listed in {rejects}.")
    if bad:
        say(f"{len(bad):,} of {total:,} records are left out, listed in {rejects}")
    return Questions(sources, asked)


def _sample_ids(
    raw: RawRecord, label: str, number: int, parts: list[str], first_use: dict[str, tuple[int, str]]
) -> list[str]:
    given = raw.value.get("id")
    found = f"{label}:{raw.position}" if given is None else str(given)
    if printable(found) != found:
        raise BadRecord("the id contains a lone surrogate, which is not valid Unicode")
    ids = [found + part for part in parts]
    if any(name in first_use and first_use[name][0] != number for name in ids):
        ids = [f"{label}:{name}" for name in ids]
    if used := [name for name in ids if name in first_use]:
        raise BadRecord(f"duplicate id {used[0]!r}, first used at {first_use[used[0]][1]}")
    return ids


def _labels(sources: list[Source]) -> list[str]:
    """Return a distinct label per source. The first of several sources with the same label keeps it."""
    found: list[str] = []
    for source in sources:
        label, number = source.reader.label, 1
        while label in found:
            number += 1
            label = f"{number}/{source.reader.label}"
        found.append(label)
    return found


def _numbered(sources: list[Source]) -> Iterator[tuple[int, Source, RawRecord]]:
    return ((number, source, raw) for number, source in enumerate(sources) for _, raw in read_all([source]))


def _digest(conversation: Conversation) -> str:
    content = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
