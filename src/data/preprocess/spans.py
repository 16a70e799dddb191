"""Supervised texts of a conversation, with the location of their answers."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answer:
    """Location of an answer in its text, as character offsets."""

    turn: int  # index of the message
    start: int  # end of the prompt
    end: int  # end of the answer, after its end token
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
    refused: dict[int, str] = field(default_factory=dict)  # reasons by turn number, from 1
    notes: Counter[str] = field(default_factory=Counter)  # answers with NO_END_TOKEN, OTHER_END_TOKEN, ...
