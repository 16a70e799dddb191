"""State of a sample during regeneration, and filters for bad answers."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.errors import BadRecord
from data.sources.records import Conversation, Message, Messages, Written

KEPT, IN_PART = "kept", "kept in part"
CUT_OFF, EMPTY, REPEATS, REFUSED = "cut off", "empty", "repeats itself", "refused"
SAMPLING = ("temperature", "top_p", "max_new_tokens", "drop_cut_off", "repeat_words", "repeat_times")
CALLS = "calls a tool, and its result is unknown"
UNTRAINABLE = "refused in training"


class Asked(NamedTuple):
    """The identity of a sample."""

    id: str
    digest: str | None  # of its questions and tools


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

    def fault(self, message: Message, complete: bool) -> str | None:
        """Return the reason for dropping an answer, or None.

        Args:
            message: the answer: `content`, and `reasoning_content` or `tool_calls` if a server returns them.
            complete: whether the target ended the answer.
        """
        reasoning = message.get("reasoning_content", "")
        if self.drop_cut_off and not complete:
            return CUT_OFF
        if not complete and reasoning.strip() and not message["content"].strip():
            return f"{CUT_OFF}: in the reasoning, which has no known opening tag"
        if not message["content"].strip() and not message.get("tool_calls"):
            return f"{EMPTY}: the reply has reasoning, but no answer" if reasoning.strip() else EMPTY
        texts = (message["content"], reasoning)
        looping = self.repeat_times and any(repeats(text, self.repeat_words, self.repeat_times) for text in texts)
        return REPEATS if looping else None


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


class Checker(Protocol):
    """Interface of `TrainingChecker`."""

    def check(self, sample: "Sample") -> int: ...
    def calls_tool(self, sample: "Sample") -> bool: ...


@dataclass
class Sample:
    """A conversation that is answered turn by turn.

    If the questions contain recorded answers, e.g. between tool results, they are the history of a single answer.
    """

    id: str
    questions: Messages  # system and user turns, or a recorded history
    tools: list[dict[str, Any]] | None = None
    digest: str | None = None  # of the questions and tools
    kind: str | None = None  # declared by the record or its source, for the data report
    checker: Checker | None = None  # None accepts every answer
    messages: Messages = field(default_factory=list)
    written: dict[int, Written] = field(default_factory=dict)  # answers as the target wrote them, by message index
    asked: int = 0  # number of questions in `messages`
    good: int = 0  # number of messages up to the last good answer
    outcome: str | None = None
    tokens: int = 0
    unverified: int = 0  # answers kept as text that may read back as other tokens than the target wrote

    @property
    def token_ids(self) -> dict[int, list[int]]:
        """The answers whose tokens are known, by message index."""
        return {index: written.token_ids for index, written in self.written.items() if written.token_ids is not None}

    def ask(self) -> Conversation:
        """Append the next question, with its system message if any, and return the conversation so far."""
        end = len(self.questions)
        if not any(message["role"] == "assistant" for message in self.questions):
            end = 1 + next(i for i in range(self.asked, end) if self.questions[i]["role"] == "user")
        self.messages += self.questions[self.asked : end]
        self.asked = end
        return self.conversation()

    def conversation(self) -> Conversation:
        """Return the conversation so far."""
        return Conversation(self.messages, self.tools, self._recorded(), self.written)

    def record(self) -> dict[str, Any]:
        """Return the conversation as a record for training."""
        messages = [dict(message) for message in self.messages]
        for index in self._recorded():
            messages[index]["train"] = False
        for index, written in self.written.items():
            messages[index] |= {} if written.token_ids is None else {"token_ids": written.token_ids}
            messages[index] |= {"truncated": True} if written.truncated else {}
        found: dict[str, Any] = {"kind": self.kind} if self.kind else {}
        return found | {"messages": messages} | ({"tools": self.tools} if self.tools else {})

    def answer(
        self, message: Message, token_ids: list[int] | None, complete: bool, tokens: int, sampling: Sampling
    ) -> int | None:
        """Append an answer. Set `outcome` if it is the last one, must be dropped, or cannot be continued.

        Return the number of tokens to train on, or None if the answer is dropped.

        Args:
            message: the answer's text, with the keys of an assistant message except its role.
            token_ids: the answer's tokens as the target wrote them, with the stop token if it wrote one. None if the
                server does not return them.
            complete: whether the target ended the answer. False at the token limit.
            tokens: number of tokens generated; 0 if unknown.
            sampling: the answer filters.
        """
        if not complete:  # servers strip truncated answers; do the same, so that both backends match
            message = {**message, "content": message["content"].rstrip()}
        if token_ids is not None or not complete:
            self.written[len(self.messages)] = Written(token_ids, truncated=not complete)
        self.messages.append({"role": "assistant", **message})
        self.tokens += tokens
        if fault := sampling.fault(message, complete):
            self.end(fault)
            return None
        try:
            length = self.checker.check(self) if self.checker else tokens
        except BadRecord as error:
            self.end(f"{UNTRAINABLE}: {error}")
            return None
        self.good = len(self.messages)
        if self.asked == len(self.questions):
            self.outcome = KEPT
        elif not complete:
            self.end(CUT_OFF)
        elif self.checker and self.checker.calls_tool(self):
            self.end(CALLS)
        return length

    def end(self, reason: str) -> None:
        """End the sample early. Good answers before this point are kept; without any, the sample is dropped."""
        if not self.good:
            self.outcome = reason
            return
        del self.messages[self.good :]
        self.written = {index: written for index, written in self.written.items() if index < self.good}
        self.outcome = f"{IN_PART}: {reason}"

    def _recorded(self) -> frozenset[int]:
        """Return the message indices of answers in the recorded history, which are not trained on."""
        asked = self.questions[: self.asked] if any(m["role"] == "assistant" for m in self.questions) else []
        return frozenset(index for index, message in enumerate(asked) if message["role"] == "assistant")


OnFinish = Callable[[Sample], None]
OnTokens = Callable[[int], None]


class Backend(Protocol):
    """Interface of the backends that generate answers: `LocalBackend` and `ServerBackend`."""

    def run(
        self, samples: Iterable[Sample], on_finish: OnFinish, *, answered_before: bool, on_tokens: OnTokens
    ) -> None:
        """Answer every question in every sample.

        Args:
            on_finish: called with each sample when it is finished.
            answered_before: whether an earlier run with the same settings has finished any samples.
            on_tokens: called with the number of tokens generated since the last call, to show the progress.
        """


def beside(output: Path, ending: str) -> Path:
    """Return the path of a file next to the output. Its name is the output's, without `.jsonl`, plus `ending`."""
    return output.with_name(output.name.removesuffix(".jsonl") + ending)


def derive_seed(seed: int, name: str) -> int:
    """Derive a 31-bit seed that depends only on `seed` and `name`."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big") >> 1
