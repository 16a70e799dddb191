"""Pack documents into rows of one length."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from data.batch import PADDING_DOCUMENT
from data.chat import Document


@dataclass
class Row:
    """One packed row; arrays of length T."""

    input_ids: np.ndarray  # int64
    position_ids: np.ndarray  # int64, restarting at 0 with every document
    document_ids: np.ndarray  # int64, PADDING_DOCUMENT for padding
    supervised: np.ndarray  # bool


def best_fit(lengths: list[int], row_length: int) -> list[list[int]]:
    """Groups of indices whose lengths add up to at most `row_length`: best fit, longest first, ties by index."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(i)
        insort(room, (left - lengths[i], row))
    return rows


def pack_documents(documents: list[Document], row_length: int, pad_id: int) -> list[Row]:
    """Rows that hold every document once; a document longer than a row is cut at the row's end."""
    lengths = [min(len(d.input_ids), row_length) for d in documents]
    return [_fill([documents[i] for i in group], row_length, pad_id) for group in best_fit(lengths, row_length)]


def _fill(documents: list[Document], row_length: int, pad_id: int) -> Row:
    row = Row(
        input_ids=np.full(row_length, pad_id, np.int64),
        position_ids=np.zeros(row_length, np.int64),
        document_ids=np.full(row_length, PADDING_DOCUMENT, np.int64),
        supervised=np.zeros(row_length, bool),
    )
    start = 0
    for number, document in enumerate(documents):
        n = min(len(document.input_ids), row_length)
        here = slice(start, start + n)
        row.input_ids[here] = document.input_ids[:n]
        row.position_ids[here] = np.arange(n)
        row.document_ids[here] = number
        row.supervised[here] = document.supervised[:n]
        start += n
    return row
