"""Skeleton of a rendered conversation: the text of the chat template around the messages.

Locating the answers of a conversation takes two renderings for each answer. For most templates the result depends only
on the roles of the messages. Their skeleton is taken once from a conversation of placeholders; a conversation that
renders to this skeleton needs a single rendering.
"""

import re
from dataclasses import dataclass
from itertools import accumulate

from data.preprocess.spans import Answer, Rendered, Supervision
from data.sources.records import Messages

TAG = re.compile(r"think\w*>")  # of a reasoning block, which templates search for


@dataclass(frozen=True)
class Skeleton:
    """Text of the chat template around the messages, and the answers relative to their content."""

    pieces: list[str]  # before each message, and after the last
    answers: list[tuple[int, int, int, int]]  # turn; characters before the content, after it, and whitespace after that
    supervision: Supervision  # of the placeholders

    def supervise(self, messages: Messages, rendered: str) -> Supervision | None:
        """Return the supervision of a conversation, or None if its rendering does not begin with the skeleton."""
        contents = [message["content"] for message in messages]
        text = "".join(part for pair in zip(self.pieces, [*contents, ""], strict=True) for part in pair)
        if not rendered.startswith(text):
            return None
        lengths = [len(piece) + len(content) for piece, content in zip(self.pieces, contents, strict=False)]
        ends = list(accumulate(lengths))  # of the contents
        answers = []
        for turn, before, after, whitespace in self.answers:
            end = ends[turn] + after
            answers.append(Answer(turn, ends[turn] - len(contents[turn]) - before, end, end + whitespace))
        return Supervision([Rendered(text, answers)], {}, self.supervision.notes)


def regular(messages: Messages) -> bool:
    """Return whether the contents of a conversation are unlikely to change its skeleton."""
    return all(
        len(message) == 2 and message["content"] == message["content"].strip() and not TAG.search(message["content"])
        for message in messages
    )


def placeholders(roles: tuple[str, ...]) -> Messages:
    """Return a conversation of placeholders with the given roles."""
    return [{"role": role, "content": f"Message {i}."} for i, role in enumerate(roles)]


def skeleton(messages: Messages, supervision: Supervision) -> Skeleton | None:
    """Return the skeleton of a conversation of placeholders, or None if it does not contain each once, in order."""
    if supervision.refused or len(supervision.texts) != 1:
        return None
    (rendered,) = supervision.texts
    pieces, rest = [], rendered.text
    for message in messages:
        piece, content, rest = rest.partition(message["content"])
        if not content or content in rest:
            return None
        pieces.append(piece)
    starts, position = [], 0
    for piece, message in zip(pieces, messages, strict=True):
        starts.append(position + len(piece))
        position = starts[-1] + len(message["content"])
    answers = []
    for answer in rendered.answers:
        start, end = starts[answer.turn], starts[answer.turn] + len(messages[answer.turn]["content"])
        answers.append((answer.turn, start - answer.start, answer.end - end, answer.after - answer.end))
    return Skeleton([*pieces, rest], answers, supervision)
