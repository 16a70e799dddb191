"""Masks and labels against explicit loops over the rules."""

import numpy as np
import pytest
import torch
from helpers.shared import random_documents

from data.batch import IGNORE, PADDING_DOCUMENT
from data.preprocess.anchors import block_labels, draw_anchors, make_batch, valid_anchors
from data.preprocess.packing import pack_documents
from models.attention.masks import (
    allowed_pairs,
    block_sparse,
    block_tiles,
    cached_causal,
    clean_tiles,
    dense,
    document_causal,
    own_block,
    tile_pairs,
)
from models.attention.packed import View, blocks_mask, clean_mask, packed_attention

WINDOWS = (None, 7)  # of layers; documents have 12 to 40 tokens


def rows_of(seed: int, count: int = 7, max_seq_len: int = 64):
    return pack_documents(random_documents(count, seed), max_seq_len, pad_id=0)


@pytest.mark.parametrize("window", WINDOWS)
def test_document_causal_mask_equals_loops(window):
    batch = make_batch(rows_of(0), num_anchors=3, block_size=4, seeds=[(i,) for i in range(len(rows_of(0)))])
    rows, length = batch.input_ids.shape
    mask = dense(document_causal(batch.document_ids, window), rows, length, length)
    for r in range(rows):
        for q in range(length):
            for k in range(length):
                expected = k <= q and batch.document_ids[r, q] == batch.document_ids[r, k]
                if window:
                    expected = expected and q - k < window
                assert mask[r, 0, q, k] == expected


@pytest.mark.parametrize("window", WINDOWS)
def test_block_mask_equals_loops(window):
    rows = rows_of(1)
    size, blocks = 4, 3
    batch = make_batch(rows, num_anchors=blocks, block_size=size, seeds=[(i,) for i in range(len(rows))])
    length = batch.input_ids.shape[1]
    rule = own_block(batch.document_ids, batch.anchors, size, window)
    mask = dense(rule, len(rows), blocks * size, length + blocks * size)
    assert mask.shape == (len(rows), 1, blocks * size, length + blocks * size)
    for r in range(len(rows)):
        for query in range(blocks * size):
            anchor = int(batch.anchors[r, query // size])
            for key in range(length + blocks * size):
                if key < length:
                    expected = key < anchor and batch.document_ids[r, key] == batch.document_ids[r, anchor]
                    if window:
                        expected = expected and (anchor + query % size) - key < window
                else:
                    expected = (key - length) // size == query // size
                assert bool(mask[r, 0, query, key]) == bool(expected)


@pytest.mark.parametrize("window", WINDOWS)
def test_cached_mask_equals_loops(window):
    positions = torch.tensor([[0, 1, 2], [11, 12, 13]])
    mask = dense(cached_causal(positions, window), 2, 3, 16)
    for r in range(2):
        for query in range(3):
            for place in range(16):
                distance = int(positions[r, query]) - place
                assert bool(mask[r, 0, query, place]) == (0 <= distance < (window or 100))


def with_tiles(seed: int, size: int, blocks: int, window: int | None = None):
    """Return a batch with unused anchors, and both rules with their queries and keys."""
    rows = rows_of(seed, count=9)
    batch = make_batch(rows, num_anchors=blocks, block_size=size, seeds=[(i,) for i in range(len(rows))])
    length, queries = batch.input_ids.shape[1], blocks * size
    clean = (document_causal(batch.document_ids, window), length, length)
    slots = (own_block(batch.document_ids, batch.anchors, size, window), queries, length + queries)
    return batch, clean, slots


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("size", "blocks"), [(4, 3), (4, 40), (100, 5), (300, 2)])
def test_tiles_contain_every_allowed_pair_exactly_once(size, blocks, window, monkeypatch):
    monkeypatch.setattr("models.attention.masks.TILE", 256 if window is None else 8)  # documents of several tiles
    batch, clean, slots = with_tiles(7, size, blocks, window)
    tilings = (clean_tiles(batch.document_ids, window), block_tiles(batch.document_ids, batch.anchors, size, window))
    for (rule, queries, keys), tiles, allowed in zip((clean, slots), tilings, allowed_pairs(batch), strict=True):
        expected = dense(rule, len(batch.input_ids), queries, keys)[:, 0]
        found = torch.zeros_like(expected, dtype=torch.int)
        for tile in tiles:
            at = torch.cat([torch.arange(part.start, part.stop) for part in tile.keys])
            square = torch.ones(tile.queries.stop - tile.queries.start, len(at), dtype=torch.bool)
            found[tile.row, tile.queries, at] += square.tril() if tile.mask is None else tile.full_mask()
        assert torch.equal(found, expected.int())
        assert tile_pairs(tiles) >= int(expected.sum())
        if queries == keys:  # padding attends to itself, which has no effect
            expected = expected & (batch.document_ids != PADDING_DOCUMENT)[:, None]
        assert window or int(expected.sum()) == allowed


@torch.no_grad()
def test_block_sparse_masks_compute_every_allowed_pair():
    batch, *rules = with_tiles(8, 16, 20)
    rows, side = len(batch.input_ids), 128
    for rule, queries, keys in rules:
        mask = block_sparse(rule, rows, queries, keys, torch.device("cpu"))
        assert mask.shape == (rows, 1, queries, keys)
        computed = mask.to_dense()  # [rows, 1, tiles of queries, tiles of keys]
        for row, _, query, key in dense(rule, rows, queries, keys).nonzero().tolist():
            assert computed[row, 0, query // side, key // side]


@pytest.mark.slow(but="[dense-7]")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["sdpa", "flex", "dense"])
@torch.no_grad()
def test_attention_equals_loops_over_heads_queries_and_keys(kind, window):
    batch, (clean, length, _), (slots, queries, _) = with_tiles(9, 6, 4, window)
    rows, heads, shared, size = len(batch.input_ids), 4, 2, 16
    torch.manual_seed(0)
    context = tuple(torch.randn(rows, shared, length, size) for _ in range(2))
    blocks = (batch.document_ids, batch.anchors, 6, kind)
    masks = (clean_mask(batch.document_ids, kind, window), blocks_mask(*blocks, window))
    for mask, rule, count, before in ((masks[0], clean, length, None), (masks[1], slots, queries, context)):
        query, key, value = (torch.randn(rows, n, count, size) for n in (heads, shared, shared))
        view = View(mask, before, window=window)
        out, _ = packed_attention(torch.nn.Identity(), query, key, value, view, scaling=0.3, sliding_window=window)
        if before:
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        for r in range(rows):
            for h in range(heads):
                for q in range(0, count, 5):
                    allowed = [k for k in range(key.shape[2]) if rule(*map(torch.tensor, (r, h, q, k)))]
                    scores = [0.3 * query[r, h, q] @ key[r, h // 2, k] for k in allowed]
                    weights = torch.stack(scores).double().softmax(0)
                    expected = sum(w * value[r, h // 2, k] for w, k in zip(weights, allowed, strict=True))
                    assert torch.allclose(out[r, q, h], expected.float(), atol=1e-5)


def test_tiles_give_the_gradient_of_the_dense_mask():
    batch, _, _ = with_tiles(10, 6, 5)
    rows, length = batch.input_ids.shape
    gradients = []
    for kind in ("sdpa", "dense"):
        torch.manual_seed(0)
        context = tuple(torch.randn(rows, 2, length, 8, dtype=torch.float64) for _ in range(2))
        tensors = [torch.randn(rows, n, 30, 8, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]
        view = View(blocks_mask(batch.document_ids, batch.anchors, 6, kind), context)
        out, _ = packed_attention(torch.nn.Identity(), *tensors, view, scaling=0.3)
        gradients.append(torch.autograd.grad(out.sin().sum(), tensors))
    for tiled, expected in zip(*gradients, strict=True):
        assert torch.allclose(tiled, expected, atol=1e-12)


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


def test_valid_anchors_are_exactly_those_that_decoding_can_reach():
    for row in rows_of(3, count=12):
        valid = set(valid_anchors(row).tolist())
        for at in range(len(row.input_ids)):
            following = at + 1 < len(row.input_ids) and row.document_ids[at + 1] == row.document_ids[at]
            expected = row.supervised[at] and row.position_ids[at] > 0 and following and row.supervised[at + 1]
            assert (at in valid) == bool(expected)


def test_anchors_are_distinct_sorted_and_depend_only_on_the_seed():
    row = rows_of(4)[0]
    first, again, other = (draw_anchors(row, 8, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert (first == again).all() and (first != other).any()
    assert (np.diff(first[first >= 0]) > 0).all()


def test_unused_blocks_of_a_row_have_no_labels():
    row = rows_of(5)[0]
    count = len(valid_anchors(row)) + 4
    batch = make_batch([row], num_anchors=count, block_size=4, seeds=[(0,)])
    assert (batch.labels[0, -4:] == IGNORE).all() and (batch.labels[0, :-4, 1] != IGNORE).all()


def test_packing_contains_every_document_once_and_restarts_positions():
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


def test_slot_positions_start_at_the_anchor():
    rows = rows_of(8)
    batch = make_batch(rows, num_anchors=3, block_size=5, seeds=[(i,) for i in range(len(rows))])
    positions = batch.slot_positions()
    for r in range(len(rows)):
        for a in range(3):
            start = int(batch.position_ids[r, batch.anchors[r, a]])
            assert positions[r, a].tolist() == list(range(start, start + 5))
    assert positions.dtype == torch.int64
