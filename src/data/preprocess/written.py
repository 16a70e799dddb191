"""Checks answers that are stored as the target's tokens."""

import re
from collections.abc import Collection, Iterator

from tokenizers import Tokenizer

from data.errors import BadRecord
from data.sources.records import Message

EMPTY_REASONING = re.compile(r"\s*(<[\w:]*think\w*>)?\s*</[\w:]*think\w*>")  # its opening tag may be in the prompt


class TokenIdChecker:
    """Checks that token ids belong to the target's tokenizer and to the text beside them."""

    def __init__(self, backend: Tokenizer, stop_ids: Collection[int]) -> None:
        self.backend, self.stop_ids = backend, frozenset(stop_ids)
        self.added = frozenset(backend.get_added_tokens_decoder())

    def check(self, message: Message, token_ids: list[int]) -> None:
        """Check the tokens of an answer.

        Raises:
            BadRecord: a token is outside the vocabulary or follows a stop token, or the tokens decode to other text.
        """
        unknown = next((token for token in set(token_ids) if self.backend.id_to_token(token) is None), None)
        if unknown is not None:
            raise BadRecord(f"`token_ids`: {unknown} is not in the target's vocabulary; remove tokens of another model")
        if not self.stop_ids.isdisjoint(token_ids[:-1]):
            raise BadRecord("`token_ids`: tokens follow a stop token, at which the target's generation ends")
        if not any(_reads_as(decoded, message) for decoded in self._decoded(token_ids)):
            decoded = self.backend.decode(token_ids)
            raise BadRecord(
                f"`token_ids` decode to {decoded!r:.60}, not to the text; remove them if the text was edited or the "
                "tokens are another model's"
            )

    def _decoded(self, token_ids: list[int]) -> Iterator[str]:
        """Yield the text without special tokens, with them, and after the last marker of a channel or reasoning block.

        Servers return any of these. The stop token is left out.
        """
        yield self.backend.decode(token_ids)
        if token_ids[-1] in self.stop_ids:
            token_ids = token_ids[:-1]
        yield self.backend.decode(token_ids, skip_special_tokens=False)
        last = max((index for index, token in enumerate(token_ids) if token in self.added), default=-1)
        yield self.backend.decode(token_ids[last + 1 :])


def _reads_as(decoded: str, message: Message) -> bool:
    """Return whether decoded tokens are the text of a message, apart from surrounding whitespace.

    A server that parses reasoning or tool calls removes markers from the text. In such messages, the decoded text must
    contain every part.
    """
    content, reasoning = message["content"].strip(), message.get("reasoning_content", "").strip()
    names = [call.get("function", call).get("name", "") for call in message.get("tool_calls", ())]
    if not reasoning and not names:
        return _plain(decoded) == _plain(content)
    return all(part in decoded for part in (content, reasoning, *names))


def _plain(text: str) -> str:
    """Strip whitespace, an empty reasoning block and the replacement character of a truncated UTF-8 sequence."""
    block = EMPTY_REASONING.match(text)
    return text[block.end() if block else 0 :].strip().rstrip("\ufffd").strip()
