"""Tokenizes conversations so that no token straddles the boundary between a prompt and its answer.

In decoding, a prompt is tokenized before its answer exists. Training data must match: no token may straddle the
boundary, and the tokens before the boundary must be the same as when the prompt is tokenized alone. Prefixes shared by
several texts are tokenized only once. To make this possible, texts are cut at added tokens such as `<|im_start|>`.
Tokenizers split these off first, so the tokens before and after a cut do not depend on each other. Where a template
writes no such token, the end of a long prompt is tokenized without its beginning, in time independent of its length.
"""

import bisect
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from data.preprocess.document import Document
from data.preprocess.prompts import common_prefix
from data.preprocess.spans import Answer, Rendered
from data.sources.records import Written

MAX_PIECES = 4096
WINDOW = 2000  # characters at the end of a prompt to tokenize alone if it has no cut; the first half is context
AGREE = 16  # tokens
NEAR = 16  # tokens; a prompt usually ends with a short header
PROBES = ("\n", ".", "a", " ", "0", "(", "|")  # prefixes to try, in order, when tokenizing a continuation


@dataclass(frozen=True)
class Span:
    """Location of a supervised answer, as token indices."""

    turn: int  # index of the answer's message
    start: int
    end: int  # end of the answer, including its end token
    after: int  # end of the whitespace that the template writes after the answer


@dataclass
class AnswerDocument:
    """A document and the locations of its supervised answers."""

    document: Document
    answers: list[Span]
    by_ids: bool = False  # holds the tokens that the target wrote, because the text reads back as other tokens


class BoundaryTokenizer:
    """Tokenizes texts and maps each answer's character span to tokens."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        added = backend.get_added_tokens_decoder().items()
        self.cuts = {number: token.content for number, token in added if _splits(token)}
        self.may_cut = np.zeros(max(self.cuts, default=0) + 2, bool)  # by token; the last one stands for larger ones
        self.may_cut[list(self.cuts)] = True
        self.adds_space = self._ids("\nb")[-1:] != self._ids("b")
        self.pieces: dict[str, list[int]] = {}  # cache, since many prompts end with the same text

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Tokenize texts without adding special tokens."""
        return self.backend.encode_batch(texts, add_special_tokens=False)

    def documents(
        self, texts: list[Rendered], first: Encoding | None = None, written: Mapping[int, Written] | None = None
    ) -> Iterator[AnswerDocument]:
        """Tokenize the texts of a conversation and yield the resulting documents.

        Each text yields one document for all answers that start and end at token boundaries. An answer gets a separate
        document if a token straddles its start or end, if its prompt would be tokenized differently on its own, or if
        the target wrote other tokens than its text reads back as.

        Args:
            texts: the texts of one conversation, in order.
            first: the encoding of the first text, if it has already been computed.
            written: answers as the target wrote them, by message index.
        """
        written = written or {}
        before: _Tokens | None = None
        for text in texts:
            before = tokens = self._tokens(text, before, first)
            first = None
            shared: list[Span] = []
            separate: list[Answer] = []
            for answer in text.answers:
                span, known = tokens.span(answer), written.get(answer.turn)
                shares, end = self._alone(tokens, answer.start) if span else (0, [])
                if not span or tokens.ids[shares : span.start].tolist() != end:
                    separate.append(answer)
                elif known is None:
                    shared.append(span)
                elif known.token_ids is None:
                    shared += _cut_off(span)
                elif tokens.ids[span.start : span.end].tolist() == known.token_ids:
                    shared.append(span)
                else:
                    separate.append(answer)
            if shared:
                yield _document(tokens.ids[: shared[-1].after], shared)
            for answer in separate:
                yield from self._apart(tokens, answer, written.get(answer.turn))

    def _tokens(self, text: Rendered, before: "_Tokens | None", encoding: Encoding | None) -> "_Tokens":
        if before is None:
            encoding = encoding or self.encode([text.text])[0]
            return _Tokens(text.text, _array(encoding.ids), encoding, 0, 0, self.cuts, self.may_cut)
        common = min(common_prefix(before.text, text.text), text.answers[0].start)
        if common < before.char:  # the offsets of earlier tokens are not known
            return self._tokens(text, None, None)
        token, char = before.cut(common)
        encoding = self.encode([text.text[char:]])[0]
        ids = np.concatenate([before.ids[:token], _array(encoding.ids)])
        return _Tokens(text.text, ids, encoding, token, char, self.cuts, self.may_cut)

    def _alone(self, tokens: "_Tokens", char: int) -> tuple[int, list[int]]:
        """Tokenize the text before a character on its own.

        Return the number of tokens that it certainly shares with the whole text, and its other tokens.
        """
        cut, start = tokens.cut(char)
        if char - start > WINDOW and (found := self._end_alone(tokens, char)) is not None:
            return found
        return cut, self._piece(tokens.text[start:char])

    def _end_alone(self, tokens: "_Tokens", char: int) -> tuple[int, list[int]] | None:
        """Tokenize only the end of the text before a character, or return None if that may give other tokens.

        A tokenizer's choices depend on few characters around them, so the end has the tokens that it has in the whole
        text once `AGREE` successive ones are equal.
        """
        (_, start), (shared, middle) = tokens.at(char - WINDOW), tokens.at(char - WINDOW // 2)
        (end,) = self.encode([tokens.text[start:char]])
        same = _at_or_after(end, middle - start)
        if middle >= char or same == len(end):
            return None
        before = tokens.ids[max(shared - AGREE, 0) : shared].tolist()
        agree = same >= AGREE and end.ids[same - AGREE : same] == before and _chars(end, same)[0] == middle - start
        return (shared, end.ids[same:]) if agree else None

    def _apart(self, tokens: "_Tokens", answer: Answer, known: Written | None) -> Iterator[AnswerDocument]:
        """Yield a document in which an answer is not tokenized with its prompt. It may have no tokens if cut off."""
        shared, end = self._alone(tokens, answer.start)
        prompt = [*tokens.ids[:shared].tolist(), *end]
        as_text = self.continuation(tokens.text[answer.start : answer.end])
        continued = as_text if known is None or known.token_ids is None else known.token_ids
        ids = np.array([*prompt, *continued], np.int32)
        span = Span(answer.turn, len(prompt), len(ids), len(ids))
        spans = _cut_off(span) if known is not None and known.token_ids is None else [span]
        if spans:
            yield _document(ids[: spans[0].end], spans, by_ids=continued != as_text)

    def continuation(self, text: str) -> list[int]:
        """Tokenize text that continues other text, without the space that SentencePiece-like tokenizers prepend."""
        if not self.adds_space:
            return self._ids(text)
        for probe in PROBES:
            (encoding,) = self.encode([probe + text])
            token = _at_or_after(encoding, len(probe))
            if token < len(encoding) and _chars(encoding, token)[0] == len(probe):
                return encoding.ids[token:]
        return self._ids(text)

    def _piece(self, text: str) -> list[int]:
        if len(text) > WINDOW:
            return self._ids(text)
        if text not in self.pieces:
            if len(self.pieces) >= MAX_PIECES:
                self.pieces.clear()
            self.pieces[text] = self._ids(text)
        return self.pieces[text]

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


@dataclass
class _Tokens:
    """A tokenized text. `encoding` covers the text from character `char` onwards; its first token has index `first`."""

    text: str
    ids: np.ndarray
    encoding: Encoding
    first: int
    char: int
    cuts: dict[int, str]
    may_cut: np.ndarray

    def token(self, char: int) -> int:
        """Return the index of the token that contains a character, or else of the next token."""
        return self.first + _at_or_after(self.encoding, char - self.char)

    def span(self, answer: Answer) -> Span | None:
        """Return the token span of an answer, or None if it is empty or a token straddles its start or end."""
        start, end = self.token(answer.start), self.token(answer.end)
        if start < len(self.ids) and self._chars(start)[0] < answer.start:
            return None
        if end < len(self.ids) and self._chars(end)[0] < answer.end:
            if int(self.ids[end]) not in self.cuts:
                return None
            end += 1  # the end token also matches the whitespace after it
        return Span(answer.turn, start, end, max(end, self.token(answer.after))) if start < end else None

    def cut(self, char: int) -> tuple[int, int]:
        """Return the last possible cut at or before a character, as (token index, character offset)."""
        for token in self._backwards(min(self.token(char), len(self.ids) - 1)):
            if content := self.cuts.get(int(self.ids[token])):
                start, end = self._chars(token)
                if end <= char and self.text.startswith(content, start):
                    return token, start
        return self.first, self.char

    def _backwards(self, last: int) -> Iterator[int]:
        """Yield the indices of tokens from `last` down to `first` + 1, but of distant ones only possible cuts."""
        yield from range(last, max(last - NEAR, self.first), -1)
        yield from reversed(self.cut_tokens[: bisect.bisect_right(self.cut_tokens, last - NEAR)])

    def at(self, char: int) -> tuple[int, int]:
        """Return the first token that starts at or after a character, as (token index, character offset)."""
        token = self.token(char)
        start, _ = self._chars(token)
        token = token if start >= char else min(token + 1, len(self.ids) - 1)
        return token, self._chars(token)[0]

    @cached_property
    def cut_tokens(self) -> list[int]:
        """Indices of the tokens after `first` that may be cuts, in ascending order."""
        tokens = np.minimum(self.ids[self.first + 1 :], len(self.may_cut) - 1)
        return (np.flatnonzero(self.may_cut[tokens]) + self.first + 1).tolist()

    def _chars(self, token: int) -> tuple[int, int]:
        start, end = _chars(self.encoding, token - self.first)
        return start + self.char, end + self.char


def _cut_off(span: Span) -> list[Span]:
    """Return the span of a truncated answer whose tokens are unknown, without its last token, or no span if empty.

    The cut may have fallen inside a word or a character, where the text reads back as another token.
    """
    return [Span(span.turn, span.start, span.end - 1, span.end - 1)] if span.end - 1 > span.start else []


def _document(ids: np.ndarray, answers: list[Span], by_ids: bool = False) -> AnswerDocument:
    supervised = np.zeros(len(ids), bool)
    for answer in answers:
        supervised[answer.start : answer.end] = True
    return AnswerDocument(Document(ids, supervised), answers, by_ids)


def _splits(token: AddedToken) -> bool:
    """Return whether text can be cut before an added token, i.e. it matches regardless of the surrounding text."""
    return not (token.lstrip or token.single_word or token.normalized)


def _array(ids: list[int]) -> np.ndarray:
    return np.frombuffer(array("i", ids), np.int32)  # twice as fast as np.array


def _at_or_after(encoding: Encoding, char: int) -> int:
    """Return the index of the first token at or after a character, or the token count if there is none."""
    if (token := encoding.char_to_token(char)) is not None:
        return token
    end = _chars(encoding, len(encoding) - 1)[1] if len(encoding) else 0
    for position in range(char + 1, end):  # the normalizer may drop characters
        if (token := encoding.char_to_token(position)) is not None:
            return token
    return len(encoding)


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    """Return the character range of a token."""
    span = encoding.token_to_chars(token)
    assert span is not None  # None only for special tokens added by a post-processor, which the backend lacks
    return span
