"""State of a sample during regeneration, and filters for bad answers."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

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

    def outcome(self, text: str, complete: bool) -> str:
        """Return KEPT, or the reason for dropping an answer."""
        if self.drop_cut_off and not complete:
            return CUT_OFF
        if not text.strip():
            return EMPTY
        return REPEATS if self.repeat_times and repeats(text, self.repeat_words, self.repeat_times) else KEPT


def repeats(text: str, words: int, times: int) -> bool:
    """Return whether any n-gram of `words` words occurs at least `times` times, which indicates a repetition loop."""
    split = text.split()
    counts: Counter[tuple[str, ...]] = Counter()
    for i in range(len(split) - words + 1):
        ngram = tuple(split[i : i + words])
        counts[ngram] += 1
        if counts[ngram] >= times:
            return True
    return False


@dataclass
class Sample:
    """A conversation that is answered turn by turn."""

    id: str
    questions: Messages  # system and user turns
    messages: Messages = field(default_factory=list)
    token_ids: dict[int, list[int]] = field(default_factory=dict)  # answers as the target wrote them, by message index
    outcome: str | None = None
    tokens: int = 0

    def ask(self) -> Messages:
        """Append the next question, with its system message if any, and return the messages so far."""
        asked = sum(message["role"] != "assistant" for message in self.messages)
        user = next(i for i in range(asked, len(self.questions)) if self.questions[i]["role"] == "user")
        self.messages += self.questions[asked : user + 1]
        return self.messages

    def answer(
        self, message: dict[str, str], token_ids: list[int] | None, complete: bool, tokens: int, sampling: Sampling
    ) -> None:
        """Append an answer. If it is the last one or must be dropped, set `outcome`.

        Args:
            message: the answer's text, with the keys of an assistant message except its role.
            token_ids: the answer's tokens as the target wrote them, with the stop token if it wrote one. None if the
                server does not return them.
            complete: whether the target ended the answer. False at the token limit.
            tokens: number of tokens generated.
            sampling: the answer filters.
        """
        if not complete:  # servers strip truncated answers; do the same, so that both backends match
            message = {**message, "content": message["content"].rstrip()}
        if token_ids is not None:
            self.token_ids[len(self.messages)] = token_ids
        self.messages.append({"role": "assistant", **message})
        self.tokens += tokens
        outcome = sampling.outcome(message["content"], complete)
        asked = sum(message["role"] != "assistant" for message in self.messages)
        if outcome != KEPT or asked == len(self.questions):
            self.outcome = outcome


OnFinish = Callable[[Sample], None]
OnTokens = Callable[[int], None]


class Backend(Protocol):
    """Interface of the backends that generate answers: `LocalBackend` and `ServerBackend`."""

    def run(
        self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool, on_tokens: OnTokens
    ) -> None:
        """Answer every question in every conversation.

        Args:
            on_finish: called with each conversation when it is finished.
            answered_before: whether an earlier run with the same settings has finished any conversations.
            on_tokens: called with the number of tokens generated since the last call, to show the progress.
        """


def derive_seed(seed: int, name: str) -> int:
    """Derive a 31-bit seed that depends only on `seed` and `name`."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big") >> 1
