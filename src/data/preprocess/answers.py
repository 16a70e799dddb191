"""Determines the text of an answer as the target would generate it after its prompt."""

import re
from collections.abc import Callable

from data.errors import BadRecord
from data.preprocess.prompts import CHECKED, Render, common_prefix, question
from data.preprocess.reasoning import CLOSES, EMPTY_BLOCK, OPENS, STARTS, UNKNOWN, Parts, closing, fill, split_reasoning
from data.preprocess.spans import REASONING_DROPPED, TEXT_DROPPED
from data.preprocess.tool_calls import dropped_call, result_written
from data.sources.records import Message, Messages

Split = Callable[[str, Callable[[], tuple[str, str]]], tuple[str, str, list[str]]]
# Sample messages, used to find the text that the template writes after an answer.
ANSWER, NEXT_QUESTION = "It is as follows.", "What follows from this?"
RESULT = "The result is as follows."
NO_REASONING = "the prompt opens a reasoning block, but the answer has no reasoning"
REWRITTEN = "the prompt ends with text that the chat template does not write before the finished answer"
UNWRITTEN_CALL = "the chat template does not write the tool call after the prompt of the answer"
ALTERED = "the chat template drops or changes the text of the answer"


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
                result of a tool from the prompt, or a tool call or text from the answer, or rewrites the prompt.
        """
        self._check_results(turn, prompt)
        opened, closed, answer = OPENS.search(prompt), CLOSES.search(prompt), self.messages[turn]
        if closed and (message := split_reasoning(answer, None)).reasoning is not None:
            answer = message.bare(answer)  # the target has no reasoning to write
        tail = self._tail(turn, prompt, answer)
        if tail is None and not opened and not closed:
            opened, answer = self._unlisted(turn, prompt)
        message = split_reasoning(self.messages[turn] if closed else answer, opened[1] if opened else None)
        if opened and message.reasoning is None:
            raise Refused(NO_REASONING)
        thought = (message.reasoning or "").strip()
        if tail is not None and opened and tail.partition(closing(opened[1]))[0].strip() != thought:
            tail = None  # the template drops the reasoning, or treats it as part of the answer
        if tail is not None and message.block is not None and not closed and thought not in message.before(tail):
            tail = None  # the template drops the reasoning
        if tail is not None and thought and not closed and (filled := fill(tail, thought)) is not None:
            tail = None if message.block is not None else filled
        if tail is None:
            tail = self._rewritten(turn, prompt, message, opened, closed)
        text, whitespace, notes = self.split(tail, lambda: self._around(turn))
        if thought and thought not in message.before(text):
            notes.append(REASONING_DROPPED)
        self._check_text(turn, message, text, notes)
        return text, whitespace, notes

    def _unlisted(self, turn: int, prompt: str) -> tuple[re.Match[str] | None, Message]:
        """Return the tag that opens reasoning at the end of a prompt, and the answer without this tag in front.

        The tag has none of the usual names, but the template does not write it before a finished answer.

        Raises:
            Refused: the prompt ends with other text that the template does not write before the finished answer.
        """
        answer = self.messages[turn]
        rendered, content = self.render(self.messages[: turn + 1], False), answer.get("content", "").strip()
        same = common_prefix(prompt, rendered)
        opened, added = UNKNOWN.search(prompt), prompt[same:].strip()
        if opened and content.startswith(opened[1]):
            return opened, answer | {"content": content.removeprefix(opened[1]).removeprefix("\n")}
        if content and rendered.find(content, max(0, same - len(content)), same + len(content)) < 0:
            if added and content.startswith(added):
                raise Refused(REWRITTEN)
            return None, answer
        if opened is None and content:
            raise Refused(REWRITTEN)
        return opened, answer

    def _check_text(self, turn: int, message: Parts, text: str, notes: list[str]) -> None:
        """Check that an answer contains its calls and its text. Text that is missing beside calls is only noted."""
        missing = message.content.strip() not in text
        if calls := self.messages[turn].get("tool_calls"):
            if name := dropped_call(calls, text):
                raise Refused(f"the chat template does not write the tool call {name} or its arguments")
            if missing:
                notes.append(TEXT_DROPPED)
        elif missing:
            raise Refused(ALTERED)

    def _check_results(self, turn: int, prompt: str) -> None:
        """Check that the results of tools directly before an answer are in its prompt."""
        for index in reversed(range(turn)):
            message = self.messages[index]
            if message["role"] != "tool":
                return
            short = len(message["content"].strip()) < len(RESULT)
            if not result_written(message["content"], prompt) or (short and self._drops_result(turn, index)):
                raise Refused("the chat template does not write the result of a tool into the prompt")

    def _drops_result(self, turn: int, index: int) -> bool:
        """Return whether the template drops the result in message `index`. A short one may be anywhere in a prompt."""
        asked = question(self.messages, turn)
        place = index - turn  # counted from the end
        asked[place] = asked[place] | {"content": RESULT}
        try:
            return RESULT not in self.render(asked, True)
        except BadRecord:
            return False

    def _rewritten(
        self, turn: int, prompt: str, message: Parts, opened: re.Match[str] | None, closed: re.Match[str] | None
    ) -> str:
        """Return an answer that the template does not write after its prompt, followed by the template's end token."""
        if "tool_calls" not in self.messages[turn]:
            return message.written(opened, closed) + self._around(turn)[0]
        asked, render = question(self.messages, turn), self.render
        header = render(asked, True)
        block = OPENS.search(header) or (UNKNOWN.search(header) if opened else None)
        rendered = render([*asked, message.bare(self.messages[turn])], False)
        body = _added(header[: block.start()] if block else header, rendered)
        if body is None:
            raise Refused(UNWRITTEN_CALL)
        if not opened:
            return body
        if empty := EMPTY_BLOCK.match(body):  # in place of the reasoning
            body = body[empty.end() :]
        if STARTS.match(body):
            raise Refused(UNWRITTEN_CALL)
        return message.continued(opened, body.lstrip())

    def _tail(self, turn: int, prompt: str, answer: Message) -> str | None:
        """Return the text that the template writes after the prompt, or None if it cannot be determined.

        If the template rewrites the prompt, the answer is rendered after its question alone. In long conversations,
        this is also done once both renderings have agreed for the first `CHECKED` answers and a few later ones.
        """
        if self.many and self.local and self.checked == CHECKED:
            self.checked, self.local = CHECKED + 1, self._agree_later(turn)
        if (
            self.many
            and self.local
            and self.checked > CHECKED
            and (alone := self._tail_alone(turn, prompt, answer)) is not None
        ):
            return alone
        tail = _added(prompt, self.render([*self.messages[:turn], answer], False))
        if self.many or tail is None:
            alone = self._tail_alone(turn, prompt, answer)
            self.checked, self.local = self.checked + 1, self.local and tail in (alone, None)
            tail = alone if tail is None else tail
        return tail

    def _agree_later(self, turn: int) -> bool:
        """Compare both renderings of the last answer, and of some answers from message `turn` on: at powers of two."""
        later = [i for i, message in enumerate(self.messages) if i >= turn and message["role"] == "assistant"]
        for i in {*(1 << power for power in range(len(later).bit_length())), len(later)}:
            prompt = self.render(self.messages[: later[i - 1]], True)
            alone = self._tail_alone(later[i - 1], prompt, self.messages[later[i - 1]])
            if alone is not None and alone != _added(prompt, self.render(self.messages[: later[i - 1] + 1], False)):
                return False
        return True

    def _tail_alone(self, turn: int, prompt: str, answer: Message) -> str | None:
        """Return the answer's text after its question and the last calls of tools, or else after its question."""
        asked, render = question(self.messages, turn), self.render
        for context in [asked, asked[:1]][: len(asked)]:
            try:
                alone = render(context, True)
                if _reasoning_state(alone) != _reasoning_state(prompt):
                    continue  # an earlier message turns reasoning on or off
                if (tail := _added(alone, render([*context, answer], False))) is not None:
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
    return bool(OPENS.search(prompt)), bool(CLOSES.search(prompt))


def _added(prompt: str, rendered: str) -> str | None:
    """Return the text that `rendered` adds to a prompt, or None if it adds nothing or starts differently."""
    return rendered[len(prompt) :] if len(rendered) > len(prompt) and rendered.startswith(prompt) else None
