"""State of a conversation during regeneration, and filters for bad answers."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from data.sources.records import Messages

KEPT, CUT_OFF, EMPTY, REPEATS, REFUSED = "kept", "cut off", "empty", "repeats itself", "refused"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters and answer filters."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    drop_cut_off: bool
    repeat_words: int
    repeat_times: int  # 0 disables the filter

    def fault(self, text: str, complete: bool) -> str:
        """Return the reason to drop an answer, or KEPT."""
        if self.drop_cut_off and not complete:
            return CUT_OFF
        if not text.strip():
            return EMPTY
        return REPEATS if self.repeat_times and repeats(text, self.repeat_words, self.repeat_times) else KEPT


def repeats(text: str, words: int, times: int) -> bool:
    """Return whether any n-gram of `words` words occurs at least `times` times, a sign of a repetition loop."""
    found, counts = text.split(), {}
    for i in range(len(found) - words + 1):
        run = tuple(found[i : i + words])
        counts[run] = counts.get(run, 0) + 1
        if counts[run] >= times:
            return True
    return False


@dataclass
class Conversation:
    """A conversation that is answered turn by turn."""

    id: str
    questions: Messages  # system and user turns
    messages: Messages = field(default_factory=list)
    outcome: str | None = None
    tokens: int = 0

    def ask(self) -> Messages:
        """Append the next question and return the messages so far."""
        asked = sum(message["role"] != "assistant" for message in self.messages)
        upto = next(i for i in range(asked, len(self.questions)) if self.questions[i]["role"] == "user")
        self.messages += self.questions[asked : upto + 1]
        return self.messages

    def answer(self, message: dict[str, str], complete: bool, tokens: int, sampling: Sampling) -> None:
        """Append an answer. Set `outcome` after the last question or if the answer must be dropped."""
        if not complete:  # servers strip truncated answers; strip here so that both backends match
            message = {**message, "content": message["content"].rstrip()}
        self.messages.append({"role": "assistant", **message})
        self.tokens += tokens
        fault = sampling.fault(message["content"], complete)
        asked = sum(message["role"] != "assistant" for message in self.messages)
        if fault != KEPT or asked == len(self.questions):
            self.outcome = fault


Finish = Callable[[Conversation], None]


def seed_of(seed: int, name: str) -> int:
    """Derive a 31-bit seed from `seed` and `name` alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big") >> 1
