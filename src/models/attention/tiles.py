"""Scaled-dot-product attention over the tiles of packed rows, in memory proportional to the rows' length."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.attention.masks import Tile

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.compiler.disable
def attend_tiles(query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scaling: float | None) -> Tensor:
    """Run attention tile by tile. Return [R, queries, heads, head size of `value`].

    Args:
        query: [R, heads, queries, head size].
        key: [R, key/value heads, keys, head size].
        value: [R, key/value heads, keys, head size], possibly with another head size.
        scaling: factor of the scores; None: 1 / sqrt(head size).
    """
    rows, heads, queries, size = query.shape
    tracked = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if tracked and query.device.type == "cpu" and size == value.shape[-1]:
        return _Tiled.apply(query, key, value, tiles, scaling)
    outputs = []
    for tile in tiles:
        parts = query[tile.row : tile.row + 1, :, tile.queries], *_keys_values(key, value, tile)
        output = attend_to(*parts, tile.full_mask(), scale=scaling, causal=tile.mask is None)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1).view(rows, queries, heads, value.shape[-1])


class _Tiled(torch.autograd.Function):
    """Attention on CPUs whose backward pass joins the keys and values of each tile again.

    Autograd would keep the joined keys and values and a floating-point mask of every tile and layer: with evenly
    spaced anchors, memory quadratic in the row's length. The kernels are those of `scaled_dot_product_attention`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scaling: float | None
    ) -> Tensor:
        rows, heads, queries, size = query.shape
        output = query.new_empty(rows, queries, heads, size)
        scores = query.new_empty(
            rows, queries, heads, dtype=torch.promote_types(query.dtype, torch.float32)
        )  # log-sum-exp
        for tile in tiles:
            row, at = slice(tile.row, tile.row + 1), tile.queries
            tensors = query[row, :, at], *_keys_values(key, value, tile)
            found, log_sum_exp = FUSED(*tensors, 0.0, tile.mask is None, **_options(tile, query, scaling))
            output[row, at], scores[row, at] = found.transpose(1, 2), log_sum_exp.transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, scores)
        ctx.tiles, ctx.scaling = tiles, scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, scores = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for tile in reversed(ctx.tiles):
            row, at = slice(tile.row, tile.row + 1), tile.queries
            of_tile = (tensor[row, at].transpose(1, 2) for tensor in (output, scores))
            tensors = query[row, :, at], *_keys_values(key, value, tile), *of_tile
            options = _options(tile, query, ctx.scaling)
            found = FUSED_BACKWARD(gradient[row, at].transpose(1, 2), *tensors, 0.0, tile.mask is None, **options)
            of_query[row, :, at] = found[0]
            for total, parts in ((of_key, found[1]), (of_value, found[2])):
                for part, own in zip(tile.keys, parts.split(tile.lengths, dim=2), strict=True):
                    total[row, :, part] += own
        return of_query, of_key, of_value, None, None


def _keys_values(key: Tensor, value: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a tile [1, key/value heads, keys, head size], joined if it has several parts."""
    row = slice(tile.row, tile.row + 1)
    if len(tile.keys) == 1:
        return key[row, :, tile.keys[0]], value[row, :, tile.keys[0]]
    keys, values = (torch.cat([tensor[row, :, part] for part in tile.keys], dim=2) for tensor in (key, value))
    return keys, values


def _options(tile: Tile, query: Tensor, scaling: float | None) -> dict[str, Any]:
    """Return the kernels' keyword arguments, with the mask as numbers to add to the scores."""
    mask = tile.full_mask()
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    return {"attn_mask": mask, "scale": scaling}


def attend_to(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None, causal: bool = False
) -> Tensor:
    """Run SDPA. Repeat grouped K/V heads only on GPUs with a mask, where the fast kernels do not support grouping."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None and query.is_cuda and groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )
