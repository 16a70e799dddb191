"""Skeletons of rendered conversations: the text that the chat template writes around the messages.

In general, locating the answers in a conversation takes two renderings per answer. With most templates, however, the
text around the messages depends only on their roles. For each sequence of roles, a skeleton is therefore extracted once
from a conversation of placeholders. Conversations that match their skeleton need only one rendering. The last prompt of
some is rendered as well, as a safeguard. A text that the template searches for, such as the switch `/no_think`, may
change any prompt, so conversations that contain one have no skeleton. If a template uses contents in other ways, e.g.
compares their lengths, no conversation has a skeleton.
"""

from dataclasses import dataclass
from itertools import accumulate

from data.preprocess.spans import Answer, Rendered, Supervision
from data.preprocess.switches import Switches
from data.sources.records import Messages


@dataclass(frozen=True)
class Skeleton:
    """The template's text around the messages, and the location of each answer relative to its message's content."""

    pieces: list[str]  # text before each message, followed by the text after the last one
    # Per answer: turn, then the numbers of characters before the content, after it, and in the whitespace after those.
    answers: list[tuple[int, int, int, int]]
    supervision: Supervision  # supervision of the placeholder conversation

    def supervise(self, messages: Messages, rendered: str, prompt: str | None) -> Supervision | None:
        """Return the supervision of a conversation, or None if its rendering does not match the skeleton.

        Args:
            messages: the conversation.
            rendered: its rendering.
            prompt: the rendered prompt of the last answer, or None to skip its comparison.
        """
        contents = [message["content"] for message in messages]
        text = "".join(part for pair in zip(self.pieces, [*contents, ""], strict=True) for part in pair)
        if not rendered.startswith(text):
            return None
        lengths = [len(piece) + len(content) for piece, content in zip(self.pieces, contents, strict=False)]
        ends = list(accumulate(lengths))  # where each message's content ends in the text
        answers = []
        for turn, before, after, whitespace in self.answers:
            end = ends[turn] + after
            answers.append(Answer(turn, ends[turn] - len(contents[turn]) - before, end, end + whitespace))
        if prompt is not None and text[: answers[-1].start] != prompt:
            return None
        return Supervision([Rendered(text, answers)], {}, self.supervision.notes)


def regular(messages: Messages, switches: Switches) -> bool:
    """Return whether the contents of the messages cannot change the text that the template writes around them."""
    if switches.equality and len({message.get("content") for message in messages}) < len(messages):
        return False
    return all(len(message) == 2 and _regular(message.get("content", ""), switches) for message in messages)


def _regular(content: str, switches: Switches) -> bool:
    return bool(content) and content == content.strip() and not switches.found_in(content)


def placeholders(roles: tuple[str, ...]) -> Messages:
    """Return a conversation of placeholder messages with the given roles."""
    return [{"role": role, "content": f"Message {i}."} for i, role in enumerate(roles)]


def skeleton(messages: Messages, supervision: Supervision) -> Skeleton | None:
    """Extract the skeleton from a conversation of placeholders.

    Return None if an answer is refused, there are several texts, or the placeholders do not appear in order, each once.
    """
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
