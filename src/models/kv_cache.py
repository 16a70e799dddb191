"""Keys and values of a batch in flight: allocated once, written in place."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.attention import KeysValues, Places


class KVCache:
    """The token of row r at position p lies in place p of row r.

    So rows of different lengths need no padding, and what verification rejects needs no removal: the next tokens are
    written over it. Places beyond all tokens hold the slots of blocks for the length of one pass.
    """

    def __init__(
        self, layers: Iterable[KeysValues], row_of: Tensor, positions: Tensor, rows: int, capacity: int
    ) -> None:
        """
        Args:
            layers: for each layer keys and values of packed prompts, [1, key/value heads, tokens, head size] each.
            row_of, positions: [tokens] where each of those tokens belongs.
            capacity: places per row.
        """
        self.layers = [
            tuple(self._allocated(packed, row_of, positions, rows, capacity) for packed in pair) for pair in layers
        ]

    @staticmethod
    def _allocated(packed: Tensor, row_of: Tensor, positions: Tensor, rows: int, capacity: int) -> Tensor:
        _, heads, _, size = packed.shape
        # Zeros: what no query may see still is multiplied with its weight of 0, and 0 times garbage may be NaN.
        places = packed.new_zeros(rows, heads, capacity, size)
        places[row_of, :, positions] = packed[0].transpose(0, 1)
        return places

    @property
    def rows(self) -> int:
        return self.layers[0][0].shape[0]

    def places(self, at: Tensor, stop: int, layers: slice = slice(None)) -> list[Places]:
        """For each layer, where tokens go: `at` [R or 1, tokens]; places before `stop` are read."""
        rows = torch.arange(self.rows, device=at.device)[:, None]
        return [Places(keys, values, rows, at, stop) for keys, values in self.layers[layers]]

    def keep(self, rows: Tensor, capacity: int) -> None:
        """Forget all rows but these, [rows] indices in ascending order, which get at least so many places each."""
        more = capacity - self.layers[0][0].shape[2]
        for number, pair in enumerate(self.layers):  # one after the other: never twice the whole
            kept = [tensor[rows] for tensor in pair]
            self.layers[number] = tuple(pad(tensor, (0, 0, 0, more)) for tensor in kept) if more > 0 else tuple(kept)
