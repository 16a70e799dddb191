"""Reasoning blocks: their tags in prompts and answers, and answers split into reasoning and content."""

import re
from dataclasses import dataclass

from data.sources.records import Message
from data.sources.tags import CLOSING, OPENING, tag
from data.sources.turns import REASONING

OPENS = re.compile(rf"({OPENING})\s*$")
CLOSES = re.compile(rf"({CLOSING})\s*$")
UNKNOWN = re.compile(rf"({tag(r'[A-Za-z][A-Za-z:_]*')})\s*$")  # opens reasoning if no finished answer follows it
STARTS = re.compile(rf"\s*({OPENING})\n?")
EMPTY_BLOCK = re.compile(rf"\s*({OPENING})(\s*)({CLOSING})")


def closing(opening: str) -> str:
    """Return the closing tag of an opening tag."""
    return f"{opening[0]}/{opening[1:]}"


@dataclass(frozen=True)
class Parts:
    """An assistant message, split into reasoning and content."""

    reasoning: str | None
    content: str
    block: str | None = None  # "reasoning</think>content" if the record stores the reasoning inside its content
    opening: str = ""  # the opening tag before `block`; may be missing if the prompt opens the block

    def bare(self, message: Message) -> Message:
        """Return the message without its reasoning."""
        found = {key: value for key, value in message.items() if key not in REASONING}
        return found | {"content": self.content} if "content" in found else found

    def before(self, text: str) -> str:
        """Return the part of an answer's text before its content, where its reasoning is."""
        content = self.content.strip()
        return text.rpartition(content)[0] if content and content in text else text

    def written(self, opened: re.Match[str] | None, closed: re.Match[str] | None) -> str:
        """Return the answer as the target writes it after a prompt that may open or close a reasoning block."""
        if opened and self.block is None:
            return self.continued(opened, self.content)
        if opened:
            return self.block or ""
        return self.content if closed or self.block is None else self.opening + self.block

    def continued(self, opened: re.Match[str], body: str) -> str:
        """Return the reasoning in a block that the prompt opens, followed by the body.

        Line breaks surround the closing tag if one follows the opening tag, unless the body has the closing tag.
        """
        thought, end = (self.reasoning or "").strip(), closing(opened[1])
        if body.startswith(end):
            return ("{}\n{}" if "\n" in opened[0] else "{}{}").format(thought, body)
        return f"{thought}\n{end}\n\n{body}" if "\n" in opened[0] else f"{thought}{end}{body}"


def split_reasoning(message: Message, opened: str | None) -> Parts:
    """Split an assistant message. `opened` is the reasoning tag that ends the prompt; the content may lack it."""
    content = message.get("content", "")
    if "reasoning_content" in message:
        return Parts(message["reasoning_content"], content)
    opening = STARTS.match(content)
    opened, start = (opening[1], opening.end()) if opening else (opened, 0)
    if opened is None or closing(opened) not in content:
        return Parts(None, content)
    block = content[start:]
    reasoning, _, answer = block.partition(closing(opened))
    return Parts(reasoning, answer.lstrip("\n"), block, content[:start])


def fill(tail: str, reasoning: str) -> str | None:
    """Insert the reasoning into the empty block that a template writes before every finished answer (Kimi K2).

    Return None if there is no such block.
    """
    empty = EMPTY_BLOCK.match(tail)
    if empty is None or empty[3] != closing(empty[1]):
        return None
    middle = (empty.start(2) + empty.end(2)) // 2
    return tail[:middle] + reasoning + tail[middle:]
