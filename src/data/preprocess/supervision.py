"""Determines the text of each supervised answer as the target would generate it, for any chat template.

A supervised answer follows the same prompt that decoding starts from: the earlier messages and the generation prompt.
The answer consists of the text that the target would write and the token at which generation stops. Answers whose
prompts extend one another share one text. If the template rewrites history, e.g. by dropping earlier reasoning, an
answer gets a separate text. `{% generation %}` markers are ignored, because some templates put headers inside them.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from data.errors import BadRecord
from data.preprocess.answers import AnswerTexts, Refused
from data.preprocess.prompts import CHECKED, Render, prompts
from data.preprocess.skeleton import Skeleton, placeholders, regular, skeleton
from data.preprocess.spans import NO_END_TOKEN, OTHER_END_TOKEN, Answer, Rendered, Supervision
from data.preprocess.switches import Switches
from data.sources.records import Messages, Written


class Supervisor:
    """Locates the answers in conversations rendered with a given chat template."""

    def __init__(
        self, render: Render, stop: Iterable[str], added: Iterable[str], switches: Switches | None = None
    ) -> None:
        """Store the template and compile patterns for the tokens that may end an answer.

        Args:
            render: renders messages with the chat template.
            stop: the texts of the target's stop tokens.
            added: the texts of all added tokens. One of them ends an answer if the template writes no stop token.
            switches: properties of contents that may change the text around messages, or None if unknown.
        """
        stop, added = list(stop), list(added)
        self.render, self.stop, self.added = render, _any_of(stop), _any_of(added)
        self.switches = switches
        self.ends = sorted({*stop, *added}, key=len, reverse=True)
        # Keyed by message roles. None if conversations are too different to share skeletons.
        self.skeletons: dict[tuple[str, ...], Skeleton | None] | None = {}
        self.uses: Counter[tuple[str, ...]] = Counter()

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
        if self.skeletons is None or self.switches is None or roles.count("assistant") != len(turns):
            return None
        if not regular(messages, self.switches):
            return None
        if roles not in self.skeletons:
            self.skeletons[roles] = self._skeleton(roles)
        if (found := self.skeletons[roles]) is None:
            return None
        self.uses[roles] += 1
        prompt = self.render(messages[: turns[-1]], True) if _is_checked(self.uses[roles]) else None
        return found.supervise(messages, self.render(messages, False), prompt)

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
        found, texts = Supervision(), AnswerTexts(self.render, self.split, messages, many=len(turns) > CHECKED)
        for turn, prompt in zip(turns, prompts(self.render, messages, turns), strict=True):
            try:
                text, whitespace, notes = self._answer(texts, turn, prompt, written.get(turn))
            except Refused as error:
                found.refused[turn + 1] = str(error)
                continue
            found.notes.update(notes)
            end = len(prompt) + len(text)
            answer = Answer(turn, len(prompt), end, end + len(whitespace))
            _append(found.texts, Rendered(prompt + text + whitespace, [answer]))
        return found

    def _answer(self, texts: AnswerTexts, turn: int, prompt: str, known: Written | None) -> tuple[str, str, list[str]]:
        """Return an answer, the whitespace after it, and notes, as `AnswerTexts.of` does."""
        if known is not None and known.token_ids is not None:
            try:
                return (*texts.of(turn, prompt)[:2], [])
            except (Refused, BadRecord):
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


def _is_checked(use: int) -> bool:
    """Return whether the skeleton's last prompt is compared with a rendered one: at first, then at powers of two.

    By `find_switches`, it always agrees. This is a safeguard.
    """
    return use <= CHECKED or use & (use - 1) == 0


def _append(texts: list[Rendered], new: Rendered) -> None:
    """Append an answer to the last text if its prompt extends that text; otherwise, add it as a separate text."""
    if texts:
        last = texts[-1]
        end = last.answers[-1].end
        if new.answers[0].start >= end and new.text.startswith(last.text[:end]):
            texts[-1] = Rendered(new.text, last.answers + new.answers)
            return
    texts.append(new)


def _leading_whitespace(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of the texts and prefers longer ones. Without texts, it never matches."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
