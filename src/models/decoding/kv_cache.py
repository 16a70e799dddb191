"""KV cache for a batch in flight, allocated up front and written in place."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.attention.packed import KeysValues, LayerCache


class KVCache:
    """KV cache indexed by row and position, with `slots` entries at the start of each row for block slots.

    The token at position p of row r is stored at index `slots + p` in row r. Rows of different lengths need no padding,
    and rejected drafts need not be removed, since later tokens overwrite them. Slots come first so that passes over
    tokens read only token entries and are unaffected by what the drafter writes. Masking would not suffice: a NaN key
    gives a NaN score, and a NaN value times a weight of 0 is NaN.
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
            layers: keys and values of the packed prompts, per layer, each [1, key/value heads, tokens, head size].
            row_of, positions: [tokens] row and position of each packed token.
            capacity: maximum number of tokens per row.
            slots: maximum number of slots per row that one pass may write.
        """
        self.slots = slots

        def allocated(packed: Tensor) -> Tensor:
            _, heads, _, size = packed.shape
            # Zeros: uninitialized memory may hold NaN.
            entries = packed.new_zeros(rows, heads, slots + capacity, size)
            entries[row_of, :, slots + positions] = packed[0].transpose(0, 1)
            return entries

        self._layers: list[KeysValues] = [(allocated(keys), allocated(values)) for keys, values in layers]

    @property
    def rows(self) -> int:
        return self._layers[0][0].shape[0]

    @property
    def size(self) -> int:
        """Entries per row, including slots."""
        return self._layers[0][0].shape[2]

    @property
    def layers(self) -> list[KeysValues]:
        """Keys and values of tokens per layer, each [R, key/value heads, capacity, head size]; views, not copies."""
        return [(keys[:, :, self.slots :], values[:, :, self.slots :]) for keys, values in self._layers]

    def token_entries(self, at: Tensor, stop: int, *, drafts: bool) -> list[LayerCache]:
        """Return each layer's cache entries for tokens at positions `at` [R, tokens].

        Args:
            stop: queries read the tokens at positions below `stop`.
            drafts: whether the tokens may include drafts; if so, non-finite keys and values are written as 0.
        """
        rows = self._row_numbers(at.device)
        return [LayerCache(keys, values, rows, at, stop, only_finite=drafts) for keys, values in self.layers]

    def slot_entries(self, count: int, stop: int, layers: slice) -> list[LayerCache]:
        """Return the cache entries for `count` slots, located directly before the tokens, for each layer in `layers`.

        Queries read the slots, followed by the tokens at positions below `stop`.

        Raises:
            ValueError: the cache has fewer than `count` slots per row.
        """
        if count > self.slots:
            raise ValueError(f"count={count}: expected at most {self.slots}, the number of slots per row in the cache.")
        first = self.slots - count
        rows = self._row_numbers(self._layers[0][0].device)
        at = torch.arange(count, device=rows.device)[None]
        return [
            LayerCache(keys[:, :, first:], values[:, :, first:], rows, at, count + stop)
            for keys, values in self._layers[layers]
        ]

    def _row_numbers(self, device: torch.device) -> Tensor:
        return torch.arange(self.rows, device=device)[:, None]

    def keep(self, rows: Tensor, slots: int) -> None:
        """Keep only the rows at indices `rows` [R], in ascending order, and ensure at least `slots` slots per row."""
        more = max(0, slots - self.slots)
        for number, pair in enumerate(self._layers):  # layer by layer, without a second full copy of the cache
            keys, values = (tensor[rows] for tensor in pair)
            if more:
                keys, values = (pad(tensor, (0, 0, more, 0)) for tensor in (keys, values))
            self._layers[number] = keys, values
        self.slots += more
