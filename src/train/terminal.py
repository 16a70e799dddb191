"""Terminal output of a run, printed by rank 0 only."""

from lightning.pytorch.utilities.rank_zero import rank_zero_only

import data.terminal

say = rank_zero_only(data.terminal.say)
