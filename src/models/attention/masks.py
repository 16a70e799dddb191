"""Mask rules, each defined once as a function of indices, and their conversion to the mask formats of the kernels.

A rule is (row, head, query, key) -> bool on integers or broadcastable tensors, i.e. a FlexAttention `mask_mod`.
The letters in shapes are defined in `data.batch`.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from data.batch import PADDING_DOCUMENT, Batch
from models.attention.compiled import compiled

T = TypeVar("T")
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TILE = 256  # approximate queries per tile; tuned in docs/results/performance.md


def document_causal(document_ids: Tensor, window: int | None = None) -> Rule:
    """Return the mask rule for clean tokens: q attends to each k in its document with q - window < k <= q.

    document_ids is [R, T].
    """

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (key <= query) & (document_ids[row, query] == document_ids[row, key])
        return allowed if window is None else allowed & (key > query - window)

    return rule


def own_block(document_ids: Tensor, anchors: Tensor, block_size: int, window: int | None = None) -> Rule:
    """Return the mask rule for mask tokens. A slot in a block with anchor `a` attends to

    - clean tokens of the anchor's document at indices < a, since tokens from the anchor on are not yet known in
      decoding; with a window, slot j attends only to indices > a + j - window, like a token at its position; and
    - all slots of the same block, in both directions.

    Queries are the A*B slots of a row; keys are the T clean tokens of the row, followed by its slots. document_ids is
    [R, T] and anchors [R, A]; in decoding, an anchor may be T, one past the last known token.
    """
    length = document_ids.shape[1]
    anchor_document = document_ids.gather(1, anchors.clamp(max=length - 1))  # [R, A]

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        known = key < anchors[row, block]
        if window is not None:
            known = known & (key > anchors[row, block] + query % block_size - window)
        same_document = document_ids[row, key.clamp(max=length - 1)] == anchor_document[row, block]
        return (known & same_document) | ((key >= length) & ((key - length) // block_size == block))

    return rule


def cached_causal(positions: Tensor, window: int | None = None) -> Rule:
    """Return the mask rule for decoding: a query at position p attends to cache entries k with p - window < k <= p.

    Each token is stored at the cache index that equals its position. `positions` is [R, queries].
    """

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = positions[row, query]
        return key <= position if window is None else (key <= position) & (key > position - window)

    return rule


def slots_first(rule: Rule, slots: int, tokens: int) -> Rule:
    """Adapt a rule whose keys are `tokens` tokens followed by `slots` slots to keys that start with the slots."""

    def moved(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(row, head, query, (key - slots) % (slots + tokens))

    return moved


def per_window(windows: Iterable[int | None], form: Callable[[int | None], T]) -> list[T]:
    """Apply `form` to each layer's window; layers with the same window share the result."""
    windows = list(windows)
    made = {window: form(window) for window in dict.fromkeys(windows)}
    return [made[window] for window in windows]


def dense(rule: Rule, rows: int, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Materialize a rule as a dense mask [R, 1, queries, keys], for reference code and kernels without sparse masks."""
    index = torch.arange(max(rows, queries, keys), device=device)
    return rule(index[:rows, None, None, None], index[0], index[:queries, None], index[:keys])


@functools.cache
def _mask_builder() -> Callable[..., BlockMask]:
    return compiled(create_block_mask)


def block_sparse(rule: Rule, rows: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """Convert a rule to a FlexAttention BlockMask, which lists the 128 x 128 tiles to compute and those to mask."""
    build = _mask_builder() if device.type == "cuda" else create_block_mask
    return build(rule, rows, None, queries, keys, device=device)


@dataclass(frozen=True)
class Tile:
    """A set of queries in one row that attend to the same keys; computed by a single SDPA call."""

    row: int
    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None  # [queries, m] bool for the last m keys; the keys before are all allowed. None: causal, where
    # keys and queries are the same tokens

    @property
    def lengths(self) -> list[int]:
        """Number of keys in each part of `keys`."""
        return [part.stop - part.start for part in self.keys]

    def full_mask(self) -> Tensor | None:
        """Return the mask for all keys, [queries, keys] bool, or None if the tile is causal."""
        if self.mask is None or self.mask.shape[1] == sum(self.lengths):
            return self.mask
        before = self.mask.new_ones(len(self.mask), sum(self.lengths) - self.mask.shape[1])
        return torch.cat([before, self.mask], dim=1)


def clean_tiles(document_ids: Tensor, window: int | None = None) -> list[Tile]:
    """Split `document_causal` into tiles that cover all queries in order. Documents within the window are one tile."""
    tiles = []
    for row, ids in enumerate(document_ids.tolist()):
        for start, stop in _documents(ids):
            if window is None or stop - start <= window:
                tiles.append(Tile(row, slice(start, stop), (slice(start, stop),), None))
                continue
            for first in range(start, stop, TILE):
                queries = slice(first, min(first + TILE, stop))
                keys = slice(max(start, first - window + 1), queries.stop)
                distance = _indices(queries)[:, None] - _indices(keys)
                mask = (distance >= 0) & (distance < window)
                tiles.append(Tile(row, queries, (keys,), mask.to(document_ids.device)))
    return tiles


def block_tiles(document_ids: Tensor, anchors: Tensor, block_size: int, window: int | None = None) -> list[Tile]:
    """Split `own_block` into tiles that cover all queries in order, each with consecutive blocks from one document.

    Tiles are built on the CPU, which costs a device synchronization if the inputs are on a GPU.
    """
    device, document_ids, anchors = document_ids.device, document_ids.cpu(), anchors.cpu()
    rule, length = own_block(document_ids, anchors, block_size, window), document_ids.shape[1]
    at_once = max(1, TILE // block_size)
    tiles = []
    for row, (ids, row_anchors) in enumerate(zip(document_ids.tolist(), anchors.tolist(), strict=True)):
        starts = {ids[start]: start for start, _ in _documents(ids)}
        first = 0
        for document, members in groupby(ids[anchor] for anchor in row_anchors):
            end = first + len(list(members))
            for block in range(first, end, at_once):
                last = min(block + at_once, end)
                queries = slice(block * block_size, last * block_size)
                first_seen = starts[document]
                if window is not None:
                    first_seen = max(first_seen, min(row_anchors[block:last]) - window + 1)
                context = slice(first_seen, max(first_seen, *row_anchors[block:last]))
                slots = slice(length + queries.start, length + queries.stop)
                # All slots see the tokens before the first anchor, unless a window hides some of them.
                seen = context.start if window is not None else max(context.start, min(row_anchors[block:last]))
                keys = torch.cat([_indices(slice(seen, context.stop)), _indices(slots)])
                mask = rule(torch.tensor(row), torch.tensor(0), _indices(queries)[:, None], keys)
                tiles.append(Tile(row, queries, (context, slots), mask.to(device)))
            first = end
    return tiles


def tile_pairs(tiles: list[Tile]) -> int:
    """Count the query-key pairs in the tiles, including masked ones."""
    return sum((tile.queries.stop - tile.queries.start) * sum(tile.lengths) for tile in tiles)


def allowed_pairs(batch: Batch) -> tuple[int, int]:
    """Count the query-key pairs allowed by `document_causal` (excluding padding) and by `own_block`, over all rows."""
    size = batch.labels.shape[-1]
    text = batch.document_ids != PADDING_DOCUMENT
    at_anchor = batch.position_ids.gather(1, batch.anchors)
    return int((batch.position_ids + 1)[text].sum()), int(size * (at_anchor + size).sum())


def _documents(ids: list[int]) -> list[tuple[int, int]]:
    """Return the (start, stop) indices of each document in a row."""
    bounds, start = [], 0
    for _, members in groupby(ids):
        stop = start + len(list(members))
        bounds.append((start, stop))
        start = stop
    return bounds


def _indices(part: slice) -> Tensor:
    return torch.arange(part.start, part.stop)
