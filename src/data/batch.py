"""The one contract between data and models.

Shape legend, used all over the project:
    R  rows in the batch              T  tokens per row
    A  anchors (blocks) per row       B  block size: slots per block
    H  hidden size of the target      V  vocabulary size
    L  draft layers                   N  target layers; S = N - L is the split layer
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate

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
    labels: Tensor  # [R, A, B] int64, the token at anchor + slot, or IGNORE from some slot on
    # R*A numbers: how many slots of each block carry a label. On the host, since it decides shapes: a device that is
    # asked has to finish all its work first. Counted from the labels if not given.
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.lengths:
            self.lengths = tuple((self.labels != IGNORE).sum(-1).flatten().tolist())

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU can copy from while it computes."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})

    def labelled_slots(self, first: int) -> tuple[Tensor, list[int]]:
        """The slots from `first` on of each block that carry a label, in order.

        Returns:
            [n] their indices among the R*A*B slots; and R*A + 1 numbers, how many of them come before each block.
        """
        counts = [max(0, length - first) for length in self.lengths]
        labelled = self.labels != IGNORE
        labelled[..., :first] = False
        # The first n of a stable sort, n being known: `nonzero` would wait for the device to count.
        order = torch.argsort(~labelled.flatten(), stable=True)
        before = list(accumulate(counts, initial=0))
        return order[: before[-1]], before

    def slot_positions(self) -> Tensor:
        """[R, A, B] position of each slot in its document: slot j sits at the anchor's position plus j."""
        at_anchor = self.position_ids.gather(1, self.anchors)  # [R, A]
        slots = torch.arange(self.labels.shape[-1], device=self.anchors.device)
        return at_anchor[..., None] + slots
