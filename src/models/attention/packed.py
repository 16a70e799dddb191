"""Attention over packed rows and blocks, registered with transformers as an attention function.

This supports every architecture whose attention dispatches to registered functions: layers are reused unchanged, with a
`View` as their `attention_mask`. Any other mask, as built by transformers' own models, is forwarded to transformers'
SDPA function.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from models.attention.compiled import compiled
from models.attention.masks import Tile, block_sparse, block_tiles, clean_tiles, dense, document_causal, own_block
from models.attention.tiles import attend_tiles, attend_to

NAME = "packed"  # name registered with transformers
KINDS = ("auto", "flex", "sdpa", "dense")
Mask = BlockMask | list[Tile] | Tensor
KeysValues = tuple[Tensor, Tensor]  # [R, key/value heads, tokens, head size] each


class LayerStopped(Exception):
    """Raised to abort a layer once its keys and values are computed, if its output is not needed."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's preallocated cache, with the indices that a pass writes to and the range that its queries read."""

    keys: Tensor  # [R, key/value heads, capacity, head size], written in place
    values: Tensor
    rows: Tensor  # [R, 1]
    at: Tensor  # [R or 1, tokens] indices to write to
    stop: int  # entries before this index are read
    only_finite: bool = False  # write non-finite numbers as 0

    def update(self, key: Tensor, value: Tensor) -> KeysValues:
        """Write the layer's keys and values to the cache and return the entries that its queries read.

        The target may overflow on a draft token, and non-finite keys and values turn attention into NaN even where they
        are masked. `only_finite` therefore prevents rejected drafts from corrupting earlier tokens.
        """
        for entries, own in ((self.keys, key), (self.values, value)):
            own = own.transpose(1, 2).to(entries.dtype)
            entries[self.rows, :, self.at] = own.nan_to_num(0.0, 0.0, 0.0) if self.only_finite else own
        return self.keys[:, :, : self.stop], self.values[:, :, : self.stop]


@dataclass
class View:
    """What the queries of one layer attend to, and what happens to the layer's own keys and values."""

    mask: Mask | None = None  # None: no masking
    context: KeysValues | None = None  # prepended to the layer's own keys and values
    cache: LayerCache | None = None  # the layer's keys and values are written to it, and its queries read from it
    keep: bool = False  # store the layer's own keys and values in `kept`
    stop: bool = False  # raise LayerStopped after keys and values are computed
    kept: KeysValues | None = None
    window: int | None = None  # window of the mask; must equal the layer's


@dataclass
class RowViews:
    """Separate views for groups of consecutive rows, which cover all rows in order."""

    parts: list[tuple[slice, View]]
    stop: bool = False


def clean_mask(document_ids: Tensor, kind: str, window: int | None = None) -> Mask:
    """Build the mask of `masks.document_causal` for an attention kernel. document_ids is [R, T]."""
    rows, length = document_ids.shape
    kind = resolve_kernel(kind, document_ids.device)
    if kind == "sdpa":
        return clean_tiles(document_ids, window)
    form = block_sparse if kind == "flex" else dense
    return form(document_causal(document_ids, window), rows, length, length, document_ids.device)


def blocks_mask(document_ids: Tensor, anchors: Tensor, block_size: int, kind: str, window: int | None = None) -> Mask:
    """Build the mask of `masks.own_block` for an attention kernel. document_ids is [R, T], anchors [R, A]."""
    rows, length = document_ids.shape
    queries = anchors.shape[1] * block_size
    kind = resolve_kernel(kind, document_ids.device)
    if kind == "sdpa":
        return block_tiles(document_ids, anchors, block_size, window)
    form = block_sparse if kind == "flex" else dense
    rule = own_block(document_ids, anchors, block_size, window)
    return form(rule, rows, queries, length + queries, document_ids.device)


def resolve_kernel(kind: str, device: torch.device) -> str:
    """Resolve `auto` to `flex` on GPUs and `sdpa` on CPUs, where FlexAttention has no backward pass.

    Raises:
        ValueError: the kernel is unknown.
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
    attention_mask: View | RowViews | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for a transformers layer: [R, heads, tokens, head size] -> [R, tokens, heads, head size].

    Raises:
        LayerStopped: the view has `stop` set.
        ValueError: the window of the view differs from the layer's, or the layer uses an unsupported attention feature.
    """
    view = attention_mask
    if isinstance(view, RowViews):
        outputs = [
            packed_attention(module, query[rows], key[rows], value[rows], own, scaling, dropout, **kwargs)[0]
            for rows, own in view.parts
        ]
        return torch.cat(outputs), None
    if not isinstance(view, View):
        return sdpa_attention_forward(module, query, key, value, view, dropout=dropout, scaling=scaling, **kwargs)
    query, key, value = gather_keys(module, query, key, value, view, **kwargs)
    if isinstance(view.mask, BlockMask):
        uncompiled = query.device.type == "cpu" or torch.compiler.is_compiling()
        attend: Any = flex_attention if uncompiled else _compiled_flex_attention()
        output = attend(query, key, value, block_mask=view.mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    if isinstance(view.mask, list):
        return attend_tiles(query, key, value, view.mask, scaling), None
    output = attend_to(query, key, value, view.mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def gather_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: View, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's queries and all keys and values they attend to, in the dtype of the attention kernel.

    Raises:
        LayerStopped, ValueError: see `packed_attention`.
    """
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} uses {unknown[0]}, which packed attention does not support.")
    if kwargs.get("sliding_window") != view.window:
        raise ValueError(
            f"{type(module).__name__} has sliding_window={kwargs.get('sliding_window')}, but its mask was built for "
            f"sliding_window={view.window}."
        )
    if view.keep:
        view.kept = (key, value)
    if view.stop:
        raise LayerStopped
    if view.context is not None:
        key = torch.cat([view.context[0], key.to(view.context[0].dtype)], dim=2)
        value = torch.cat([view.context[1], value.to(view.context[1].dtype)], dim=2)
    if view.cache is not None:
        key, value = view.cache.update(key, value)
    # Cast once here rather than by autocast in every tile: query/key norms output the dtype of their weights.
    kind = query.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # the meta device has no autocast
    dtype = torch.get_autocast_dtype(kind) if autocast else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return compiled(flex_attention, dynamic=False)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for masks built by transformers
