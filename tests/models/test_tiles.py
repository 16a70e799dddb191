"""Attention over tiles: gradients of SDPA, and memory proportional to the length of the rows."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from data.batch import Batch
from models.attention.masks import block_tiles, clean_tiles, dense, own_block
from models.attention.tiles import attend_tiles
from models.cost.trace import full_batch

SIZE = 8  # slots per block


def joined(batch: Batch, dtype: torch.dtype, heads: tuple[int, int] = (4, 2)) -> list[torch.Tensor]:
    """Return random queries of the slots, and keys and values of tokens and slots, that require gradients."""
    rows, length = batch.input_ids.shape
    slots = batch.labels[0].numel()
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads[0], slots), (heads[1], length + slots), (heads[1], length + slots))
    made = [torch.randn(rows, count, tokens, 16, generator=generator, dtype=dtype) for count, tokens in sizes]
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("window", [None, 50])
def test_gradients_equal_those_of_one_attention_with_a_dense_mask(window):
    batch = full_batch(2, 400, 90, SIZE)
    batch.document_ids[:, 150:] = 1
    tensors = joined(batch, torch.float64)
    rule = own_block(batch.document_ids, batch.anchors, SIZE, window)
    mask = dense(rule, 2, tensors[0].shape[2], tensors[1].shape[2])
    tiles = block_tiles(batch.document_ids, batch.anchors, SIZE, window)
    assert len(tiles) > 4
    weights = torch.randn(2, tensors[0].shape[2], 4, 16, dtype=torch.float64)
    whole = scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    expected = torch.autograd.grad((whole * weights).sum(), tensors)
    found = attend_tiles(*tensors, tiles, None)
    torch.testing.assert_close(found, whole)
    for own, other in zip(torch.autograd.grad((found * weights).sum(), tensors), expected, strict=True):
        torch.testing.assert_close(own, other)
    with torch.no_grad():
        torch.testing.assert_close(attend_tiles(*tensors, tiles, None), whole)


def test_causal_tiles_have_the_gradients_of_each_document():
    batch = full_batch(1, 60, 1, SIZE)
    batch.document_ids[:, 25:] = 1
    query, key, value = (torch.randn(1, 2, 60, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = attend_tiles(query, key, value, clean_tiles(batch.document_ids), None)
    parts = [[tensor[:, :, part] for tensor in (query, key, value)] for part in (slice(25), slice(25, 60))]
    whole = torch.cat([scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2).transpose(1, 2)
    torch.testing.assert_close(found, whole)
    for own, other in zip(
        *(torch.autograd.grad((o**2).sum(), (query, key, value)) for o in (found, whole)), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_values_may_have_another_head_size_than_keys():
    tiles = clean_tiles(torch.zeros(2, 9, dtype=torch.long))
    query, key, value = (torch.randn(2, heads, 9, size) for heads, size in ((4, 16), (2, 16), (2, 8)))
    found = attend_tiles(query, key, value, tiles, None)
    whole = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, whole)


def kept_for_backward(length: int) -> int:
    """Return the bytes of masks and tensors kept for the backward pass, with one block per 32 tokens."""
    batch = full_batch(1, length, length // 32, SIZE)
    tensors, tiles = joined(batch, torch.float32), block_tiles(batch.document_ids, batch.anchors, SIZE)
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend_tiles(*tensors, tiles, None)
    return sum(storages.values()) + sum(tile.mask.nbytes for tile in tiles)


def test_memory_grows_linearly_with_the_length_of_a_row_and_its_blocks():
    short, long = kept_for_backward(2048), kept_for_backward(8192)
    assert long < 4.2 * short
