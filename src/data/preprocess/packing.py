"""Packs documents into fixed-length rows."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.batch import PADDING_DOCUMENT
from data.preprocess.document import Document


@dataclass
class Row:
    """A packed row. All arrays have shape [T]."""

    input_ids: np.ndarray  # int64
    position_ids: np.ndarray  # int64, restarting at 0 for each document
    document_ids: np.ndarray  # int64, PADDING_DOCUMENT for padding
    supervised: np.ndarray  # bool


def best_fit(lengths: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Assign documents to rows of at most `max_seq_len` tokens. Return the row index of each document.

    Best-fit decreasing: documents are placed longest first (ties by index), each into the fullest row with enough room.

    Raises:
        ValueError: a document is longer than a row.
    """
    rows = np.empty(len(lengths), np.int32)
    open_rows: dict[int, list[int]] = {}  # remaining room in tokens -> rows
    rooms: list[int] = []  # sorted keys of `open_rows`; at most `max_seq_len` entries
    count = 0
    for i in np.argsort(-lengths, kind="stable"):  # no `tolist`: a list of Python ints takes more memory
        length = int(lengths[i])
        if length > max_seq_len:
            raise ValueError(f"document {i} has {length} tokens; expected at most max_seq_len={max_seq_len}")
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row = max_seq_len, count
            count += 1
        rows[i] = row
        left = room - length
        if left not in open_rows:
            open_rows[left] = []
            insort(rooms, left)
        open_rows[left].append(row)
    return rows


class PackedRows(Sequence[Row]):
    """Packed rows, assembled on access. Each document appears once; only the row assignment is held in memory."""

    def __init__(self, documents: Sequence[Document], lengths: np.ndarray, max_seq_len: int, pad_id: int) -> None:
        """Compute the row assignment from `lengths`, the token counts of `documents`, without reading any document."""
        self.documents, self.max_seq_len, self.pad_id = documents, max_seq_len, pad_id
        rows = best_fit(lengths, max_seq_len)
        self._members = np.argsort(rows, kind="stable")  # document indices, grouped by row
        self._edges = np.searchsorted(rows[self._members], np.arange(rows.max(initial=-1) + 2))
        self.tokens = int(lengths.sum())
        # Number of (query, key) pairs in causal attention within documents.
        self.pairs = int((lengths.astype(np.int64) * (lengths.astype(np.int64) + 1)).sum()) // 2

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices: rows are assembled one at a time
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        members = self._members[self._edges[index] : self._edges[index + 1]]
        return fill([self.documents[i] for i in members.tolist()], self.max_seq_len, self.pad_id)

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sum per-document values [documents] within each row. Return the sums [rows]."""
        return np.add.reduceat(values[self._members], self._edges[:-1]) if len(self) else np.zeros(0, np.int64)

    def prompts(self, limit: int, max_tokens: int) -> list[list[int]]:
        """Return up to `limit` prompts, each the tokens before the first supervised token in a document.

        Empty prompts and those longer than `max_tokens` are skipped. Documents are visited in their shuffled order, not
        in row order, because the first rows hold the longest documents.
        """
        prompts: list[list[int]] = []
        for i in range(len(self.documents)):
            if len(prompts) == limit:
                break
            document = self.documents[i]
            tokens = document.input_ids[: int(np.argmax(document.supervised))]
            if 0 < len(tokens) <= max_tokens:
                prompts.append(tokens.tolist())
        return prompts

    def efficiency(self) -> float:
        """Return the packing efficiency: the fraction of tokens that are not padding."""
        return self.tokens / max(1, len(self) * self.max_seq_len)


def pack_documents(documents: Sequence[Document], max_seq_len: int, pad_id: int) -> PackedRows:
    """Pack documents, reading their lengths from the documents themselves."""
    return PackedRows(documents, np.array([len(d.input_ids) for d in documents], np.int32), max_seq_len, pad_id)


def fill(documents: list[Document], max_seq_len: int, pad_id: int) -> Row:
    """Concatenate documents into one row, padded at the end with `pad_id`."""
    row = Row(
        input_ids=np.full(max_seq_len, pad_id, np.int64),
        position_ids=np.zeros(max_seq_len, np.int64),
        document_ids=np.full(max_seq_len, PADDING_DOCUMENT, np.int64),
        supervised=np.zeros(max_seq_len, bool),
    )
    start = 0
    for number, document in enumerate(documents):
        end = start + len(document.input_ids)
        row.input_ids[start:end] = document.input_ids
        row.position_ids[start:end] = np.arange(end - start)
        row.document_ids[start:end] = number
        row.supervised[start:end] = document.supervised
        start = end
    return row
