"""Supervision: the text of each answer as the target generates it, under any chat template.

A supervised answer follows the prompt that decoding starts from: the messages before it, with the generation prompt.
It consists of the text that the target writes, and the token at which generation stops. Answers whose prompts extend
one another are rendered as one text. If the template rewrites history, such as by dropping earlier reasoning, an answer
gets a separate text. `{% generation %}` markers are ignored: some templates put headers inside them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from data.errors import BadRecord
from data.preprocess.prompts import CHECKED, Render, prompts, question
from data.preprocess.skeleton import Skeleton, placeholders, regular, skeleton
from data.preprocess.spans import Answer, Rendered, Supervision
from data.sources.records import Messages

OPENS_REASONING = re.compile(r"<([\w:]*think\w*)>\s*$")
CLOSES_REASONING = re.compile(r"</[\w:]*think\w*>\s*$")
OPENING = re.compile(r"\s*<([\w:]*think\w*)>\n?")
EMPTY_BLOCK = re.compile(r"\s*<([\w:]*think\w*)>(\s*)</\1>")
# Messages that show the text that the template writes after an answer.
ANSWER, NEXT_QUESTION = "It is as follows.", "What follows from this?"
NO_REASONING = "the prompt opens a reasoning block, but the answer has no reasoning"

# Properties of an answer that the data report mentions.
NO_END_TOKEN = "no end token"  # noqa: S105  the template writes none after the answer
OTHER_END_TOKEN = "not a stop token"  # noqa: S105  the template's end token does not stop generation
REASONING_DROPPED = "without its reasoning"  # neither prompt nor template write the record's reasoning


class Supervisor:
    """Locates the answers of conversations under one chat template."""

    def __init__(self, render: Render, stop: Iterable[str], added: Iterable[str]) -> None:
        """Set up the template and its end tokens.

        Args:
            render: renders messages with the chat template.
            stop: the texts of the target's stop tokens.
            added: the texts of all added tokens, among them the end token if it is not a stop token.
        """
        self.render, self.stop, self.added = render, _any_of(stop), _any_of(added)
        self.skeletons: dict[tuple[str, ...], Skeleton | None] = {}  # by the roles of the messages

    def supervise(self, messages: Messages, turns: list[int]) -> Supervision:
        """Render a conversation up to the last of the given answers, and locate them.

        Args:
            messages: the conversation.
            turns: the message indices of the first answers, ascending.

        Raises:
            BadRecord: the template rejects the conversation.
        """
        messages = messages[: turns[-1] + 1] if turns else []
        found = self._by_skeleton(messages) if 0 < len(turns) <= CHECKED else None
        return found or self._by_answer(messages, turns)

    def _by_skeleton(self, messages: Messages) -> Supervision | None:
        if not regular(messages):
            return None
        roles = tuple(message["role"] for message in messages)
        if roles not in self.skeletons:
            self.skeletons[roles] = self._skeleton(roles)
        found = self.skeletons[roles]
        return None if found is None else found.supervise(messages, self.render(messages, False))

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        examples, turns = placeholders(roles), [turn for turn, role in enumerate(roles) if role == "assistant"]
        try:
            return skeleton(examples, self._by_answer(examples, turns))
        except BadRecord:
            return None

    def _by_answer(self, messages: Messages, turns: list[int]) -> Supervision:
        found, texts = Supervision(), _AnswerTexts(self, messages, many=len(turns) > CHECKED)
        for turn, prompt in zip(turns, prompts(self.render, messages, turns), strict=True):
            try:
                text, whitespace, notes = texts.of(turn, prompt)
            except _Refused as error:
                found.refused[turn + 1] = str(error)
                continue
            found.notes.update(notes)
            end = len(prompt) + len(text)
            answer = Answer(turn, len(prompt), end, end + len(whitespace))
            _append(found.texts, Rendered(prompt + text + whitespace, [answer]))
        return found

    def split(self, tail: str, around: Callable[[], tuple[str, str]]) -> tuple[str, str, list[str]]:
        """Split the text after a prompt into the answer, the whitespace after it and notes for the report.

        The answer ends with the first stop token. Where the template writes none, it may be the first token of the next
        turn (GLM), or an added token that generation does not stop at.

        Args:
            tail: the text that the template writes after the prompt.
            around: returns the text that the template writes after a last answer, and between an answer and another
                question.
        """
        if stop := self.stop.search(tail):
            return tail[: stop.end()], _leading_whitespace(tail[stop.end() :]), []
        last, between = around()
        at = len(tail.removesuffix(last).rstrip())
        if stop := self.stop.search(between):
            return tail[: len(tail.removesuffix(last))] + between[: stop.end()], "", []
        if end := self.added.search(tail, at):
            return tail[: end.end()], _leading_whitespace(tail[end.end() :]), [OTHER_END_TOKEN]
        return tail[:at], _leading_whitespace(tail[at:]), [NO_END_TOKEN]


class _Refused(ValueError):
    """The target would not generate this answer after its prompt."""


class _AnswerTexts:
    """The texts of the answers of one conversation, each after its prompt."""

    def __init__(self, supervisor: Supervisor, messages: Messages, *, many: bool) -> None:
        self.supervisor, self.messages = supervisor, messages
        self.many, self.checked, self.local = many, 0, True

    def of(self, turn: int, prompt: str) -> tuple[str, str, list[str]]:
        """Return answer `turn` with its end token, the template's whitespace after it, and notes for the report.

        Raises:
            _Refused: the prompt demands reasoning and the record has none.
        """
        opened, closed = OPENS_REASONING.search(prompt), CLOSES_REASONING.search(prompt)
        message = _split(self.messages[turn], opened[1] if opened else None)
        if opened and message.reasoning is None:
            raise _Refused(NO_REASONING)
        thought = (message.reasoning or "").strip()
        tail = self._tail(turn, prompt)
        if tail is not None and opened and tail.partition(f"</{opened[1]}>")[0].strip() != thought:
            tail = None  # the template drops the reasoning, or reads it as part of the answer
        if tail is not None and message.block is not None and (thought in tail) == bool(closed):
            tail = None  # the template drops the reasoning, or writes it after the empty block of the prompt
        if tail is not None and thought and (empty := EMPTY_BLOCK.match(tail)):
            tail = None if message.block is not None else _filled(tail, empty, thought)
        if tail is None:
            tail = message.written(opened, closed) + self._around(turn)[0]
        text, whitespace, notes = self.supervisor.split(tail, lambda: self._around(turn))
        if thought and thought not in text:
            notes.append(REASONING_DROPPED)
        return text, whitespace, notes

    def _tail(self, turn: int, prompt: str) -> str | None:
        """Return the text that the template writes after the prompt, or None if it rewrites the prompt.

        In that case, and in long conversations once the first answers read the same, the answer is rendered after its
        question alone.
        """
        if (
            self.many
            and self.local
            and self.checked >= CHECKED
            and (tail := self._tail_alone(turn, prompt)) is not None
        ):
            return tail
        tail = _added(prompt, self.supervisor.render(self.messages[: turn + 1], False))
        if self.many or tail is None:
            alone = self._tail_alone(turn, prompt)
            self.checked, self.local = self.checked + 1, self.local and tail in (alone, None)
            tail = alone if tail is None else tail
        return tail

    def _tail_alone(self, turn: int, prompt: str) -> str | None:
        asked, render = question(self.messages, turn), self.supervisor.render
        try:
            alone = render(asked, True)
            if _reasoning_state(alone) != _reasoning_state(prompt):
                return None  # an earlier message turns reasoning on or off
            return _added(alone, render([*asked, self.messages[turn]], False))
        except BadRecord:
            return None  # refused without the turns before it

    def _around(self, turn: int) -> tuple[str, str]:
        """Return the text that the template writes after a last answer, and between an answer and another question."""
        exchange = [*question(self.messages, turn), {"role": "assistant", "content": ANSWER}]
        render = self.supervisor.render
        try:
            last = render(exchange, False)
            following = render([*exchange, {"role": "user", "content": NEXT_QUESTION}], False)
        except BadRecord:
            return "", ""
        between = following.rpartition(NEXT_QUESTION)[0]
        return last.rpartition(ANSWER)[2], between.rpartition(ANSWER)[2] if ANSWER in between else ""


def _reasoning_state(prompt: str) -> tuple[bool, bool]:
    """Return whether a prompt opens a reasoning block, and whether it closes one."""
    return bool(OPENS_REASONING.search(prompt)), bool(CLOSES_REASONING.search(prompt))


@dataclass(frozen=True)
class _Message:
    """An assistant message, split into reasoning and content."""

    reasoning: str | None
    content: str
    block: str | None = None  # "reasoning</think>content" if the record has the reasoning inside its content
    opening: str = ""  # the tag before it; may be missing if the prompt opens the block

    def written(self, opened: re.Match[str] | None, closed: re.Match[str] | None) -> str:
        """Return the answer as the target writes it after a prompt that may open or close a reasoning block."""
        if opened and self.block is None:
            return f"{(self.reasoning or '').strip()}\n</{opened[1]}>\n\n{self.content}"
        if opened:
            return self.block or ""
        return self.content if closed or self.block is None else self.opening + self.block


def _split(message: dict[str, str], tag: str | None) -> _Message:
    """Split an assistant message. `tag` names the block that the prompt opens: the content may lack its start."""
    content = message["content"]
    if "reasoning_content" in message:
        return _Message(message["reasoning_content"], content)
    opening = OPENING.match(content)
    tag, start = (opening[1], opening.end()) if opening else (tag, 0)
    if tag is None or f"</{tag}>" not in content:
        return _Message(None, content)
    block = content[start:]
    reasoning, _, answer = block.partition(f"</{tag}>")
    return _Message(reasoning, answer.lstrip("\n"), block, content[:start])


def _filled(tail: str, empty: re.Match[str], reasoning: str) -> str:
    """Put the reasoning into the empty block that a template writes before every finished answer (Kimi K2)."""
    middle = (empty.start(2) + empty.end(2)) // 2
    return tail[:middle] + reasoning + tail[middle:]


def _append(texts: list[Rendered], new: Rendered) -> None:
    """Add an answer to the last text if its prompt extends it, else as a text of its own."""
    if texts:
        last = texts[-1]
        end = last.answers[-1].end
        if new.answers[0].start >= end and new.text.startswith(last.text[:end]):
            texts[-1] = Rendered(new.text, last.answers + new.answers)
            return
    texts.append(new)


def _added(prompt: str, rendered: str) -> str | None:
    """Return the text that extends a prompt, or None if `rendered` does not begin with the prompt."""
    return rendered[len(prompt) :] if len(rendered) > len(prompt) and rendered.startswith(prompt) else None


def _leading_whitespace(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern for any of the texts, the longest first, or one that never matches."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
