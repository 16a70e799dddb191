"""Checks answers that are stored as the target's tokens."""

import json
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from data.errors import BadRecord
from data.sources.records import Message
from data.sources.tags import CLOSING, OPENING

EMPTY_REASONING = re.compile(rf"\s*({OPENING})?\s*{CLOSING}")  # its opening tag may be in the prompt
# The text before a part of an answer is a marker, such as <think>, [/THINK] or <|channel|>final<|message|>. A
# channel's name may follow.
BEFORE = re.compile(
    r"\s*|((\w{0,12}|\s*)[<\[◁].{0,80}[>\]▷]|\s*Here is my (thought process|response):)\w{0,12}\s*", re.DOTALL
)
AFTER = re.compile(r"(\s*(</[\w:]+>|<\|[^|]*\|>))?[\s\ufffd]*")
BEFORE_CALLS = re.compile(r"\s*([<\[{◁✿>]|functools|Action:|$)")
MAX_DIGITS = 400  # Python's int() refuses numbers of more than 4,300 digits
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


class CallText:
    """Decoded text of an answer with tool calls. What is searched for every value is computed once."""

    def __init__(self, text: str) -> None:
        self.text = text

    def contains(self, arguments: Any) -> bool:
        """Return whether the text contains all values of a call's arguments, in any notation."""
        values = [arguments]
        while values:
            value = values.pop()
            if isinstance(value, dict | list):
                values += value.values() if isinstance(value, dict) else value
            elif not self._contains(value):
                return False
        return True

    def _contains(self, value: Any) -> bool:
        if isinstance(value, str):
            quoted = [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
            return any(form in self.text for form in (value.strip(), *quoted, quoted[1].replace("/", "\\/")))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value in self._numbers
        return any(form in self._folded for form in (str(value).casefold(), json.dumps(value)))

    @cached_property
    def _numbers(self) -> frozenset[float]:
        return frozenset(map(_number, NUMBER.findall(self.text)))

    @cached_property
    def _folded(self) -> str:
        return self.text.casefold()


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
        unknown = next((token for token in set(token_ids) if not self._known(token)), None)
        if unknown is not None:
            raise BadRecord(f"`token_ids`: {unknown} is not in the target's vocabulary; remove tokens of another model")
        if not self.stop_ids.isdisjoint(token_ids[:-1]):
            raise BadRecord("`token_ids`: tokens follow a stop token, at which the target's generation ends")
        if not any(reads_as(decoded, message) for decoded in self._decoded(token_ids)):
            decoded = self.backend.decode(token_ids)
            raise BadRecord(
                f"`token_ids` decode to {decoded!r:.60}, not to the text; remove them if the text was edited or the "
                "tokens are another model's"
            )

    def _known(self, token: int) -> bool:
        return 0 <= token < 2**32 and self.backend.id_to_token(token) is not None  # tokenizers has 32-bit ids

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


def reads_as(decoded: str, message: Message) -> bool:
    """Return whether decoded tokens are the text of a message, apart from surrounding whitespace.

    A server that parses reasoning or tool calls removes markers from the text. In such messages, the decoded text must
    be the reasoning, the content and the calls, with nothing but markers in between.
    """
    content, reasoning = message["content"].strip(), message.get("reasoning_content", "").strip()
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    if not reasoning and not calls:
        return _plain(decoded) == _plain(content)
    text = CallText(decoded)
    if not all(call.get("name", "") in decoded and text.contains(call.get("arguments")) for call in calls):
        return False
    rests = [decoded[end:] for end in _ends(decoded, reasoning)]
    if not content and not reasoning:
        return True  # the calls are the answer
    return any(_follows(rest[end:], calls) for rest in rests for end in _ends(rest, content))


def _ends(text: str, part: str) -> Iterator[int]:
    """Yield where a part of an answer may end, if it follows whitespace or a marker."""
    start = text.find(part) if part else -1
    if not part:
        yield 0
    while 0 <= start <= 100:
        if BEFORE.fullmatch(text, 0, start):
            yield start + len(part)
        start = text.find(part, start + 1, 100 + len(part))


def _follows(rest: str, calls: list[Any]) -> bool:
    """Return whether the text after the content contains nothing but a marker, or calls."""
    return bool(BEFORE_CALLS.match(rest) if calls else AFTER.fullmatch(rest))


def _number(text: str) -> float:
    """Read a number. Integers are exact: identifiers may have 64 bits."""
    return int(text) if len(text) < MAX_DIGITS and text.lstrip("-").isdecimal() else float(text)


def _plain(text: str) -> str:
    """Strip whitespace, an empty reasoning block and the replacement character of a truncated UTF-8 sequence."""
    block = EMPTY_REASONING.match(text)
    return text[block.end() if block else 0 :].strip().rstrip("\ufffd").strip()
