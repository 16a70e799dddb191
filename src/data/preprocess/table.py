"""Table of tokenized records: one row per document. A record without a usable document has one row without tokens."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Features, List, Value

from data.errors import BadRecord
from data.preprocess.anchors import anchor_indices
from data.preprocess.boundaries import AnswerDocument
from data.preprocess.chat_template import ChatEncoder, Rendered
from data.preprocess.document import Document
from data.preprocess.spans import CUT_OFF, NO_END_TOKEN, OTHER_END_TOKEN, REASONING_DROPPED, TEXT_DROPPED
from data.sources.chunks import RawRecord
from data.sources.records import Conversation, conversation
from data.sources.rejects import TEXT_CHARACTERS, printable

OUTCOMES = ("kept", "truncated", "too long", "no anchor", "bad")  # possible outcomes of a record
KEPT, TRUNCATED, TOO_LONG, NO_ANCHOR, BAD = range(len(OUTCOMES))
NOTES = {
    "no_end": NO_END_TOKEN,
    "other_end": OTHER_END_TOKEN,
    "no_reasoning": REASONING_DROPPED,
    "cut_off": CUT_OFF,
    "no_text": TEXT_DROPPED,
}
FEATURES = Features(
    part=Value("int32"),  # index of the source
    place=Value("int64"),  # line number or row index in the source
    outcome=Value("int8"),  # index into OUTCOMES
    document=Value("int32"),  # index of the document within its record
    reason=Value("string"),  # error message for a bad record, or for the first refused answer
    raw=Value("string"),  # first TEXT_CHARACTERS characters of a record that has a reason
    digest=Value("int64"),  # hash of the messages, to find duplicates
    # Answer counts. `supervised_answers` and `by_ids` are per document; the others are per record and 0 in all but its
    # first row.
    answers=Value("int32"),
    refused=Value("int32"),
    untrained=Value("int32"),  # excluded by the record
    skipped=Value("int32"),  # before the first question; not included in `answers`
    **{name: Value("int32") for name in NOTES},
    supervised_answers=Value("int32"),
    by_ids=Value("int32"),  # of these, answers whose text reads back as other tokens than the target wrote
    turns=List(Value("int32")),  # message index of each supervised answer of the document
    turn_tokens=List(Value("int32")),  # number of its supervised tokens
    tokens=Value("int32"),  # document length before truncation; a record's first row also counts dropped documents
    anchors=Value("int32"),  # number of valid anchors
    longest=Value("int32"),  # length of the longest answer in tokens
    input_ids=List(Value("int32")),
    supervised=List(Value("bool")),
)
NO_TOKENS = Document(np.zeros(0, np.int32), np.zeros(0, bool))


@dataclass(frozen=True)
class TokenizeSettings:
    """The settings that affect the tokens, apart from the records and the encoder."""

    max_seq_len: int
    truncation: str  # turn: keep the leading turns that fit; token: cut at max_seq_len; drop: skip the conversation


@dataclass
class Fitted:
    """A document truncated to the row length."""

    document: Document
    answers: dict[int, int]  # number of tokens of each supervised answer, by message index
    tokens: int  # number of tokens before truncation
    anchors: int  # number of valid anchors
    by_ids: bool = False  # see `AnswerDocument`


def table_rows(
    records: Iterator[RawRecord], part: int, encoder: ChatEncoder, settings: TokenizeSettings
) -> Iterator[dict[str, Any]]:
    """Yield the table rows for records from the source with index `part`."""
    parsed = [(record, *_render(record, encoder, settings)) for record in records]
    documents = iter(encoder.tokenize([rendered for *_, rendered in parsed if isinstance(rendered, Rendered)]))
    for record, digest, rendered in parsed:
        shared = {"part": part, "place": record.position, "digest": digest, "reason": "", "raw": ""}
        if isinstance(rendered, str):
            yield shared | _rejected(record, rendered) | _counts(None) | _content(0, None)
        else:
            yield from (shared | row for row in _rows(record, rendered, next(documents), settings))


def _render(record: RawRecord, encoder: ChatEncoder, settings: TokenizeSettings) -> tuple[int, Rendered | str]:
    """Parse and render a record. Return the messages' digest and the rendering, or (0, reason) for a bad record."""
    try:
        parsed = record.parse(conversation)
        return _digest(parsed), encoder.render(parsed, settings.max_seq_len)
    except BadRecord as error:
        return 0, str(error)


def _rows(
    record: RawRecord, rendered: Rendered, documents: list[AnswerDocument], settings: TokenizeSettings
) -> Iterator[dict[str, Any]]:
    refused = rendered.supervision.refused
    reasons = [f"turn {number + rendered.offset}: {reason}" for number, reason in refused.items()]
    first = _counts(rendered)
    if reasons:
        first |= _rejected(record, reasons[0])
    if refused and len(refused) == rendered.answers - rendered.untrained:
        yield first | _content(0, None)
        return
    fitted = fit_to_row(documents, rendered, settings)
    kept = [document for document in fitted if document and document.anchors]
    lengths = [len(document.document.input_ids) for document in documents]
    total = sum(lengths) + max(0, rendered.tokens - max(lengths, default=0))
    outcome = _outcome(kept, fitted, total)
    first |= {"outcome": outcome}
    if not kept:
        yield first | _content(0, None) | {"tokens": total}
    for index, document in enumerate(kept):
        counts = first if index == 0 else _counts(None) | {"outcome": outcome}
        dropped = total - sum(document.tokens for document in kept) if index == 0 else 0
        row = counts | _content(index, document)
        yield row | {"tokens": row["tokens"] + dropped}


def fit_to_row(documents: list[AnswerDocument], rendered: Rendered, settings: TokenizeSettings) -> list[Fitted | None]:
    """Truncate a record's documents to the row length. The result has None for each document that must be dropped."""
    limit = settings.max_seq_len
    too_long = rendered.left_out or any(len(document.document.input_ids) > limit for document in documents)
    if settings.truncation == "drop" and too_long:
        return [None for _ in documents]
    return [_truncate(document, limit, settings.truncation) for document in documents]


def _truncate(document: AnswerDocument, limit: int, truncation: str) -> Fitted | None:
    """Cut a document after the last answer that fits (turn) or at the limit (token), if it is too long."""
    tokens = len(document.document.input_ids)
    end = min(tokens, limit)
    if truncation == "turn" and tokens > limit:
        end = max((answer.after for answer in document.answers if answer.after <= limit), default=0)
    if not end:
        return None
    answers = {answer.turn: min(answer.end, end) - answer.start for answer in document.answers if answer.start < end}
    cut = Document(document.document.input_ids[:end], document.document.supervised[:end])
    return Fitted(cut, answers, tokens, num_anchors(cut), document.by_ids)


def _outcome(kept: list[Fitted], fitted: list[Fitted | None], total: int) -> int:
    if not kept:
        return NO_ANCHOR if any(fitted) else TOO_LONG
    return KEPT if sum(len(document.document.input_ids) for document in kept) == total else TRUNCATED


def _rejected(record: RawRecord, reason: str) -> dict[str, Any]:
    return {"outcome": BAD, "reason": printable(reason), "raw": record.as_text()[:TEXT_CHARACTERS]}


def _counts(rendered: Rendered | None) -> dict[str, int]:
    """Return a record's answer counts, or zeros if `rendered` is None."""
    if rendered is None:
        return dict.fromkeys(("answers", "refused", "untrained", "skipped", *NOTES), 0)
    notes = {name: rendered.supervision.notes[note] for name, note in NOTES.items()}
    return {
        "answers": rendered.answers,
        "refused": len(rendered.supervision.refused),
        "untrained": rendered.untrained,
        "skipped": rendered.skipped,
        **notes,
    }


def _content(index: int, fitted: Fitted | None) -> dict[str, Any]:
    document, answers = (fitted.document, fitted.answers) if fitted else (NO_TOKENS, {})
    return {
        "document": index,
        "supervised_answers": len(answers),
        "by_ids": len(answers) if fitted and fitted.by_ids else 0,
        "turns": list(answers),
        "turn_tokens": list(answers.values()),
        "tokens": fitted.tokens if fitted else 0,
        "anchors": fitted.anchors if fitted else 0,
        "longest": max(answers.values(), default=0),
        "input_ids": document.input_ids,
        "supervised": document.supervised,
    }


def num_anchors(document: Document) -> int:
    """Return the number of valid anchors of a document."""
    return len(anchor_indices(document.supervised, np.arange(len(document.supervised))))


def _digest(parsed: Conversation) -> int:
    hashed = [parsed.messages, parsed.tools] if parsed.tools else parsed.messages
    content = json.dumps(hashed, ensure_ascii=False, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
