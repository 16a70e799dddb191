"""Who may attend to whom: each rule once, as a function of indices, and the forms in which attention takes it.

A rule is (row, head, query, key) -> bool, on numbers or tensors that broadcast: what FlexAttention calls a `mask_mod`.
Shapes as in `data.batch`.
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
TILE = 256  # queries of a tile, about: measured in docs/results/performance.md


def document_causal(document_ids: Tensor, window: int | None = None) -> Rule:
    """Clean tokens: token q attends to token k of the same document with q - window < k <= q. [R, T]"""

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (key <= query) & (document_ids[row, query] == document_ids[row, key])
        return allowed if window is None else allowed & (key > query - window)

    return rule


def own_block(document_ids: Tensor, anchors: Tensor, block_size: int, window: int | None = None) -> Rule:
    """Mask tokens: a slot of the block anchored at a attends to

    - clean tokens of the anchor's document at indices < a: strictly, since decoding knows no token from the anchor on
      when it drafts; with a window, slot j those > a + j - window, as a token in its place would; and
    - every slot of its own block, before and after it.

    Queries are the A*B slots of a row; keys are its T clean tokens, then its slots. [R, T], [R, A]; in decoding, an
    anchor may be T, one past the last token that is known.
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
    """Decoding: the token at a position attends to places <= it of a cache that holds each token at its position.

    `positions` is [R, queries].
    """

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = positions[row, query]
        return key <= position if window is None else (key <= position) & (key > position - window)

    return rule


def slots_first(rule: Rule, slots: int, tokens: int) -> Rule:
    """A rule over keys that are `tokens` tokens and then `slots` slots, where the slots come first."""

    def moved(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(row, head, query, (key - slots) % (slots + tokens))

    return moved


def per_window(windows: Iterable[int | None], form: Callable[[int | None], T]) -> list[T]:
    """For each layer what `form` makes of its window; layers of the same window share it."""
    windows = list(windows)
    made = {window: form(window) for window in dict.fromkeys(windows)}
    return [made[window] for window in windows]


def dense(rule: Rule, rows: int, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """[R, 1, queries, keys] the rule written out: for references, and for what cannot do better."""
    index = torch.arange(max(rows, queries, keys), device=device)
    return rule(index[:rows, None, None, None], index[0], index[:queries, None], index[:keys])


@functools.cache
def _mask_builder() -> Callable[..., BlockMask]:
    return compiled(create_block_mask)


def block_sparse(rule: Rule, rows: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The rule as FlexAttention takes it: which tiles of 128 x 128 to compute, and which of them to look into."""
    build = _mask_builder() if device.type == "cuda" else create_block_mask
    return build(rule, rows, None, queries, keys, device=device)


@dataclass(frozen=True)
class Tile:
    """Queries of one row that share their keys: one call of scaled-dot-product attention."""

    row: int
    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None  # [queries, keys] bool; None: causal, the keys being the queries' own


def clean_tiles(document_ids: Tensor, window: int | None = None) -> list[Tile]:
    """`document_causal` in tiles: one a document that is no longer than the window. They cover all queries in order."""
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
    """`own_block` in tiles of neighbouring blocks of one document. They cover all queries in order.

    Planned on the host: on a GPU that means waiting for it, once a batch.
    """
    device, document_ids, anchors = document_ids.device, document_ids.cpu(), anchors.cpu()
    rule, length = own_block(document_ids, anchors, block_size, window), document_ids.shape[1]
    at_once = max(1, TILE // block_size)
    tiles = []
    for row, (ids, places) in enumerate(zip(document_ids.tolist(), anchors.tolist(), strict=True)):
        starts = {ids[start]: start for start, _ in _documents(ids)}
        first = 0
        for document, members in groupby(ids[anchor] for anchor in places):
            end = first + len(list(members))
            for block in range(first, end, at_once):
                last = min(block + at_once, end)
                queries = slice(block * block_size, last * block_size)
                first_seen = starts[document]
                if window is not None:
                    first_seen = max(first_seen, min(places[block:last]) - window + 1)
                context = slice(first_seen, max(first_seen, *places[block:last]))
                slots = slice(length + queries.start, length + queries.stop)
                keys = torch.cat([_indices(context), _indices(slots)])
                mask = rule(torch.tensor(row), torch.tensor(0), _indices(queries)[:, None], keys)
                tiles.append(Tile(row, queries, (context, slots), mask.to(device)))
            first = end
    return tiles


def tile_pairs(tiles: list[Tile]) -> int:
    """Pairs of a query and a key that the tiles compute; those of a causal tile count in full."""
    return sum(
        (tile.queries.stop - tile.queries.start) * sum(part.stop - part.start for part in tile.keys) for tile in tiles
    )


def allowed_pairs(batch: Batch) -> tuple[int, int]:
    """Pairs of a query and a key that `document_causal`, but for padding, and `own_block` allow, in all rows."""
    size = batch.labels.shape[-1]
    text = batch.document_ids != PADDING_DOCUMENT
    at_anchor = batch.position_ids.gather(1, batch.anchors)
    return int((batch.position_ids + 1)[text].sum()), int(size * (at_anchor + size).sum())


def _documents(ids: list[int]) -> list[tuple[int, int]]:
    """First index and the one after the last of each document of a row."""
    bounds, start = [], 0
    for _, members in groupby(ids):
        stop = start + len(list(members))
        bounds.append((start, stop))
        start = stop
    return bounds


def _indices(part: slice) -> Tensor:
    return torch.arange(part.start, part.stop)
