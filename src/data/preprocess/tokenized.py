"""Parallel tokenization of records, cached on disk under a fingerprint of everything that affects the tokens."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as compute
from datasets import Dataset, Features, List, Value, concatenate_datasets
from filelock import FileLock, Timeout

from data.errors import BadRecord
from data.preprocess.anchors import anchor_indices
from data.preprocess.chat_template import ChatEncoder, Document, Rendered
from data.sources.readers import Chunk, Source, fingerprint
from data.sources.records import Messages, conversation
from data.sources.rejects import TEXT_CHARACTERS, Reject, printable, reject

OUTCOMES = ("kept", "truncated", "too long", "no anchor", "bad")  # outcome of a record
KEPT, TRUNCATED, TOO_LONG, NO_ANCHOR, BAD = range(len(OUTCOMES))
FEATURES = Features(
    part=Value("int32"),  # index of the source
    place=Value("int64"),  # line number or row index in its source
    outcome=Value("int8"),  # index into OUTCOMES
    reason=Value("string"),  # error message of a bad record
    raw=Value("string"),  # start of a bad record, up to TEXT_CHARACTERS
    tokens=Value("int32"),  # length of the conversation before truncation
    anchors=Value("int32"),  # number of valid anchors
    longest=Value("int32"),  # length of the longest answer in tokens
    digest=Value("int64"),  # hash of the messages, to find duplicates
    input_ids=List(Value("int32")),
    supervised=List(Value("bool")),
)
# Modules that determine the table. Their text is part of the cache key.
CODE = ("preprocess/anchors", "preprocess/chat_template", "preprocess/tokenized", "sources/records", "sources/readers")


@dataclass(frozen=True)
class TokenizeSettings:
    """Settings that, with the records and the encoder, determine the tokens."""

    max_seq_len: int
    truncation: str  # turn: keep the leading turns that fit; token: cut at max_seq_len; drop: skip the conversation


class Documents(Sequence[Document]):
    """Memory-mapped tokenized conversations in record order, without rejected and dropped records."""

    def __init__(self, table: Dataset, sources: list[Source]) -> None:
        self.table, self.sources = table, sources
        self.indices = np.flatnonzero(np.isin(table.data.column("outcome").to_numpy(), (KEPT, TRUNCATED)))
        self._tokens = table.select_columns(["input_ids", "supervised"]).with_format("numpy")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]  # no slices: documents are read one by one
        row = self._tokens[int(self.indices[index])]
        return Document(row["input_ids"], row["supervised"])

    def column(self, name: str, *, all_records: bool = False) -> np.ndarray:
        """Return a numeric column, [documents] or with `all_records` [records]."""
        column = self.table.data.column(name).to_numpy()
        return column if all_records else column[self.indices]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[documents] token counts after truncation."""
        return _lengths(self.table, "input_ids")[self.indices]

    def largest_token(self) -> int:
        """Return the largest token id of all documents, or -1 if there are no tokens."""
        chunks = [chunk.flatten() for chunk in self.table.data.column("input_ids").chunks]
        return max((int(compute.max(tokens).as_py()) for tokens in chunks if len(tokens)), default=-1)

    def outcomes(self) -> dict[str, int]:
        """Return the number of records per outcome, keyed by OUTCOMES."""
        counts = np.bincount(self.column("outcome", all_records=True), minlength=len(OUTCOMES))
        return dict(zip(OUTCOMES, counts.tolist(), strict=True))

    def lost_tokens(self) -> tuple[int, int]:
        """Return the tokens lost to truncation and those of dropped conversations (too long, or without an anchor)."""
        tokens, outcome = (self.column(name, all_records=True) for name in ("tokens", "outcome"))
        dropped = np.isin(outcome, (TOO_LONG, NO_ANCHOR))
        return int(tokens[self.indices].sum() - self.lengths.sum()), int(tokens[dropped].sum())

    def rejects(self) -> Iterator[Reject]:
        """Yield an entry of the rejects file for each bad record."""
        for i in np.flatnonzero(self.column("outcome", all_records=True) == BAD).tolist():
            row = self.table[i]
            yield reject(self.sources[row["part"]], row["place"], row["reason"], row["raw"])


def tokenize(sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings, *, num_proc: int) -> Documents:
    """Tokenize all records, or load the result from the cache.

    The order of documents does not depend on the number of processes. A file lock lets one rank or run tokenize the
    data while the others wait. The cache entry is renamed into place once complete, so an interrupted run leaves no
    partial entry.
    """
    key = _fingerprint(sources, encoder, settings)
    home = Path(datasets.config.HF_DATASETS_CACHE) / "flexdraft" / key
    home.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{home}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print("waiting for another process that is tokenizing the same data", flush=True)
        lock.acquire()
    try:
        if not (home / "files.json").exists():
            _write(home, sources, encoder, settings, num_proc, key)
    finally:
        lock.release()
    files = json.loads((home / "files.json").read_text(encoding="utf-8"))
    return Documents(concatenate_datasets([Dataset.from_file(str(home / file)) for file in files]), sources)


def _write(
    home: Path, sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings, num_proc: int, key: str
) -> None:
    chunks = [{"part": n} | asdict(chunk) for n, source in enumerate(sources) for chunk in source.reader.chunks()]
    index = Dataset.from_list(chunks)
    temporary = home.with_name(f"{key}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    table = index.map(
        tokenize_chunk,
        fn_kwargs={"sources": sources, "encoder": encoder, "settings": settings},
        batched=True,
        batch_size=1,
        remove_columns=index.column_names,
        features=FEATURES,
        num_proc=workers if (workers := min(num_proc, len(chunks))) > 1 else None,
        cache_file_name=str(temporary / "documents.arrow"),
        new_fingerprint=key,
        desc=f"tokenizing {sum(source.take for source in sources):,} records, in chunks",
    )
    files = [Path(file["filename"]).name for file in table.cache_files]
    (temporary / "files.json").write_text(json.dumps(files), encoding="utf-8")
    shutil.rmtree(home, ignore_errors=True)
    temporary.rename(home)


def tokenize_chunk(
    columns: dict[str, list[int]], *, sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings
) -> dict[str, list[Any]]:
    """Tokenize the records of one chunk. Return the columns of `FEATURES`."""
    (number,) = columns.pop("part")
    source, chunk = sources[number], Chunk(**{name: value for name, (value,) in columns.items()})
    rows: list[dict[str, Any]] = []
    valid: list[tuple[dict[str, Any], Messages, Rendered]] = []
    for raw in source.read(chunk):
        row = {"part": number, "place": raw.position, "reason": "", "raw": "", "digest": 0, "tokens": 0}
        rows.append(row)
        try:
            messages = raw.parse(conversation)
            rendered = encoder.render(messages)
        except BadRecord as error:
            reason, text = printable(str(error)), raw.as_text()[:TEXT_CHARACTERS]
            row |= {"outcome": BAD, "reason": reason, "raw": text} | _content(None)
        else:
            row["digest"] = _digest(messages)
            valid.append((row, messages, rendered))
    documents = encoder.tokenize([rendered for _, _, rendered in valid])
    for (row, messages, _), document in zip(valid, documents, strict=True):
        fitted = fit_to_row(document, messages, encoder, settings)
        row |= {"outcome": _outcome(document, fitted), "tokens": len(document.input_ids)}
        row |= _content(fitted if row["outcome"] in (KEPT, TRUNCATED) else None)
    return {name: [row[name] for row in rows] for name in FEATURES}


def fit_to_row(
    document: Document, messages: Messages, encoder: ChatEncoder, settings: TokenizeSettings
) -> Document | None:
    """Truncate a document to the row length. Return None if it must be dropped."""
    limit = settings.max_seq_len
    if len(document.input_ids) <= limit:
        return document
    if settings.truncation == "drop":
        return None
    if settings.truncation == "token":
        return Document(document.input_ids[:limit], document.supervised[:limit])
    # Re-tokenize instead of slicing: a template may render the last turn differently, so a conversation with fewer
    # turns may even have more tokens.
    ends = [turn for turn, message in enumerate(messages, start=1) if message["role"] == "assistant"][:-1]
    shorter = (encoder.conversation(messages[:end]) for end in reversed(ends))
    return next((document for document in shorter if len(document.input_ids) <= limit), None)


def _outcome(document: Document, fitted: Document | None) -> int:
    if fitted is None:
        return TOO_LONG
    if not _num_anchors(fitted):
        return NO_ANCHOR
    return KEPT if len(fitted.input_ids) == len(document.input_ids) else TRUNCATED


def _content(document: Document | None) -> dict[str, Any]:
    if document is None:
        empty = np.zeros(0, np.int32)
        return {"anchors": 0, "longest": 0, "input_ids": empty, "supervised": empty.astype(bool)}
    return {
        "anchors": _num_anchors(document),
        "longest": longest_answer(document.supervised),
        "input_ids": document.input_ids,
        "supervised": document.supervised,
    }


def _num_anchors(document: Document) -> int:
    return len(anchor_indices(document.supervised, np.arange(len(document.supervised))))


def longest_answer(supervised: np.ndarray) -> int:
    """Return the length of the longest run of supervised tokens."""
    edges = np.diff(np.concatenate([[0], supervised.astype(np.int8), [0]]))
    return int((np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)).max(initial=0))


def _digest(messages: Messages) -> int:
    content = json.dumps(messages, ensure_ascii=False, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def _lengths(table: Dataset, name: str) -> np.ndarray:
    """Return the list lengths of a column from the Arrow offsets, without reading the values."""
    offsets = [np.diff(chunk.offsets.to_numpy()) for chunk in table.data.column(name).chunks]
    return np.concatenate(offsets) if offsets else np.zeros(0, np.int32)


def _fingerprint(sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings) -> str:
    here = Path(__file__).parents[1]
    inputs = {
        "records": fingerprint(sources),
        "encoder": encoder.fingerprint(),
        "settings": asdict(settings),
        "code": [(here / f"{name}.py").read_text(encoding="utf-8") for name in CODE],
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "datasets")},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]
