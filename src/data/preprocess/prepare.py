"""Data preparation: tokenize conversations, split off validation data, pack rows."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.packing import PackedRows
from data.preprocess.tokenized import BAD, OUTCOMES, Documents, TokenizeSettings, tokenize
from data.sources.readers import Source
from data.sources.rejects import refuse_bad


@dataclass
class Prepared:
    """Tokenized and packed training and validation data."""

    documents: Documents
    training: PackedRows
    validation: PackedRows
    rejects: Path


class Subset:
    """View of selected documents, in the order of `indices`."""

    def __init__(self, documents: Documents, indices: np.ndarray) -> None:
        self.documents, self.indices = documents, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
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
    documents = tokenize(sources, encoder, settings, num_proc=processes(num_proc))
    refuse_bad(documents.rejects(), documents.table.num_rows, bad_records, rejects)
    _check(documents, block_size, max_seq_len, validation_records)
    order = np.random.default_rng(seed).permutation(len(documents))
    validation, training = (
        PackedRows(Subset(documents, chosen), documents.lengths[chosen], max_seq_len, encoder.pad_id)
        for chosen in (order[:validation_records], order[validation_records:])
    )
    return Prepared(documents, training, validation, rejects)


def processes(num_proc: int | None) -> int:
    """Return the number of worker processes. None selects one per CPU core available to this process."""
    if num_proc is not None:
        return num_proc
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def describe(prepared: Prepared) -> str:
    """One-line dataset summary: records by outcome, tokens kept and lost, training rows, packing efficiency."""
    documents, rows = prepared.documents, prepared.training
    found = documents.outcomes()
    listed = f", listed in {prepared.rejects}" if found[OUTCOMES[BAD]] else ""
    read = ", ".join(f"{count:,} {outcome}" for outcome, count in found.items() if count)
    kept, lost = int(documents.lengths.sum()), sum(documents.lost())
    return (
        f"data: {sum(found.values()):,} records ({read}{listed}), {kept:,} tokens ({lost:,} lost to their length); "
        f"{len(rows):,} training rows, {rows.efficiency():.1%} full"
    )


def _check(documents: Documents, block_size: int, max_seq_len: int, validation_records: int) -> None:
    longest = int(documents.column("longest").max(initial=0))
    found = ", ".join(f"{count:,} {outcome}" for outcome, count in documents.outcomes().items())
    if not len(documents):
        raise UserError(
            f"data.path holds no conversation to train on ({found}). Rows hold data.max_seq_len={max_seq_len} tokens; "
            "data.truncation says what becomes of longer conversations."
        )
    if longest < block_size:
        raise UserError(
            f"model.draft.block_size={block_size}, but the longest answer in data.path has {longest} tokens "
            f"(rows of {max_seq_len}). Choose a block size of at most {longest}, or data with longer answers."
        )
    if validation_records >= len(documents):
        raise UserError(
            f"data.validation_records={validation_records} leaves nothing to train on: data.path holds "
            f"{len(documents):,} conversations ({found}). Choose fewer."
        )
