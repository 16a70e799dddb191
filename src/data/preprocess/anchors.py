"""Where blocks may start, and what each of their slots should say."""

import numpy as np
import torch

from data.batch import IGNORE, Batch
from data.preprocess.packing import Row


def valid_anchors(row: Row) -> np.ndarray:
    """Indices of the row at which decoding could start a block.

    The anchor is a token that the assistant wrote (decoding has only verified what is before it), and so is the token
    after it, in the same document: slot 0 is never drafted, so a block without slot 1 teaches nothing. A block may
    reach past the end of its answer, as the last blocks of decoding do; those slots carry no label. An anchor is never
    the first token of its document: the context of a block is not empty.
    """
    supervised, documents = row.supervised, row.document_ids
    next_is_same = np.append(supervised[1:] & (documents[1:] == documents[:-1]), False)
    return np.flatnonzero(supervised & next_is_same & (row.position_ids > 0))


def block_labels(row: Row, anchors: np.ndarray, block_size: int) -> np.ndarray:
    """[A, B] the token at anchor + slot; IGNORE from the first slot that the assistant did not write."""
    at = anchors[:, None] + np.arange(block_size)  # [A, B]
    inside = at < len(row.input_ids)
    at = np.minimum(at, len(row.input_ids) - 1)
    same_document = row.document_ids[at] == row.document_ids[anchors][:, None]
    supervised = np.logical_and.accumulate(inside & same_document & row.supervised[at], axis=1)
    return np.where(supervised, row.input_ids[at], IGNORE)


def draw_anchors(row: Row, count: int, generator: np.random.Generator) -> np.ndarray:
    """[count] anchors, ascending, drawn without replacement; -1 at the end where the row has fewer."""
    candidates = valid_anchors(row)
    drawn = np.sort(generator.permutation(candidates)[:count])
    return np.append(drawn, np.full(count - len(drawn), -1)).astype(np.int64)


def make_batch(rows: list[Row], *, num_anchors: int, block_size: int, seeds: list[tuple[int, ...]]) -> Batch:
    """Stack rows and draw their blocks. The draw of a row depends on its seed alone.

    A place in `anchors` that its row cannot fill holds anchor 0 and no labels: it is computed, and counts for nothing.
    """
    anchors, labels = [], []
    for row, seed in zip(rows, seeds, strict=True):
        drawn = draw_anchors(row, num_anchors, np.random.default_rng(seed))
        filled = drawn >= 0
        drawn = np.where(filled, drawn, 0)
        anchors.append(drawn)
        labels.append(np.where(filled[:, None], block_labels(row, drawn, block_size), IGNORE))
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        position_ids=torch.from_numpy(np.stack([row.position_ids for row in rows])),
        document_ids=torch.from_numpy(np.stack([row.document_ids for row in rows])),
        anchors=torch.from_numpy(np.stack(anchors)),
        labels=torch.from_numpy(np.stack(labels)),
    )
