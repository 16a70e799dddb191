"""What a run prints: once, by the first rank."""

from lightning.pytorch.utilities.rank_zero import rank_zero_only

import data.terminal

say = rank_zero_only(data.terminal.say)
