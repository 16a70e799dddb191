"""Supervised texts of a conversation, with the locations of the answers in them."""

from collections import Counter
from dataclasses import dataclass, field

# Notes on an answer, which the data report counts.
NO_END_TOKEN = "no end token"  # noqa: S105  the template writes no end token after the answer
OTHER_END_TOKEN = "not a stop token"  # noqa: S105  the template's end token does not stop generation
TEXT_DROPPED = "without its text"  # the template drops the text beside tool calls
REASONING_DROPPED = "without its reasoning"  # neither the prompt nor the template includes the record's reasoning
CUT_OFF = "cut off"  # generation ended at the token limit, so no end token is supervised


@dataclass(frozen=True)
class Answer:
    """Location of an answer in its text, as character offsets."""

    turn: int  # index of the answer's message
    start: int  # start of the answer, i.e. the end of its prompt
    end: int  # end of the answer, including its end token
    after: int  # end of the whitespace that the template writes after the answer


@dataclass
class Rendered:
    """A rendered conversation, up to its last supervised answer."""

    text: str
    answers: list[Answer]


@dataclass
class Supervision:
    """The supervised texts of a conversation."""

    texts: list[Rendered] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)  # 1-based turn number -> reason
    notes: Counter[str] = field(default_factory=Counter)  # number of answers with NO_END_TOKEN, OTHER_END_TOKEN, ...
