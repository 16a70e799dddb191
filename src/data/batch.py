"""The one contract between data and models.

Shape legend, used all over the project:
    R  rows in the batch              T  tokens per row
    A  anchors (blocks) per row       B  block size: slots per block
    H  hidden size of the target      V  vocabulary size
    L  draft layers                   N  target layers; S = N - L is the split layer
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE = -100  # label of a slot that carries no loss
PADDING_DOCUMENT = -1


@dataclass
class Batch:
    """Packed rows of clean tokens and the blocks to be drafted in them."""

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, restarting at 0 with every document
    document_ids: Tensor  # [R, T] int64, which document of its row a token belongs to; PADDING_DOCUMENT for padding
    anchors: Tensor  # [R, A] int64, index in the row of each block's anchor, ascending
    labels: Tensor  # [R, A, B] int64, the token at anchor + slot, or IGNORE

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return Batch(**moved)

    def slot_positions(self) -> Tensor:
        """[R, A, B] position of each slot in its document: slot j sits at the anchor's position plus j."""
        at_anchor = self.position_ids.gather(1, self.anchors)  # [R, A]
        slots = torch.arange(self.labels.shape[-1], device=self.anchors.device)
        return at_anchor[..., None] + slots
