"""Determines the text of an answer as the target would generate it after its prompt."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from data.errors import BadRecord
from data.preprocess.prompts import CHECKED, Render, question
from data.preprocess.spans import REASONING_DROPPED, TEXT_DROPPED
from data.preprocess.tool_calls import dropped_call, result_written
from data.sources.records import Message, Messages

Split = Callable[[str, Callable[[], tuple[str, str]]], tuple[str, str, list[str]]]
OPENS_REASONING = re.compile(r"<([\w:]*think\w*)>\s*$")
CLOSES_REASONING = re.compile(r"</[\w:]*think\w*>\s*$")
OPENING = re.compile(r"\s*<([\w:]*think\w*)>\n?")
EMPTY_BLOCK = re.compile(r"\s*<([\w:]*think\w*)>(\s*)</\1>")
# Sample messages, used to find the text that the template writes after an answer.
ANSWER, NEXT_QUESTION = "It is as follows.", "What follows from this?"
RESULT = "The result is as follows."
NO_REASONING = "the prompt opens a reasoning block, but the answer has no reasoning"


class Refused(ValueError):
    """Raised for an answer that the target would not generate after its prompt."""


class AnswerTexts:
    """Determines the text of each answer in one conversation, given the answer's prompt."""

    def __init__(self, render: Render, split: Split, messages: Messages, *, many: bool) -> None:
        """Store the conversation.

        Args:
            render: renders messages with the chat template.
            split: see `Supervisor.split`.
            messages: the conversation.
            many: whether it has more than CHECKED answers.
        """
        self.render, self.split, self.messages = render, split, messages
        self.many, self.checked, self.local = many, 0, True

    def of(self, turn: int, prompt: str) -> tuple[str, str, list[str]]:
        """Return the answer in message `turn` with its end token, the whitespace after it, and notes for the report.

        Raises:
            Refused: the prompt opens a reasoning block, but the record has no reasoning; or the template drops the
                result of a tool from the prompt, or a tool call from the answer.
        """
        self._check_results(turn, prompt)
        opened, closed = OPENS_REASONING.search(prompt), CLOSES_REASONING.search(prompt)
        message = _split(self.messages[turn], opened[1] if opened else None)
        if opened and message.reasoning is None:
            raise Refused(NO_REASONING)
        thought = (message.reasoning or "").strip()
        tail = self._tail(turn, prompt)
        if tail is not None and opened and tail.partition(f"</{opened[1]}>")[0].strip() != thought:
            tail = None  # the template drops the reasoning, or treats it as part of the answer
        if tail is not None and message.block is not None and (thought in tail) == bool(closed):
            tail = None  # the template drops the reasoning, or writes it after the empty block in the prompt
        if tail is not None and thought and (empty := EMPTY_BLOCK.match(tail)):
            tail = None if message.block is not None else _filled(tail, empty, thought)
        if tail is None:
            tail = self._rewritten(turn, prompt, message, opened, closed)
        text, whitespace, notes = self.split(tail, lambda: self._around(turn))
        if thought and thought not in text:
            notes.append(REASONING_DROPPED)
        if calls := self.messages[turn].get("tool_calls"):
            if name := dropped_call(calls, text):
                raise Refused(f"the chat template does not write the tool call {name} or its arguments")
            if message.content.strip() not in text:
                notes.append(TEXT_DROPPED)
        return text, whitespace, notes

    def _check_results(self, turn: int, prompt: str) -> None:
        """Check that the results of tools directly before an answer are in its prompt."""
        for message in reversed(self.messages[:turn]):
            if message["role"] != "tool":
                return
            if not result_written(message["content"], prompt):
                raise Refused("the chat template does not write the result of a tool into the prompt")

    def _rewritten(
        self, turn: int, prompt: str, message: "_Message", opened: re.Match[str] | None, closed: re.Match[str] | None
    ) -> str:
        """Return an answer that the template does not write after its prompt, followed by the template's end token."""
        if "tool_calls" not in self.messages[turn]:
            return message.written(opened, closed) + self._around(turn)[0]
        asked, render = question(self.messages, turn), self.render
        bare = {key: value for key, value in self.messages[turn].items() if key != "reasoning_content"}
        if "content" in bare:
            bare["content"] = message.content
        header = render(asked, True)
        block = OPENS_REASONING.search(header)
        body = _added(header[: block.start()] if block else header, render([*asked, bare], False))
        if body is None:
            raise Refused("the chat template does not write the tool call after the prompt of the answer")
        return f"{(message.reasoning or '').strip()}\n</{opened[1]}>\n\n{body}" if opened else body

    def _tail(self, turn: int, prompt: str) -> str | None:
        """Return the text that the template writes after the prompt, or None if it cannot be determined.

        If the template rewrites the prompt, the answer is rendered after its question alone. In long conversations,
        this is also done once both renderings have agreed for the first `CHECKED` answers.
        """
        if (
            self.many
            and self.local
            and self.checked >= CHECKED
            and (tail := self._tail_alone(turn, prompt)) is not None
        ):
            return tail
        tail = _added(prompt, self.render(self.messages[: turn + 1], False))
        if self.many or tail is None:
            alone = self._tail_alone(turn, prompt)
            self.checked, self.local = self.checked + 1, self.local and tail in (alone, None)
            tail = alone if tail is None else tail
        return tail

    def _tail_alone(self, turn: int, prompt: str) -> str | None:
        """Return the answer's text after its question and the last calls of tools, or else after its question."""
        asked, render = question(self.messages, turn), self.render
        for context in [asked, asked[:1]][: len(asked)]:
            try:
                alone = render(context, True)
                if _reasoning_state(alone) != _reasoning_state(prompt):
                    continue  # an earlier message turns reasoning on or off
                if (tail := _added(alone, render([*context, self.messages[turn]], False))) is not None:
                    return tail
            except BadRecord:
                continue  # rejected without the earlier turns
        return None

    def _around(self, turn: int) -> tuple[str, str]:
        """Return the template's text after a final answer, and its text between an answer and the next message."""
        if "tool_calls" in self.messages[turn]:
            return self._around_calls(turn)
        return self._around_text(turn)

    def _around_calls(self, turn: int) -> tuple[str, str]:
        exchange, render = [*question(self.messages, turn), self.messages[turn]], self.render
        calls = self.messages[turn]["tool_calls"]
        results = [
            {"role": "tool", "content": RESULT} | ({"tool_call_id": c["id"]} if "id" in c else {}) for c in calls
        ]
        try:
            answered, following = render(exchange, False), render([*exchange, *results], False)
        except BadRecord:
            return self._around_text(turn)
        between = following[len(answered) :].partition(RESULT)[0] if following.startswith(answered) else ""
        return self._around_text(turn)[0], between

    def _around_text(self, turn: int) -> tuple[str, str]:
        exchange = [*question(self.messages, turn), {"role": "assistant", "content": ANSWER}]
        render = self.render
        try:
            last = render(exchange, False)
            following = render([*exchange, {"role": "user", "content": NEXT_QUESTION}], False)
        except BadRecord:
            return "", ""
        between = following.rpartition(NEXT_QUESTION)[0]
        return last.rpartition(ANSWER)[2], between.rpartition(ANSWER)[2] if ANSWER in between else ""


def _reasoning_state(prompt: str) -> tuple[bool, bool]:
    """Return whether a prompt ends by opening a reasoning block, and whether it ends by closing one."""
    return bool(OPENS_REASONING.search(prompt)), bool(CLOSES_REASONING.search(prompt))


@dataclass(frozen=True)
class _Message:
    """An assistant message, split into reasoning and content."""

    reasoning: str | None
    content: str
    block: str | None = None  # "reasoning</think>content" if the record stores the reasoning inside its content
    opening: str = ""  # the opening tag before `block`; may be missing if the prompt opens the block

    def written(self, opened: re.Match[str] | None, closed: re.Match[str] | None) -> str:
        """Return the answer as the target writes it after a prompt that may open or close a reasoning block."""
        if opened and self.block is None:
            return f"{(self.reasoning or '').strip()}\n</{opened[1]}>\n\n{self.content}"
        if opened:
            return self.block or ""
        return self.content if closed or self.block is None else self.opening + self.block


def _split(message: Message, tag: str | None) -> _Message:
    """Split an assistant message. `tag` is the reasoning tag that the prompt opens; the content may lack that tag."""
    content = message.get("content", "")
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
    """Insert the reasoning into the empty block that a template writes before every finished answer (Kimi K2)."""
    middle = (empty.start(2) + empty.end(2)) // 2
    return tail[:middle] + reasoning + tail[middle:]


def _added(prompt: str, rendered: str) -> str | None:
    """Return the text that `rendered` adds to a prompt, or None if it adds nothing or starts differently."""
    return rendered[len(prompt) :] if len(rendered) > len(prompt) and rendered.startswith(prompt) else None
