"""KV cache for the rows in flight, written in place. Rows of similar length share tensors."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.attention.packed import KeysValues, LayerCache

SMALLEST = 256  # capacity of the shortest rows if rows grow, in tokens


def growing_capacities(limit: int) -> list[int]:
    """Return the capacities for rows that grow up to `limit` tokens: each is twice the previous one.

    A row occupies at most twice the memory that it needs, or SMALLEST tokens.
    """
    sizes = [min(SMALLEST, limit)]
    while sizes[-1] < limit:
        sizes.append(min(2 * sizes[-1], limit))
    return sizes


class Group:
    """Consecutive rows of equal capacity, in the same tensors. The tensors may have more rows than are in use.

    The token at position p is stored at index `slots + p` of its row. Rows of different lengths need no padding, and
    rejected drafts need not be removed, since later tokens overwrite them. Slots come first so that passes over tokens
    read only token entries and are unaffected by what the drafter writes. Masking would not suffice: a NaN key gives a
    NaN score, and a NaN value times a weight of 0 is NaN. For the same reason, unused entries are zeros.
    """

    def __init__(self, capacity: int, slots: int) -> None:
        self.capacity, self.slots = capacity, slots
        self.layers: list[KeysValues] = []  # each [rows, key/value heads, slots + capacity, head size]
        self.needed: list[int] = []  # for each row in use, the number of tokens to make room for
        self.first = 0  # index of the group's first row among all rows
        self.shorter = 0  # difference between the longest of all rows and the longest row of the group, in tokens

    @property
    def rows(self) -> slice:
        """The group's rows among all rows."""
        return slice(self.first, self.first + len(self.needed))

    def token_entries(self, at: Tensor, stop: int, *, drafts: bool) -> list[LayerCache]:
        """Return each layer's cache entries for tokens at positions `at` [rows, tokens].

        Args:
            stop: queries read the tokens at positions below `stop`.
            drafts: whether the tokens may include drafts; if so, non-finite keys and values are written as 0.
        """
        return self._entries(self.layers, self.slots, at, stop, drafts)

    def slot_entries(self, count: int, stop: int, layers: slice) -> list[LayerCache]:
        """Return the cache entries for `count` slots, located directly before the tokens, for each layer in `layers`.

        Queries read the slots, followed by the tokens at positions below `stop`.

        Raises:
            ValueError: the cache has fewer than `count` slots per row.
        """
        if count > self.slots:
            raise ValueError(f"count={count}: expected at most {self.slots}, the number of slots per row in the cache.")
        at = torch.arange(count, device=self.layers[0][0].device)[None]
        return self._entries(self.layers[layers], self.slots - count, at, count + stop, False)

    def _entries(
        self, layers: list[KeysValues], first: int, at: Tensor, stop: int, only_finite: bool
    ) -> list[LayerCache]:
        used = len(self.needed)
        rows = torch.arange(used, device=at.device)[:, None]
        return [
            LayerCache(keys[:used, :, first:], values[:used, :, first:], rows, at, stop, only_finite)
            for keys, values in layers
        ]

    def write(self, packed: KeysValues, lengths: list[int]) -> None:
        """Append a layer, given the keys and values of the rows, packed: each [key/value heads, tokens, head size]."""
        device = packed[0].device
        row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        at = torch.cat([torch.arange(self.slots, self.slots + length) for length in lengths]).to(device)

        def allocated(tokens: Tensor) -> Tensor:
            heads, _, size = tokens.shape
            entries = tokens.new_zeros(len(lengths), heads, self.slots + self.capacity, size)
            entries[row_of, :, at] = tokens.transpose(0, 1)
            return entries

        self.layers.append((allocated(packed[0]), allocated(packed[1])))

    def append(self, source: "Group", rows: list[int], needed: list[int]) -> None:
        """Copy rows of a group with at most the same capacity to the end of this group."""
        first, count = len(self.needed), len(self.needed) + len(rows)
        own: list[KeysValues | None] = [*self.layers] or [None] * len(source.layers)
        self.layers = []
        for pair, others in zip(own, source.layers, strict=True):  # layer by layer, to limit the peak memory
            keys, values = (
                self._with_rows(tensor, other, count)
                for tensor, other in zip(pair or (None, None), others, strict=True)
            )
            for entries, other in ((keys, others[0]), (values, others[1])):
                tokens = other[rows, :, source.slots :]
                entries[first:count, :, self.slots : self.slots + source.capacity] = tokens
                entries[first:count, :, self.slots + source.capacity :] = 0
            self.layers.append((keys, values))
        self.needed += needed

    def _with_rows(self, entries: Tensor | None, like: Tensor, rows: int) -> Tensor:
        """Return the entries with at least `rows` rows. Reallocation adds half of the rows, so it becomes rare."""
        if entries is not None and len(entries) >= rows:
            return entries
        used = 0 if entries is None else len(entries)
        _, heads, _, size = like.shape
        grown = like.new_zeros(max(rows, used + used // 2), heads, self.slots + self.capacity, size)
        if entries is not None:
            grown[:used] = entries
        return grown

    def keep(self, rows: list[int], needed: list[int]) -> list[int]:
        """Keep only the rows at indices `rows`, in ascending order. Return these indices in their new order.

        The last rows move into the gaps, so at most as many rows are copied as there are gaps.
        """
        count = len(rows)
        gaps = sorted(set(range(count)) - set(rows))
        moved = rows[count - len(gaps) :]
        if gaps:
            for pair in self.layers:
                for entries in pair:
                    entries[gaps] = entries[moved]
        order = list(range(count))
        for gap, row in zip(gaps, moved, strict=True):
            order[gap] = row
        by_row = dict(zip(rows, needed, strict=True))
        self.needed = [by_row[row] for row in order]
        return order

    def add_slots(self, more: int) -> None:
        """Add `more` slots per row."""
        for number, (keys, values) in enumerate(self.layers):
            self.layers[number] = pad(keys, (0, 0, more, 0)), pad(values, (0, 0, more, 0))
        self.slots += more


class KVCache:
    """KV cache indexed by row and position, with `slots` entries at the start of each row for block slots.

    Rows are ordered by capacity, and rows of equal capacity form a `Group`. Operations that reorder the rows return the
    new order.
    """

    def __init__(
        self,
        layers: Iterable[KeysValues],
        lengths: Sequence[int],
        needed: Sequence[int],
        capacities: Sequence[int],
        slots: int = 0,
    ) -> None:
        """
        Args:
            layers: keys and values of the packed prompts, per layer, each [1, key/value heads, tokens, head size].
            lengths: number of tokens of each prompt.
            needed: number of tokens to make room for in each row, in an order that keeps rows of equal capacity
                together, the smallest capacity first.
            capacities: ascending; each row has the smallest one with enough room.
            slots: maximum number of slots per row that one pass may write.
        """
        self.capacities, self.slots = list(capacities), slots
        self.groups: list[Group] = []
        ends = [0, *accumulate(lengths)]
        parts: list[tuple[slice, list[int]]] = []  # packed tokens and lengths of each group
        for capacity, members in groupby(range(len(lengths)), lambda row: self._capacity(needed[row])):
            rows = list(members)
            group = Group(capacity, slots)
            group.needed = [needed[row] for row in rows]
            self.groups.append(group)
            parts.append((slice(ends[rows[0]], ends[rows[-1] + 1]), [lengths[row] for row in rows]))
        for keys, values in layers:
            for group, (tokens, own) in zip(self.groups, parts, strict=True):
                group.write((keys[0, :, tokens], values[0, :, tokens]), own)
        self._arrange()

    @property
    def rows(self) -> int:
        return sum(len(group.needed) for group in self.groups)

    def _capacity(self, needed: int) -> int:
        return next(capacity for capacity in self.capacities if capacity >= needed)

    def _group(self, capacity: int) -> Group:
        """Return the group with this capacity, which may be a new one."""
        for group in self.groups:
            if group.capacity == capacity:
                return group
        group = Group(capacity, self.slots)
        self.groups.append(group)
        return group

    def keep(self, rows: list[int], needed: list[int], slots: int) -> list[int]:
        """Keep only the rows at indices `rows`, in ascending order, and ensure at least `slots` slots per row.

        Args:
            needed: for each kept row, the number of tokens to make room for. A row that outgrows its capacity moves.

        Returns:
            The indices of the kept rows in their new order.
        """
        if slots > self.slots:
            for group in self.groups:
                group.add_slots(slots - self.slots)
            self.slots = slots
        new_order: dict[int, list[int]] = {group.capacity: [] for group in self.groups}
        for group in sorted(self.groups, key=lambda group: -group.capacity):  # rows move only to groups already done
            own = [(row - group.first, room) for row, room in zip(rows, needed, strict=True) if self._in(group, row)]
            larger = {row: self._capacity(room) for row, room in own if room > group.capacity}
            for row, room in own:
                if row in larger:
                    self._group(larger[row]).append(group, [row], [room])
                    new_order.setdefault(larger[row], []).append(group.first + row)
            stay = [(row, room) for row, room in own if row not in larger]
            order = group.keep([row for row, _ in stay], [room for _, room in stay])
            new_order[group.capacity] += [group.first + row for row in order]
        self._arrange()
        return [row for group in self.groups for row in new_order[group.capacity]]

    def _in(self, group: Group, row: int) -> bool:
        return group.first <= row < group.rows.stop

    def extend(self, other: "KVCache") -> list[int]:
        """Add the rows of another cache with the same capacities.

        Returns:
            The new order of the rows, as indices into this cache's rows followed by those of the other.
        """
        new_order = {group.capacity: list(range(group.first, group.rows.stop)) for group in self.groups}
        before = self.rows
        for group in other.groups:
            count = len(group.needed)
            self._group(group.capacity).append(group, list(range(count)), group.needed)
            moved = range(before + group.first, before + group.rows.stop)
            new_order.setdefault(group.capacity, []).extend(moved)
        self._arrange()
        return [row for group in self.groups for row in new_order[group.capacity]]

    def _arrange(self) -> None:
        """Drop empty groups, order the others by capacity, and update their positions."""
        self.groups = sorted((group for group in self.groups if group.needed), key=lambda group: group.capacity)
        longest = max((max(group.needed) for group in self.groups), default=0)
        first = 0
        for group in self.groups:
            group.first, group.shorter = first, longest - max(group.needed)
            first += len(group.needed)
