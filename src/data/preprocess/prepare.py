"""Data preparation: tokenize conversations, split off validation data, pack rows."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder, Document
from data.preprocess.packing import PackedRows
from data.preprocess.tokenized import BAD, OUTCOMES, Documents, TokenizeSettings, tokenize
from data.sources.readers import Source
from data.sources.rejects import handle_rejects


@dataclass
class Prepared:
    """Tokenized and packed training and validation data."""

    documents: Documents
    training: PackedRows
    validation: PackedRows
    training_indices: np.ndarray  # indices into `documents`, in the order of `training.documents`
    rejects: Path


class Subset(Sequence[Document]):
    """View of selected documents, in the order of `indices`."""

    def __init__(self, documents: Documents, indices: np.ndarray) -> None:
        self.documents, self.indices = documents, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]  # no slices, as `Documents`
        return self.documents[self.indices[index]]


def prepare(
    sources: list[Source],
    encoder: ChatEncoder,
    *,
    max_seq_len: int,
    truncation: str,
    bad_records: str,
    num_proc: int | None,
    validation_records: int,
    block_size: int,
    seed: int,
    rejects: Path,
) -> Prepared:
    """Tokenize and shuffle conversations, split off `validation_records` of them and pack both sets into rows.

    Bad records are written to `rejects`; they stop the run unless `bad_records` is "skip".

    Raises:
        UserError: bad records with policy "stop", no training data, or no answer with at least `block_size` tokens.
    """
    settings = TokenizeSettings(max_seq_len=max_seq_len, truncation=truncation)
    documents = tokenize(sources, encoder, settings, num_proc=num_processes(num_proc))
    handle_rejects(documents.rejects(), documents.table.num_rows, bad_records, rejects)
    _check(documents, block_size, max_seq_len, validation_records)
    order = np.random.default_rng(seed).permutation(len(documents))
    validation, training = order[:validation_records], order[validation_records:]

    def pack(indices: np.ndarray) -> PackedRows:
        return PackedRows(Subset(documents, indices), documents.lengths[indices], max_seq_len, encoder.pad_id)

    return Prepared(documents, pack(training), pack(validation), training, rejects)


def num_processes(num_proc: int | None) -> int:
    """Return the number of worker processes. None selects one per CPU core available to this process."""
    if num_proc is not None:
        return num_proc
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def describe(prepared: Prepared) -> str:
    """One-line dataset summary: records by outcome, tokens kept and lost, training rows, packing efficiency."""
    documents, rows = prepared.documents, prepared.training
    outcomes = documents.outcomes()
    listed = f", listed in {prepared.rejects}" if outcomes[OUTCOMES[BAD]] else ""
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items() if count)
    kept, lost = int(documents.lengths.sum()), sum(documents.lost_tokens())
    return (
        f"data: {sum(outcomes.values()):,} records ({counts}{listed}), {kept:,} tokens kept ({lost:,} truncated or "
        f"dropped), {len(rows):,} training rows with a packing efficiency of {rows.efficiency():.1%}"
    )


def _check(documents: Documents, block_size: int, max_seq_len: int, validation_records: int) -> None:
    longest = int(documents.column("longest").max(initial=0))
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in documents.outcomes().items())
    if not len(documents):
        raise UserError(
            f"data.path contains no conversations to train on ({counts}). If they are too long, increase "
            f"data.max_seq_len={max_seq_len} or set data.truncation=token."
        )
    if longest < block_size:
        raise UserError(
            f"model.draft.block_size={block_size}: expected at most {longest}, the length of the longest answer in "
            f"data.path (data.max_seq_len={max_seq_len}). Reduce the block size, or use data with longer answers."
        )
    if validation_records >= len(documents):
        raise UserError(
            f"data.validation_records={validation_records} leaves no training data: data.path contains "
            f"{len(documents):,} usable conversations ({counts}). Reduce the setting."
        )
