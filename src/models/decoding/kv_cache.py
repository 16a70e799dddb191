"""Keys and values of a batch in flight: allocated once, written in place."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.attention.packed import KeysValues, Places


class KVCache:
    """The token of row r at position p lies in place p of row r, behind `slots` places for the slots of blocks.

    So rows of different lengths need no padding, and what verification rejects needs no removal: the next tokens are
    written over it. Slots lie in front because masking does not protect a pass from what it reads: a NaN key gives a
    NaN score, and a NaN value times a weight of 0 is NaN. Passes over tokens read the places of tokens alone, so what
    a drafter wrote cannot reach them, whatever it is.
    """

    def __init__(
        self,
        layers: Iterable[KeysValues],
        row_of: Tensor,
        positions: Tensor,
        rows: int,
        capacity: int,
        slots: int = 0,
    ) -> None:
        """
        Args:
            layers: for each layer keys and values of packed prompts, [1, key/value heads, tokens, head size] each.
            row_of, positions: [tokens] where each of those tokens belongs.
            capacity: tokens per row.
            slots: slots per row that one pass may write.
        """
        self.slots = slots
        self._layers = [
            tuple(self._allocated(packed, row_of, positions, rows, capacity) for packed in pair) for pair in layers
        ]

    def _allocated(self, packed: Tensor, row_of: Tensor, positions: Tensor, rows: int, capacity: int) -> Tensor:
        _, heads, _, size = packed.shape
        # Zeros: memory never written may hold NaN.
        places = packed.new_zeros(rows, heads, self.slots + capacity, size)
        places[row_of, :, self.slots + positions] = packed[0].transpose(0, 1)
        return places

    @property
    def rows(self) -> int:
        return self._layers[0][0].shape[0]

    @property
    def size(self) -> int:
        """Places of a row, those of slots included."""
        return self._layers[0][0].shape[2]

    @property
    def layers(self) -> list[KeysValues]:
        """Keys and values of tokens by layer, [R, key/value heads, capacity, head size] each; views."""
        return [tuple(tensor[:, :, self.slots :] for tensor in pair) for pair in self._layers]

    def token_places(self, at: Tensor, stop: int, *, drafts: bool) -> list[Places]:
        """For each layer, where tokens go: `at` [R, tokens]; tokens at positions before `stop` are read.

        Args:
            drafts: whether there may be drafts among them.
        """
        rows = self._row_numbers(at.device)
        return [Places(keys, values, rows, at, stop, only_finite=drafts) for keys, values in self.layers]

    def slot_places(self, count: int, stop: int, layers: slice) -> list[Places]:
        """For some layers, where `count` slots go: right in front of the tokens. The slots and the tokens at positions
        before `stop` are read, in this order.

        Raises:
            ValueError: the cache has room for fewer.
        """
        if count > self.slots:
            raise ValueError(f"{count} slots in a cache with room for {self.slots} a row.")
        first = self.slots - count
        rows = self._row_numbers(self._layers[0][0].device)
        at = torch.arange(count, device=rows.device)[None]
        pairs = [tuple(tensor[:, :, first:] for tensor in pair) for pair in self._layers[layers]]
        return [Places(keys, values, rows, at, count + stop) for keys, values in pairs]

    def _row_numbers(self, device: torch.device) -> Tensor:
        return torch.arange(self.rows, device=device)[:, None]

    def keep(self, rows: Tensor, slots: int) -> None:
        """Forget all rows but these, [rows] indices in ascending order, which get at least so many slots each."""
        more = max(0, slots - self.slots)
        for number, pair in enumerate(self._layers):  # one after the other: never twice the whole
            kept = [tensor[rows] for tensor in pair]
            self._layers[number] = tuple(pad(tensor, (0, 0, more, 0)) for tensor in kept) if more else tuple(kept)
        self.slots += more
