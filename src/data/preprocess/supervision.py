"""Determines the text of each supervised answer as the target would generate it, for any chat template.

A supervised answer follows the same prompt that decoding starts from: the earlier messages and the generation prompt.
The answer consists of the text that the target would write and the token at which generation stops. Answers whose
prompts extend one another share one text. If the template rewrites history, e.g. by dropping earlier reasoning, an
answer gets a separate text. `{% generation %}` markers are ignored, because some templates put headers inside them.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from data.errors import BadRecord
from data.preprocess.prompts import CHECKED, Render, prompts, question
from data.preprocess.skeleton import Skeleton, placeholders, regular, skeleton
from data.preprocess.spans import Answer, Rendered, Supervision
from data.preprocess.tool_calls import dropped_call, result_written
from data.sources.records import Message, Messages, Written

OPENS_REASONING = re.compile(r"<([\w:]*think\w*)>\s*$")
CLOSES_REASONING = re.compile(r"</[\w:]*think\w*>\s*$")
OPENING = re.compile(r"\s*<([\w:]*think\w*)>\n?")
EMPTY_BLOCK = re.compile(r"\s*<([\w:]*think\w*)>(\s*)</\1>")
# Sample messages, used to find the text that the template writes after an answer.
ANSWER, NEXT_QUESTION = "It is as follows.", "What follows from this?"
RESULT = "The result is as follows."
NO_REASONING = "the prompt opens a reasoning block, but the answer has no reasoning"

# Notes on an answer, which the data report counts.
NO_END_TOKEN = "no end token"  # noqa: S105  the template writes no end token after the answer
OTHER_END_TOKEN = "not a stop token"  # noqa: S105  the template's end token does not stop generation
TEXT_DROPPED = "without its text"  # the template drops the text beside tool calls
REASONING_DROPPED = "without its reasoning"  # neither the prompt nor the template includes the record's reasoning
CUT_OFF = "cut off"  # generation ended at the token limit, so no end token is supervised


class Supervisor:
    """Locates the answers in conversations rendered with a given chat template."""

    def __init__(self, render: Render, stop: Iterable[str], added: Iterable[str]) -> None:
        """Store the template and compile patterns for the tokens that may end an answer.

        Args:
            render: renders messages with the chat template.
            stop: the texts of the target's stop tokens.
            added: the texts of all added tokens. One of them ends an answer if the template writes no stop token.
        """
        stop, added = list(stop), list(added)
        self.render, self.stop, self.added = render, _any_of(stop), _any_of(added)
        self.ends = sorted({*stop, *added}, key=len, reverse=True)
        # Keyed by message roles. None if conversations are too different to share skeletons.
        self.skeletons: dict[tuple[str, ...], Skeleton | None] | None = {}

    def rendering(self, render: Render) -> "Supervisor":
        """Return a supervisor that renders messages with `render`, e.g. with the tools of one conversation."""
        other = copy.copy(self)
        other.render, other.skeletons = render, None
        return other

    def supervise(
        self, messages: Messages, turns: list[int], written: Mapping[int, Written] | None = None
    ) -> Supervision:
        """Render a conversation up to the last of the given answers and locate these answers.

        Args:
            messages: the conversation.
            turns: the ascending message indices of the answers to locate, starting with the first answer.
            written: answers as the target wrote them, by message index. If the tokens of one are known, its text is
                only a guess at where they are, to share a document: it may be empty, and gets no notes.

        Raises:
            BadRecord: the template rejects the conversation.
        """
        messages = messages[: turns[-1] + 1] if turns else []
        # A skeleton gives all answers the same notes and ends.
        known = written or {}
        by_ids = bool(known) and all(turn in known and known[turn].token_ids is not None for turn in turns)
        found = self._by_skeleton(messages, turns) if 0 < len(turns) <= CHECKED and (by_ids or not known) else None
        if found is None:
            return self._by_answer(messages, turns, known)
        return Supervision(found.texts) if by_ids else found

    def _by_skeleton(self, messages: Messages, turns: list[int]) -> Supervision | None:
        roles = tuple(message["role"] for message in messages)
        if self.skeletons is None or not regular(messages) or roles.count("assistant") != len(turns):
            return None
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

    def _by_answer(
        self, messages: Messages, turns: list[int], written: Mapping[int, Written] | None = None
    ) -> Supervision:
        written = written or {}
        found, texts = Supervision(), _AnswerTexts(self, messages, many=len(turns) > CHECKED)
        for turn, prompt in zip(turns, prompts(self.render, messages, turns), strict=True):
            try:
                text, whitespace, notes = self._answer(texts, turn, prompt, written.get(turn))
            except _Refused as error:
                found.refused[turn + 1] = str(error)
                continue
            found.notes.update(notes)
            end = len(prompt) + len(text)
            answer = Answer(turn, len(prompt), end, end + len(whitespace))
            _append(found.texts, Rendered(prompt + text + whitespace, [answer]))
        return found

    def _answer(
        self, texts: "_AnswerTexts", turn: int, prompt: str, known: Written | None
    ) -> tuple[str, str, list[str]]:
        """Return an answer, the whitespace after it, and notes, as `_AnswerTexts.of` does."""
        if known is not None and known.token_ids is not None:
            try:
                return (*texts.of(turn, prompt)[:2], [])
            except (_Refused, BadRecord):
                return "", "", []  # the tokens suffice
        text, whitespace, notes = texts.of(turn, prompt)
        if known is not None and known.truncated:
            end = next((token for token in self.ends if text.endswith(token)), "")
            return text.removesuffix(end).rstrip(), "", []
        return text, whitespace, notes

    def split(self, tail: str, around: Callable[[], tuple[str, str]]) -> tuple[str, str, list[str]]:
        """Split the text after a prompt into the answer and the whitespace after it.

        The answer ends with the first stop token. If the text has none, the stop token may be the first token of the
        next turn (GLM). Otherwise, the answer ends with the next added token, or without an end token.

        Args:
            tail: the text that the template writes after the prompt.
            around: returns the text that the template writes after a final answer, and the text between an answer and
                the next question.

        Returns:
            The answer with its end token, the whitespace after it, and notes for the data report.
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
    """Raised for an answer that the target would not generate after its prompt."""


class _AnswerTexts:
    """Determines the text of each answer in one conversation, given the answer's prompt."""

    def __init__(self, supervisor: Supervisor, messages: Messages, *, many: bool) -> None:
        self.supervisor, self.messages = supervisor, messages
        self.many, self.checked, self.local = many, 0, True

    def of(self, turn: int, prompt: str) -> tuple[str, str, list[str]]:
        """Return the answer in message `turn` with its end token, the whitespace after it, and notes for the report.

        Raises:
            _Refused: the prompt opens a reasoning block, but the record has no reasoning; or the template drops the
                result of a tool from the prompt, or a tool call from the answer.
        """
        self._check_results(turn, prompt)
        opened, closed = OPENS_REASONING.search(prompt), CLOSES_REASONING.search(prompt)
        message = _split(self.messages[turn], opened[1] if opened else None)
        if opened and message.reasoning is None:
            raise _Refused(NO_REASONING)
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
        text, whitespace, notes = self.supervisor.split(tail, lambda: self._around(turn))
        if thought and thought not in text:
            notes.append(REASONING_DROPPED)
        if calls := self.messages[turn].get("tool_calls"):
            if name := dropped_call(calls, text):
                raise _Refused(f"the chat template does not write the tool call {name} or its arguments")
            if message.content.strip() not in text:
                notes.append(TEXT_DROPPED)
        return text, whitespace, notes

    def _check_results(self, turn: int, prompt: str) -> None:
        """Check that the results of tools directly before an answer are in its prompt."""
        for message in reversed(self.messages[:turn]):
            if message["role"] != "tool":
                return
            if not result_written(message["content"], prompt):
                raise _Refused("the chat template does not write the result of a tool into the prompt")

    def _rewritten(
        self, turn: int, prompt: str, message: "_Message", opened: re.Match[str] | None, closed: re.Match[str] | None
    ) -> str:
        """Return an answer that the template does not write after its prompt, followed by the template's end token."""
        if "tool_calls" not in self.messages[turn]:
            return message.written(opened, closed) + self._around(turn)[0]
        asked, render = question(self.messages, turn), self.supervisor.render
        bare = {key: value for key, value in self.messages[turn].items() if key != "reasoning_content"}
        header = render(asked, True)
        block = (OPENS_REASONING if opened else CLOSES_REASONING).search(header)
        body = _added(
            header[: block.start()] if block else header, render([*asked, bare | {"content": message.content}], False)
        )
        if body is None:
            raise _Refused("the chat template does not write the tool call after the prompt of the answer")
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
            return None  # rejected without the earlier turns

    def _around(self, turn: int) -> tuple[str, str]:
        """Return the template's text after a final answer, and its text between an answer and the next message."""
        if "tool_calls" in self.messages[turn]:
            return self._around_calls(turn)
        return self._around_text(turn)

    def _around_calls(self, turn: int) -> tuple[str, str]:
        exchange, render = [*question(self.messages, turn), self.messages[turn]], self.supervisor.render
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
        render = self.supervisor.render
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
    content = message["content"] or ""
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


def _append(texts: list[Rendered], new: Rendered) -> None:
    """Append an answer to the last text if its prompt extends that text; otherwise, add it as a separate text."""
    if texts:
        last = texts[-1]
        end = last.answers[-1].end
        if new.answers[0].start >= end and new.text.startswith(last.text[:end]):
            texts[-1] = Rendered(new.text, last.answers + new.answers)
            return
    texts.append(new)


def _added(prompt: str, rendered: str) -> str | None:
    """Return the text that `rendered` adds to a prompt, or None if it adds nothing or starts differently."""
    return rendered[len(prompt) :] if len(rendered) > len(prompt) and rendered.startswith(prompt) else None


def _leading_whitespace(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of the texts and prefers longer ones. Without texts, it never matches."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
