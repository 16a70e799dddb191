"""Chooses between decoding with and without drafts by measuring both."""

from dataclasses import dataclass

TRIAL = 6  # steps of each way to measure before the first choice, and of the slower way in each later trial
RETRY = 400  # steps between trials of the slower way
MEMORY = 0.9  # weight of earlier steps relative to the next one


@dataclass
class _Speed:
    """Tokens and seconds of the measured steps, with exponentially decreasing weights."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0  # since the last trial began

    def record(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds = MEMORY * self.tokens + tokens, MEMORY * self.seconds + seconds
        self.steps += 1

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class DraftChoice:
    """Decides before each step whether to draft.

    Verifying drafts is almost free while a step is bound by reading the weights, and costs as much as generating tokens
    once it is bound by arithmetic. The limit depends on the machine, the models and the number of rows, so it is
    measured, separately for rows from 1, 2, 4, 8, ...
    """

    def __init__(self) -> None:
        self._speeds: dict[tuple[int, bool], _Speed] = {}

    def choose(self, rows: int) -> bool:
        """Return whether to draft in the next step, with `rows` rows in flight."""
        drafted, plain = (self._speed(rows, draft) for draft in (True, False))
        if drafted.steps < TRIAL:
            return True
        if plain.steps < TRIAL:
            return False
        faster, slower = (drafted, plain) if drafted.rate > plain.rate else (plain, drafted)
        if faster.steps >= RETRY:
            faster.steps, slower.steps = TRIAL, 0
        return faster is drafted

    def record(self, rows: int, draft: bool, tokens: int, seconds: float) -> None:
        """Record a step that generated `tokens` tokens in all rows."""
        self._speed(rows, draft).record(tokens, seconds)

    def _speed(self, rows: int, draft: bool) -> _Speed:
        return self._speeds.setdefault((rows.bit_length(), draft), _Speed())
