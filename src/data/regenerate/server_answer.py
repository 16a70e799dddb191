"""Turns the replies of a server into answers as the target wrote them."""

import re
from collections import Counter
from dataclasses import replace

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder
from data.regenerate.server_reply import Reply
from data.sources.kinds import OPENED
from data.sources.records import Message
from data.sources.tags import OPENING


class AnswerReader:
    """Reads the answers of one server."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder
        self.uncounted: Counter[int] = Counter()  # tokens that the server did not count -> number of answers

    def read(self, reply: Reply, prompt: list[int]) -> Reply:
        """Return a reply whose message and token ids are those of the answer. Unknown ids are None.

        Args:
            prompt: the token ids of the reply's prompt.
        """
        reply = self._without_stop_token(reply)
        ids, message = self._ids(reply), reply.message
        if not ids and not reply.complete:
            message = self._cut_in_reasoning(message, prompt)
        if ids and _only_reasoning(message):
            message = {"content": self.encoder.backend.decode(ids)}  # a parser found no end of the reasoning
        return replace(reply, message=message, token_ids=ids)

    def verified(self, reply: Reply, length: int) -> bool:
        """Return whether an answer is read back as the number of tokens that the server counted.

        Servers differ in whether they count the stop token. It counts as in most answers so far.

        Args:
            length: the answer's number of tokens in training, including the stop token of a complete answer.
        """
        if reply.token_ids is not None:
            return True
        if not reply.tokens:
            return False
        uncounted = length - reply.tokens
        if not reply.complete:
            return uncounted == 0
        if uncounted in (0, 1):
            self.uncounted[uncounted] += 1
        return uncounted in dict(self.uncounted.most_common(1))

    def _without_stop_token(self, reply: Reply) -> Reply:
        """Return a reply without the stop token at the end of its text, which some servers keep there."""
        if reply.token_ids and reply.token_ids[-1] not in self.encoder.token_ids.stop_ids:
            return reply
        text = reply.message["content"].rstrip()
        stop = next((token for token in self.encoder.stop_tokens if text.endswith(token)), None)
        if stop is None:
            return reply
        return replace(reply, message={**reply.message, "content": text.removesuffix(stop)}, complete=True)

    def _ids(self, reply: Reply) -> list[int] | None:
        """Return the answer's token ids.

        None if they are unknown, or of more than the text, e.g. a stop string, or without the stop token of a complete
        answer. With such ids, training would never see the end of an answer.
        """
        if reply.token_ids is None:
            return None
        if reply.complete and reply.token_ids[-1] not in self.encoder.token_ids.stop_ids:
            return None
        try:
            self.encoder.token_ids.check(reply.message, reply.token_ids)
        except BadRecord:
            return None
        return reply.token_ids

    def _cut_in_reasoning(self, message: Message, prompt: list[int]) -> Message:
        """Return an answer that was cut off in its reasoning as the target wrote it: with the opening tag, as text.

        Unchanged if the answer has other parts, or neither the prompt nor the template has an opening tag.
        """
        if not _only_reasoning(message):
            return message
        reasoning = message["reasoning_content"]
        if OPENED.search(self.encoder.backend.decode(prompt, skip_special_tokens=False)):
            return {"content": reasoning}
        opening = re.search(OPENING, self.encoder.template)
        return {"content": f"{opening[0]}\n{reasoning.lstrip()}"} if opening else message


def _only_reasoning(message: Message) -> bool:
    return "reasoning_content" in message and not message["content"].strip() and "tool_calls" not in message
