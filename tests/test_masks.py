"""Masks and labels against loops that spell the rules out."""

import numpy as np
import torch
from conftest import random_documents

from data.anchors import block_labels, draw_anchors, make_batch, valid_anchors
from data.batch import IGNORE
from data.packing import pack_documents
from models.masks import block_sparse, block_tiles, clean_tiles, dense, document_causal, own_block


def rows_of(seed: int, count: int = 7, row_length: int = 64):
    return pack_documents(random_documents(count, seed), row_length, pad_id=0)


def test_document_causal_mask_equals_loops():
    batch = make_batch(rows_of(0), num_anchors=3, block_size=4, seeds=[(i,) for i in range(len(rows_of(0)))])
    rows, length = batch.input_ids.shape
    mask = dense(document_causal(batch.document_ids), rows, length, length)
    for r in range(rows):
        for q in range(length):
            for k in range(length):
                expected = k <= q and batch.document_ids[r, q] == batch.document_ids[r, k]
                assert mask[r, 0, q, k] == expected


def test_block_mask_equals_loops():
    rows = rows_of(1)
    size, blocks = 4, 3
    batch = make_batch(rows, num_anchors=blocks, block_size=size, seeds=[(i,) for i in range(len(rows))])
    length = batch.input_ids.shape[1]
    mask = dense(own_block(batch.document_ids, batch.anchors, size), len(rows), blocks * size, length + blocks * size)
    assert mask.shape == (len(rows), 1, blocks * size, length + blocks * size)
    for r in range(len(rows)):
        for query in range(blocks * size):
            anchor = int(batch.anchors[r, query // size])
            for key in range(length + blocks * size):
                if key < length:
                    expected = key < anchor and batch.document_ids[r, key] == batch.document_ids[r, anchor]
                else:
                    expected = (key - length) // size == query // size
                assert bool(mask[r, 0, query, key]) == bool(expected)


def test_labels_equal_loops_and_stop_at_the_first_unsupervised_token():
    size = 6
    for row in rows_of(2, count=12):
        anchors = valid_anchors(row)
        labels = block_labels(row, anchors, size)
        for block, anchor in enumerate(anchors):
            alive = True
            for slot in range(size):
                at = anchor + slot
                inside = at < len(row.input_ids) and row.document_ids[at] == row.document_ids[anchor]
                alive = alive and inside and bool(row.supervised[at])
                assert labels[block, slot] == (row.input_ids[at] if alive else IGNORE)
            assert labels[block, 0] != IGNORE and labels[block, 1] != IGNORE


def test_every_anchor_that_decoding_could_meet_is_valid_and_no_other():
    for row in rows_of(3, count=12):
        valid = set(valid_anchors(row).tolist())
        for at in range(len(row.input_ids)):
            following = at + 1 < len(row.input_ids) and row.document_ids[at + 1] == row.document_ids[at]
            expected = row.supervised[at] and row.position_ids[at] > 0 and following and row.supervised[at + 1]
            assert (at in valid) == bool(expected)


def test_anchors_are_distinct_sorted_and_depend_on_the_seed_alone():
    row = rows_of(4)[0]
    first, again, other = (draw_anchors(row, 8, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert (first == again).all() and (first != other).any()
    assert (np.diff(first[first >= 0]) > 0).all()


def test_blocks_that_a_row_cannot_fill_carry_no_label():
    row = rows_of(5)[0]
    count = len(valid_anchors(row)) + 4
    batch = make_batch([row], num_anchors=count, block_size=4, seeds=[(0,)])
    assert (batch.labels[0, -4:] == IGNORE).all() and (batch.labels[0, :-4, 1] != IGNORE).all()


def test_packing_holds_every_document_once_and_restarts_positions():
    documents = random_documents(40, seed=6)
    rows = pack_documents(documents, 64, pad_id=0)
    packed = []
    for row in rows:
        for number in range(row.document_ids.max() + 1):
            here = row.document_ids == number
            assert (row.position_ids[here] == np.arange(here.sum())).all()
            packed.append((row.input_ids[here].tolist(), row.supervised[here].tolist()))
    expected = [(d.input_ids.tolist(), d.supervised.tolist()) for d in documents]
    assert sorted(packed) == sorted(expected)


def test_slot_positions_count_on_from_the_anchor():
    rows = rows_of(8)
    batch = make_batch(rows, num_anchors=3, block_size=5, seeds=[(i,) for i in range(len(rows))])
    positions = batch.slot_positions()
    for r in range(len(rows)):
        for a in range(3):
            start = int(batch.position_ids[r, batch.anchors[r, a]])
            assert positions[r, a].tolist() == list(range(start, start + 5))
    assert positions.dtype == torch.int64
