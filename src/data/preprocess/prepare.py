"""Data preparation: tokenize conversations, split off validation data, pack rows."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.document import Document
from data.preprocess.packing import PackedRows
from data.preprocess.table import BAD, NO_ANCHOR, OUTCOMES, TOO_LONG, TokenizeSettings
from data.preprocess.tokenized import Documents, tokenize
from data.sources.readers import Source
from data.sources.rejects import common_reasons, handle_rejects


@dataclass
class Prepared:
    """Tokenized and packed training and validation data."""

    documents: Documents
    training: PackedRows
    validation: PackedRows
    training_indices: np.ndarray  # indices into `documents`, in the order of `training.documents`
    rejects: Path


class Subset(Sequence[Document]):
    """A view of the documents at `indices`, in that order."""

    def __init__(self, documents: Documents, indices: np.ndarray) -> None:
        self.documents, self.indices = documents, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]  # no slices, as in `Documents`
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

    Bad records are written to `rejects`; they stop the run unless `bad_records` is "skip". Records in which only some
    answers are refused are also listed there.

    Raises:
        UserError: there are bad records and `bad_records` is "stop", there is no training data, or no answer has at
            least `block_size` tokens.
    """
    settings = TokenizeSettings(max_seq_len=max_seq_len, truncation=truncation)
    documents = tokenize(sources, encoder, settings, num_proc=num_processes(num_proc))
    total = sum(documents.outcomes().values())
    handle_rejects(documents.rejects(), total, bad_records, rejects, also_listed=documents.refused())
    _check(documents, block_size, max_seq_len, validation_records, rejects)
    # Shuffle records rather than documents: the documents of one conversation must all end up in the same set.
    num_records = int(documents.records[-1]) + 1
    rank = np.argsort(np.random.default_rng(seed).permutation(num_records))[documents.records]  # [documents]
    order = np.argsort(rank, kind="stable")
    split = int((rank < validation_records).sum())
    validation, training = order[:split], order[split:]

    def pack(indices: np.ndarray) -> PackedRows:
        return PackedRows(Subset(documents, indices), documents.lengths[indices], max_seq_len, encoder.pad_id)

    return Prepared(documents, pack(training), pack(validation), training, rejects)


def num_processes(num_proc: int | None) -> int:
    """Return the number of worker processes. None selects one per CPU core available to this process."""
    if num_proc is not None:
        return num_proc
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def describe(prepared: Prepared) -> str:
    """Return a one-line dataset summary: records by outcome, tokens kept and lost, rows, packing efficiency."""
    documents, rows = prepared.documents, prepared.training
    outcomes = documents.outcomes()
    answers = documents.answers()
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items() if count)
    refused = f", {answers['refused']:,} answers refused" if answers["refused"] else ""
    skipped = f", {answers['skipped']:,} answers before the first question left out" if answers["skipped"] else ""
    listed = f", listed in {prepared.rejects}" if outcomes[OUTCOMES[BAD]] or refused else ""
    kept, lost = int(documents.lengths.sum()), sum(documents.lost_tokens())
    return (
        f"data: {sum(outcomes.values()):,} records ({counts}{refused}{listed}{skipped}), {kept:,} tokens kept "
        f"({lost:,} truncated or dropped), {len(rows):,} training rows with a packing efficiency of "
        f"{rows.efficiency():.1%}"
    )


def describe_answers(documents: Documents) -> str:
    """Return a one-sentence breakdown of all answers that were read: supervised, lost or refused."""
    found = documents.answers()
    supervised, by_ids, further, refused = (found[key] for key in ("supervised", "by_ids", "separate", "refused"))
    parts = {
        "supervised in the first document of a conversation": supervised - by_ids - further,
        "supervised in further documents because later prompts contain earlier turns in another form": further,
        "supervised by their token ids, where the text reads back differently or was cut off": by_ids,
        "lost to truncation or too short for a block": found["answers"] - refused - found["untrained"] - supervised,
        "refused": refused,
        "used only as history because the record excludes them from training": found["untrained"],
        "left out because the conversation starts with them, without a question": found["skipped"],
    }
    stated = [f"{count:,} {part}" for part, count in parts.items() if count]
    return f"{found['answers'] + found['skipped']:,} answers: {', '.join(stated) or 'none supervised'}."


def _check(documents: Documents, block_size: int, max_seq_len: int, validation_records: int, rejects: Path) -> None:
    longest = int(documents.column("longest").max(initial=0))
    outcomes = documents.outcomes()
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
    if not len(documents):
        raise UserError(
            f"data.path contains no conversations to train on ({counts}).{_cause(documents, max_seq_len, rejects)}"
        )
    if longest < block_size:
        raise UserError(
            f"model.draft.block_size={block_size}: expected at most {longest}, the length of the longest answer in "
            f"data.path (data.max_seq_len={max_seq_len}). Reduce the block size, or use data with longer answers."
        )
    usable = int(documents.records[-1]) + 1
    if validation_records >= usable:
        raise UserError(
            f"data.validation_records={validation_records} leaves no training data: data.path contains "
            f"{usable:,} usable conversations ({counts}). Reduce the setting."
        )


def _cause(documents: Documents, max_seq_len: int, rejects: Path) -> str:
    """Explain why no document is left: bad records (with the most common reason), lengths or missing anchors."""
    outcomes, text = documents.outcomes(), ""
    if outcomes[OUTCOMES[BAD]]:
        reason, count, where = common_reasons(documents.rejects(), 1)[0]
        text += f" Most common reason of bad records ({count:,}, first at {where}): {reason}. Full list: {rejects}."
    if outcomes[OUTCOMES[TOO_LONG]]:
        text += f" Increase data.max_seq_len={max_seq_len} or set data.truncation=token for those that are too long."
    if outcomes[OUTCOMES[NO_ANCHOR]]:
        text += " An answer needs two tokens within data.max_seq_len for an anchor."
    return text
