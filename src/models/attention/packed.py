"""Attention of packed rows and of blocks, as an attention function of transformers.

Every architecture whose attention calls such a function can be a target: layers are taken as they are, and what a query
sees travels as their `attention_mask`. Anything but a `View` goes to transformers' own function: when its own model and
cache are used.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from models.attention.compiled import compiled
from models.attention.masks import Tile, block_sparse, block_tiles, clean_tiles, dense, document_causal, own_block

NAME = "packed"  # as transformers knows it
KINDS = ("auto", "flex", "sdpa", "dense")
Mask = BlockMask | list[Tile] | Tensor
KeysValues = tuple[Tensor, Tensor]  # [R, key/value heads, tokens, head size] each


class LayerStopped(Exception):
    """A layer's keys and values are known, and nothing else was wanted of it."""


@dataclass(frozen=True)
class Places:
    """Where one layer's keys and values go in a cache that was allocated beforehand, and how far its queries look."""

    keys: Tensor  # [R, key/value heads, capacity, head size], written in place
    values: Tensor
    rows: Tensor  # [R, 1]
    at: Tensor  # [R or 1, tokens]
    stop: int  # places before it are read
    only_finite: bool = False  # write 0 for what is not

    def exchange(self, key: Tensor, value: Tensor) -> KeysValues:
        """Write the layer's own; returns all that its queries look at.

        A draft may be a token on which the target overflows. Masked queries would read that as NaN, so a rejected draft
        would change the tokens before it.
        """
        for places, own in ((self.keys, key), (self.values, value)):
            own = own.transpose(1, 2).to(places.dtype)
            places[self.rows, :, self.at] = own.nan_to_num(0.0, 0.0, 0.0) if self.only_finite else own
        return self.keys[:, :, : self.stop], self.values[:, :, : self.stop]


@dataclass
class View:
    """What the queries of one layer see, and what becomes of its keys and values."""

    mask: Mask | None = None  # None: every query sees every key
    context: KeysValues | None = None  # put in front of the layer's own
    places: Places | None = None  # of a cache that the layer's own are written to, and all are read from
    keep: bool = False  # leave the layer's own keys and values in `kept`
    stop: bool = False  # raise LayerStopped once they are there
    kept: KeysValues | None = None
    window: int | None = None  # that the mask was made for; a layer with another one refuses it


def clean_mask(document_ids: Tensor, kind: str, window: int | None = None) -> Mask:
    """`masks.document_causal` for a kind of attention. [R, T]"""
    rows, length = document_ids.shape
    kind = resolved(kind, document_ids.device)
    if kind == "sdpa":
        return clean_tiles(document_ids, window)
    form = block_sparse if kind == "flex" else dense
    return form(document_causal(document_ids, window), rows, length, length, document_ids.device)


def blocks_mask(document_ids: Tensor, anchors: Tensor, block_size: int, kind: str, window: int | None = None) -> Mask:
    """`masks.own_block` for a kind of attention. [R, T], [R, A]"""
    rows, length = document_ids.shape
    queries = anchors.shape[1] * block_size
    kind = resolved(kind, document_ids.device)
    if kind == "sdpa":
        return block_tiles(document_ids, anchors, block_size, window)
    form = block_sparse if kind == "flex" else dense
    rule = own_block(document_ids, anchors, block_size, window)
    return form(rule, rows, queries, length + queries, document_ids.device)


def resolved(kind: str, device: torch.device) -> str:
    """`auto` is FlexAttention on GPUs; its CPU version has no gradient.

    Raises:
        ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"attention={kind!r}: expected one of {', '.join(KINDS)}.")
    if kind == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    return kind


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: View | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Called by the attention modules of transformers. [R, heads, tokens, head size] -> [R, tokens, heads, head size].

    Raises:
        LayerStopped: the view asked for it.
        ValueError: the layer has another window than the view, or does something to attention that this does not.
    """
    view = attention_mask
    if not isinstance(view, View):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} uses {unknown[0]}, which is not supported.")
    if kwargs.get("sliding_window") != view.window:
        raise ValueError(
            f"{type(module).__name__} has a window of {kwargs.get('sliding_window')}, its mask one of {view.window}."
        )
    if view.keep:
        view.kept = (key, value)
    if view.stop:
        raise LayerStopped
    if view.context is not None:
        key = torch.cat([view.context[0], key.to(view.context[0].dtype)], dim=2)
        value = torch.cat([view.context[1], value.to(view.context[1].dtype)], dim=2)
    if view.places is not None:
        key, value = view.places.exchange(key, value)
    # Once, and not by autocast in every tile. Norms of the heads leave queries and keys in the dtype of their weights.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(view.mask, BlockMask):
        attend = flex_attention if kind == "cpu" or torch.compiler.is_compiling() else _compiled_flex_attention()
        output = attend(query, key, value, block_mask=view.mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    if isinstance(view.mask, list):
        return _tiled(query, key, value, view.mask, scaling), None
    output = _scaled_dot_product(query, key, value, view.mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return compiled(flex_attention, dynamic=False)


@torch.compiler.disable
def _tiled(query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scaling: float | None) -> Tensor:
    """[R, queries, heads, head size]"""
    rows, heads, queries, size = query.shape
    outputs = []
    for tile in tiles:
        row = slice(tile.row, tile.row + 1)
        keys, values = (
            torch.cat([tensor[row, :, part] for part in tile.keys], dim=2)
            if len(tile.keys) > 1
            else tensor[row, :, tile.keys[0]]
            for tensor in (key, value)
        )
        causal = tile.mask is None
        output = _scaled_dot_product(query[row, :, tile.queries], keys, values, tile.mask, scale=scaling, causal=causal)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1).view(rows, queries, heads, size)


def _scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None, causal: bool = False
) -> Tensor:
    """Grouped key/value heads are repeated only where the fast kernels would not take them: on GPUs, with a mask."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None and query.is_cuda and groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # where transformers makes the mask
