"""`Batch`, the only interface between data and models.

Shape legend, used throughout the project:
    R  rows in the batch              T  tokens per row
    A  anchors (blocks) per row       B  block size: slots per block
    H  hidden size of the target      V  vocabulary size
    L  draft layers                   N  target layers; S = N - L is the split layer
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # label of a slot that is excluded from the loss
PADDING_DOCUMENT = -1


@dataclass
class Batch:
    """Packed rows of clean tokens, with the anchors and labels of the blocks to draft."""

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, restarting at 0 for each document
    document_ids: Tensor  # [R, T] int64, index of the document within the row; PADDING_DOCUMENT for padding
    anchors: Tensor  # [R, A] int64, each block's anchor as an index into its row, ascending; 0 for unused blocks
    labels: Tensor  # [R, A, B] int64, token at anchor + slot; IGNORE from the first unlabeled slot onwards
    # Number of labeled slots in each of the R*A blocks. Kept on the host because these counts determine tensor shapes,
    # and reading them from the device would force a synchronization. Computed from `labels` if omitted.
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.lengths:
            self.lengths = tuple((self.labels != IGNORE).sum(-1).flatten().tolist())

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory, so that transfers to the GPU can be asynchronous."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changes: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changes)

    def labelled_slots(self, first: int) -> tuple[Tensor, list[int]]:
        """Select the labeled slots with index `first` or higher in every block.

        Returns:
            `indices`, the ascending indices [n] of the selected slots among all R*A*B slots, and `offsets`, a list of
            R*A + 1 integers: the slots of block `i` are `indices[offsets[i]:offsets[i + 1]]`.
        """
        counts = [max(0, length - first) for length in self.lengths]
        labelled = self.labels != IGNORE
        labelled[..., :first] = False
        # Sort stably and take the first n; n is known on the host. `nonzero` would force a synchronization.
        order = torch.argsort(~labelled.flatten(), stable=True)
        before = list(accumulate(counts, initial=0))
        return order[: before[-1]], before

    def slot_positions(self) -> Tensor:
        """Return the slots' position ids [R, A, B]: the anchor's position in its document plus the slot index."""
        at_anchor = self.position_ids.gather(1, self.anchors)  # [R, A]
        slots = torch.arange(self.labels.shape[-1], device=self.anchors.device)
        return at_anchor[..., None] + slots
