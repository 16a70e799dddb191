"""Who may attend to whom. True means: may attend. Shapes as in `data.batch`."""

import torch
from torch import Tensor


def document_causal_mask(document_ids: Tensor) -> Tensor:
    """Clean tokens: token q attends to token k of the same document with k <= q. [R, T] -> [R, 1, T, T]."""
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (same_document & causal)[:, None]


def block_mask(document_ids: Tensor, anchors: Tensor, block_size: int) -> Tensor:
    """Mask tokens: a slot of the block anchored at a attends to

    - clean tokens of the anchor's document at indices < a: strictly, since decoding knows no token from the anchor on
      when it drafts; and
    - every slot of its own block, before and after it.

    [R, T], [R, A] -> [R, 1, A*B, T + A*B]; the keys are the clean tokens of the row, then all slots of all blocks.
    """
    rows, length = document_ids.shape
    blocks = anchors.shape[1]
    anchor_document = document_ids.gather(1, anchors)  # [R, A]
    index = torch.arange(length, device=document_ids.device)
    context = (document_ids[:, None, :] == anchor_document[:, :, None]) & (index < anchors[:, :, None])  # [R, A, T]
    context = context.repeat_interleave(block_size, dim=1)  # [R, A*B, T]
    block = torch.arange(blocks * block_size, device=document_ids.device) // block_size
    same_block = (block[:, None] == block[None, :]).expand(rows, -1, -1)  # [R, A*B, A*B]
    return torch.cat([context, same_block], dim=2)[:, None]
