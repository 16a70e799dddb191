"""Terminal output of a run, printed by rank 0 only."""

from lightning.pytorch.utilities.rank_zero import rank_zero_only

import data.terminal

say = rank_zero_only(data.terminal.say)


def rank() -> int:
    """Return the rank of this process, as tracked by Lightning."""
    return int(getattr(rank_zero_only, "rank", 0))  # Lightning sets this attribute without declaring it
