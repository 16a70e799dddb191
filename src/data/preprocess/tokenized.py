"""Parallel tokenization of records, cached on disk under a fingerprint of everything that affects the tokens."""

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as compute
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from multiprocess import ProcessError

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.document import Document
from data.preprocess.table import (
    BAD,
    FEATURES,
    KEPT,
    NO_ANCHOR,
    NOTES,
    OUTCOMES,
    TOO_LONG,
    TRUNCATED,
    TokenizeSettings,
    table_rows,
)
from data.sources.cache import cache_errors, cache_folder, stream_ends, sync
from data.sources.chunks import Chunk
from data.sources.readers import Source, fingerprint
from data.sources.rejects import Reject, reject

# Modules that determine the table. Their source code is part of the cache key.
PREPROCESS = (
    "anchors", "answers", "boundaries", "chat_template", "content_forms", "prompts", "reasoning", "skeleton", "spans",
    "supervision", "switches", "table", "templates", "tool_calls", "written",
)  # fmt: skip
SOURCES = (
    "chunks", "formats", "forms", "json_values", "jsonl", "readers", "records", "rejects", "tables", "tools", "tags",
    "turns",
)  # fmt: skip
CODE = (*(f"preprocess/{name}" for name in PREPROCESS), *(f"sources/{name}" for name in SOURCES))


class Documents(Sequence[Document]):
    """Memory-mapped tokenized documents in record order, without rejected and dropped records.

    A record has several documents if the chat template rewrites earlier turns.
    """

    def __init__(self, table: Dataset, sources: list[Source]) -> None:
        self.table, self.sources = table, sources
        self.indices = np.flatnonzero(np.isin(table.data.column("outcome").to_numpy(), (KEPT, TRUNCATED)))
        self._tokens = table.select_columns(["input_ids", "supervised"]).with_format("numpy")
        self._first = np.flatnonzero(table.data.column("document").to_numpy() == 0)  # [records] first row of each

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]  # no slices: documents are read one by one
        row = self._tokens[int(self.indices[index])]
        return Document(row["input_ids"], row["supervised"])

    def column(self, name: str, *, all_records: bool = False) -> np.ndarray:
        """Return a numeric column for the documents [documents], or, with `all_records`, for the records [records].

        A record's value is the one in its first row.
        """
        column = self.table.data.column(name).to_numpy()
        return column[self._first if all_records else self.indices]

    @cached_property
    def records(self) -> np.ndarray:
        """Index of each document's record among the kept records, ascending, [documents]."""
        return np.cumsum(self.column("document") == 0) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each document after truncation, [documents]."""
        return _lengths(self.table, "input_ids")[self.indices]

    def largest_token(self) -> int:
        """Return the largest token id in any document, or -1 if there are no tokens."""
        chunks = [chunk.flatten() for chunk in self.table.data.column("input_ids").chunks]
        return max((int(compute.max(tokens).as_py()) for tokens in chunks if len(tokens)), default=-1)

    def outcomes(self) -> dict[str, int]:
        """Return the number of records per outcome, keyed by OUTCOMES."""
        counts = np.bincount(self.column("outcome", all_records=True), minlength=len(OUTCOMES))
        return dict(zip(OUTCOMES, counts.tolist(), strict=True))

    def answers(self) -> dict[str, int]:
        """Return numbers of answers: `answers`, `skipped`, `refused`, `untrained`, `supervised` and others.

        `skipped` counts answers before the first question of a record, `answers` all others.
        `by_ids` counts supervised answers whose text reads back as other tokens than the target wrote, and `separate`
        the other supervised answers in a record's second or later document.
        """
        names = ("answers", "refused", "untrained", "skipped", *NOTES)
        counts = {name: int(self.column(name, all_records=True).sum()) for name in names}
        supervised, by_ids = self.column("supervised_answers"), self.column("by_ids")
        separate = supervised[(self.column("document") > 0) & (by_ids == 0)]
        return counts | {
            "supervised": int(supervised.sum()),
            "by_ids": int(by_ids.sum()),
            "separate": int(separate.sum()),
        }

    def answer_tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the record index, message index and number of tokens of each supervised answer, [answers] each.

        Records count from 0, in the order in which they are read, and include those without supervised answers.
        """
        counts = _lengths(self.table, "turns")
        record = np.cumsum(self.table.data.column("document").to_numpy() == 0) - 1
        turns, tokens = (
            compute.list_flatten(self.table.data.column(name)).to_numpy() for name in ("turns", "turn_tokens")
        )
        return np.repeat(record, counts), turns, tokens

    def lost_tokens(self) -> tuple[int, int]:
        """Return the number of tokens lost to truncation, and the number lost with dropped conversations.

        Conversations are dropped if they are too long or have no anchor.
        """
        tokens, outcome = (self.column(name, all_records=True) for name in ("tokens", "outcome"))
        dropped = np.isin(outcome, (TOO_LONG, NO_ANCHOR))
        return int(self.column("tokens").sum() - self.lengths.sum()), int(tokens[dropped].sum())

    def rejects(self) -> Iterator[Reject]:
        """Yield a rejects-file entry for each bad record."""
        return self._rejects(self.column("outcome", all_records=True) == BAD)

    def refused(self) -> Iterator[Reject]:
        """Yield a rejects-file entry for each remaining record that has a refused answer."""
        outcome, refused = (self.column(name, all_records=True) for name in ("outcome", "refused"))
        return self._rejects((outcome != BAD) & (refused > 0))

    def _rejects(self, records: np.ndarray) -> Iterator[Reject]:
        for i in self._first[records].tolist():
            row = self.table[i]
            yield reject(self.sources[row["part"]], row["place"], row["reason"], row["raw"])


def tokenize(sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings, *, num_proc: int) -> Documents:
    """Tokenize all records, or load the result from the cache.

    The order of documents does not depend on the number of processes. A file lock lets one rank or run tokenize the
    data while the others wait. The cache entry is renamed into place once complete, so an interrupted run leaves no
    partial entry.
    """
    key = _fingerprint(sources, encoder, settings)
    home = cache_folder(key)
    with cache_errors():
        table = _load(home)  # without the lock, so that the cache may be read-only
        if table is None:
            home.parent.mkdir(parents=True, exist_ok=True)
            with _only_process(FileLock(f"{home}.lock")):
                table = _load(home)
                if table is None:
                    _write(home, sources, encoder, settings, num_proc, key)
                    table = _read(home)
    return Documents(table, sources)


@contextmanager
def _only_process(lock: FileLock) -> Iterator[None]:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print("waiting for another process that is tokenizing the same data", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _load(home: Path) -> Dataset | None:
    """Return the table in a cache entry, or None if the entry is missing or damaged."""
    try:
        return _read(home)
    except (OSError, ValueError):  # pyarrow errors are ValueErrors
        return None


def _read(home: Path) -> Dataset:
    rows = json.loads((home / "files.json").read_text(encoding="utf-8"))
    tables = [Dataset.from_file(str(home / name)) for name in rows]
    if [len(table) for table in tables] != list(rows.values()) or not all(stream_ends(home / name) for name in rows):
        raise ValueError(f"{home}: the files are incomplete")
    return concatenate_datasets(tables)


def _write(
    home: Path, sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings, num_proc: int, key: str
) -> None:
    temporary = home.with_name(f"{key}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = _tokenize(temporary, sources, encoder, settings, num_proc, key)
        (temporary / "files.json").write_text(json.dumps(files), encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        shutil.rmtree(home, ignore_errors=True)
        temporary.rename(home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenize(
    folder: Path, sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings, num_proc: int, key: str
) -> dict[str, int]:
    """Write the table to `folder`. Return the number of rows in each file, by name, in order."""
    chunks = [{"part": n} | asdict(chunk) for n, source in enumerate(sources) for chunk in source.reader.chunks()]
    index, workers = Dataset.from_list(chunks), min(num_proc, len(chunks))
    with _lost_workers(num_proc) if workers > 1 else nullcontext(), _frozen():
        table = index.map(
            tokenize_chunk,
            fn_kwargs={"sources": sources, "encoder": encoder, "settings": settings},
            batched=True,
            batch_size=1,
            remove_columns=index.column_names,
            features=FEATURES,
            num_proc=workers if workers > 1 else None,
            cache_file_name=str(folder / "documents.arrow"),
            new_fingerprint=key,
            desc=f"tokenizing {sum(source.take for source in sources):,} records, in chunks",
        )
    files = [Path(file["filename"]) for file in table.cache_files]
    return {file.name: len(Dataset.from_file(str(file))) for file in files}


@contextmanager
def _frozen() -> Iterator[None]:
    """Exclude all existing objects, such as imported modules, from garbage collection, also in forked workers."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _lost_workers(num_proc: int) -> Iterator[None]:
    """Report the end of a worker process; `datasets` raises one of several errors.

    Raises:
        UserError: a worker process ended. Errors inside a worker, which have a remote cause, are raised unchanged.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError, ProcessError) as error:
        if error.__cause__ is not None or isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise UserError(
            f"data.num_proc={num_proc}: a worker process ended unexpectedly, probably out of memory. Lower "
            "data.num_proc."
        ) from error


def tokenize_chunk(
    columns: dict[str, list[int]], *, sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings
) -> dict[str, list[Any]]:
    """Tokenize the records of one chunk. Return the columns of `FEATURES`."""
    (number,) = columns.pop("part")
    source, chunk = sources[number], Chunk(**{name: value for name, (value,) in columns.items()})
    rows = list(table_rows(source.read(chunk), number, encoder, settings))
    return {name: [row[name] for row in rows] for name in FEATURES}


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
