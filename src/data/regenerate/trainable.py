"""Checks an answer as training will: what regeneration keeps, training takes."""

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.spans import REASONING_DROPPED, TEXT_DROPPED
from data.preprocess.tool_calls import NAME, SAMPLE, SAMPLE_TOOL
from data.regenerate.conversation import Sample
from data.sources.records import Conversation, conversation

MIN_TOKENS = 2  # of an answer: an anchor and a label
# Parts that servers split off an answer and some templates do not write: note in training -> part, server's parser.
SPLIT_OFF = {
    REASONING_DROPPED: ("the answer's reasoning", "reasoning parser"),
    TEXT_DROPPED: ("the answer's text beside its tool call", "tool call parser"),
}


class TrainingChecker:
    """Checks the last answer of a sample with the functions that training uses."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder

    def check(self, sample: Sample) -> int:
        """Check that training accepts the sample's record, and return the number of tokens of its last answer.

        Raises:
            BadRecord: the record is invalid, the chat template rejects it, a text contains a special token, or the last
                answer is refused, too short for an anchor, or without a part that the target wrote.
        """
        found = conversation(sample.record())
        answers = {turn for turn, message in enumerate(found.messages) if message["role"] == "assistant"}
        rendered = self.encoder.render(replace(found, untrained=frozenset(answers - {max(answers)})))
        for turn, reason in rendered.supervision.refused.items():
            raise BadRecord(f"turn {turn}: {reason}")
        if max(answers) not in sample.token_ids:
            self._check_parts(rendered.supervision.notes, max(answers) + 1)
        (documents,) = self.encoder.tokenize([rendered])
        length = max((span.end - span.start for document in documents for span in document.answers), default=0)
        if length < MIN_TOKENS:
            raise BadRecord(f"turn {max(answers) + 1}: the answer has fewer than {MIN_TOKENS} tokens to train on")
        return length

    def _check_parts(self, notes: Collection[str], turn: int) -> None:
        for note, (part, parser) in SPLIT_OFF.items():
            if note in notes:
                raise BadRecord(
                    f"turn {turn}: the chat template does not write {part}; start the server without a {parser}, "
                    "or use a server that returns token ids"
                )

    def calls_tool(self, sample: Sample) -> bool:
        """Return whether the last answer calls a tool, in the form that the chat template writes."""
        message = sample.messages[-1]
        if message.get("tool_calls"):
            return True
        if not sample.tools or self._opening is None:
            return False
        written = sample.written.get(len(sample.messages) - 1)
        ids = written.token_ids if written else None
        text = message["content"] if ids is None else self.encoder.backend.decode(ids, skip_special_tokens=False)
        text = "".join(text.split())
        if not self._opening:
            return any(text.startswith(tool["function"]["name"]) for tool in sample.tools)
        return text.startswith(self._opening) or (self._opening[0] != "{" and self._opening in text)

    @cached_property
    def _opening(self) -> str | None:
        """The template's text before the name of a called tool, without whitespace; None if it writes no calls."""
        try:
            rendered = self.encoder.render(Conversation(SAMPLE, [{"type": "function", "function": SAMPLE_TOOL}]))
        except BadRecord:
            return None
        for text in rendered.supervision.texts:
            before, name, _ = text.text[text.answers[0].start :].partition(NAME)
            return "".join(before.split()) if name else None
        return None
