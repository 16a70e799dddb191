"""Anchor sampling and block labels."""

import numpy as np
import torch

from data.batch import IGNORE, Batch
from data.preprocess.packing import Row


def valid_anchors(row: Row) -> np.ndarray:
    """Return the token indices in a row at which a block may start."""
    return anchor_indices(row.supervised, row.position_ids)


def anchor_indices(supervised: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """Return the token indices of the valid anchors in a row or a single document.

    An anchor and the token after it must both be supervised and belong to the same document: the bonus token replaces
    the prediction of slot 0, so a block without a label at slot 1 would provide no training signal. A block may extend
    past the end of its answer, as the last blocks do in decoding; slots past the end have no label. The first token of
    a document is never an anchor, because its block would have no context.

    Args:
        supervised: [tokens] bool.
        position_ids: [tokens], restarting at 0 in each document. Anchors have positions >= 1.
    """
    return np.flatnonzero(supervised[:-1] & supervised[1:] & (position_ids[1:] > 1))


def block_labels(row: Row, anchors: np.ndarray, block_size: int) -> np.ndarray:
    """Return the labels [A, B]: the token at anchor + slot, or IGNORE from the first unsupervised slot onwards."""
    at = anchors[:, None] + np.arange(block_size)  # [A, B]
    inside = at < len(row.input_ids)
    at = np.minimum(at, len(row.input_ids) - 1)
    same_document = row.document_ids[at] == row.document_ids[anchors][:, None]
    supervised = np.logical_and.accumulate(inside & same_document & row.supervised[at], axis=1)
    return np.where(supervised, row.input_ids[at], IGNORE)


def draw_anchors(row: Row, count: int, generator: np.random.Generator) -> np.ndarray:
    """Sample anchors without replacement. Return sorted token indices [count], padded with -1 if the row has fewer."""
    candidates = valid_anchors(row)
    drawn = np.sort(generator.permutation(candidates)[:count])
    return np.append(drawn, np.full(count - len(drawn), -1)).astype(np.int64)


def make_batch(rows: list[Row], *, num_anchors: int, block_size: int, seeds: list[tuple[int, ...]]) -> Batch:
    """Stack rows into a batch and sample their anchors, which depend only on the row and its seed.

    If a row has fewer than `num_anchors` valid anchors, the remaining blocks use anchor 0 with all labels IGNORE: they
    are computed but contribute no loss.
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
