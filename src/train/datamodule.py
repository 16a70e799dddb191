"""Conversations to packed rows, and rows to the loaders of one training stage."""

from typing import Any

import lightning
import numpy as np
from jinja2 import TemplateError
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.anchors import valid_anchors
from data.chat import Document, encode_conversation
from data.conversations import read_conversations
from data.errors import UserError
from data.packing import Row, pack_documents
from train.batches import TrainingBatches, ValidationBatches


def prepare_rows(
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: str,
    split: str,
    max_records: int | None,
    validation_records: int,
    row_length: int,
    template_kwargs: dict[str, Any],
    block_size: int,
    seed: int,
) -> tuple[list[Row], list[Row]]:
    """Training rows and validation rows of a set of conversations; prints what was found.

    Raises:
        UserError: nothing to train on, or no answer as long as a block.
    """
    conversations = read_conversations(path, split=split, max_records=max_records)
    encode = tqdm(conversations, desc="tokenise", unit=" conversations", delay=1)
    documents = []
    for number, messages in enumerate(encode, start=1):
        try:
            documents.append(encode_conversation(tokenizer, messages, template_kwargs))
        except TemplateError as error:
            raise UserError(
                f"data.path={path}, conversation {number}: the target's chat template refuses it ({error}). "
                "Mend or remove it."
            ) from error
    longest = max(_longest_answer(d, row_length) for d in documents)
    if longest < block_size:
        raise UserError(
            f"model.draft.block_size={block_size}, but the longest answer in data.path={path} has {longest} tokens "
            f"(rows of {row_length}). Choose a block size of at most {longest}, or data with longer answers."
        )
    if validation_records >= len(documents):
        raise UserError(
            f"data.validation_records={validation_records} leaves nothing to train on: data.path={path} has "
            f"{len(documents)} conversations."
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    validation, training = (
        [row for row in pack_documents(part, row_length, pad_id) if len(valid_anchors(row))]
        for part in (shuffled[:validation_records], shuffled[validation_records:])
    )
    _describe(documents, training, row_length)
    return training, validation


def _longest_answer(document: Document, row_length: int) -> int:
    """Longest run of supervised tokens that a row can hold."""
    edges = np.diff(np.concatenate([[0], document.supervised[:row_length].astype(int), [0]]))
    lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    return int(lengths.max(initial=0))


def _describe(documents: list[Document], rows: list[Row], row_length: int) -> None:
    tokens = sum(len(d.input_ids) for d in documents)
    supervised = sum(int(d.supervised.sum()) for d in documents)
    cut = sum(max(0, len(d.input_ids) - row_length) for d in documents)
    silent = sum(not d.supervised.any() for d in documents)
    filled = sum(int((row.document_ids >= 0).sum()) for row in rows) / max(1, len(rows) * row_length)
    Console().print(
        f"data: {len(documents):,} conversations ({silent:,} without supervised tokens), {tokens:,} tokens "
        f"({supervised / tokens:.0%} supervised, {cut:,} cut off at {row_length}); "
        f"{len(rows):,} training rows, {filled:.1%} full",
        soft_wrap=True,
        highlight=False,
    )


class DraftData(lightning.LightningDataModule):
    """The loaders of one training stage."""

    def __init__(
        self,
        training: list[Row],
        validation: list[Row],
        *,
        steps: int,
        rows_per_step: int,
        num_anchors: int,
        block_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.training, self.validation = training, validation
        self.steps, self.rows_per_step, self.num_anchors = steps, rows_per_step, num_anchors
        self.block_size, self.seed = block_size, seed

    def train_dataloader(self) -> TrainingBatches:
        return TrainingBatches(
            self.training,
            steps=self.steps,
            rows_per_step=self.rows_per_step,
            num_anchors=self.num_anchors,
            block_size=self.block_size,
            seed=self.seed,
            current_step=lambda: self.trainer.global_step,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def val_dataloader(self) -> ValidationBatches:
        world = self.trainer.world_size
        return ValidationBatches(
            self.validation,
            rows_per_batch=max(1, self.rows_per_step // world),
            num_anchors=self.num_anchors,
            block_size=self.block_size,
            rank=self.trainer.global_rank,
            world_size=world,
        )
