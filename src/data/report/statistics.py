"""Dataset statistics for the report."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder
from data.preprocess.document import Document
from data.preprocess.packing import PackedRows
from data.preprocess.table import BAD, TokenizeSettings, fit_to_row
from data.preprocess.tokenized import Documents
from data.sources.chunks import RawRecord
from data.sources.readers import Source, read_all
from data.sources.records import Conversation, Messages, conversation

OVERLAP_WORDS = 13  # a shared n-gram of this many words counts as overlap, as in the GPT-3 paper
SAMPLED = 1000  # maximum number of conversations in which tokens are counted by role
WORD = re.compile(r"\w+")


def percentiles(values: np.ndarray) -> list[int]:
    """Return the minimum, 10th percentile, median, 90th percentile and maximum, or zeros if there are no values."""
    return [int(x) for x in np.percentile(values, [0, 10, 50, 90, 100])] if len(values) else [0] * 5


def duplicates(documents: Documents) -> int:
    """Count the conversations that are exact duplicates of an earlier one."""
    digests = documents.column("digest", all_records=True)
    digests = digests[documents.column("outcome", all_records=True) != BAD]
    return len(digests) - len(np.unique(digests))


def anchors_per_row(documents: Documents, rows: PackedRows, order: np.ndarray) -> np.ndarray:
    """Return the number of valid anchors in each row, [rows]. `order` holds the indices of the packed documents."""
    return rows.totals(documents.column("anchors")[order])


@dataclass
class Roles:
    """Total and supervised token counts by role, over a sample of conversations."""

    tokens: Counter[str] = field(default_factory=Counter)
    supervised: Counter[str] = field(default_factory=Counter)
    conversations: int = 0


def roles(sources: list[Source], encoder: ChatEncoder, settings: TokenizeSettings) -> Roles:
    """Count tokens by role in up to SAMPLED conversations, spread evenly over the data, after truncation.

    Roles are assigned by searching for the message texts, independently of the supervision mask, so supervised user
    tokens indicate a bug.
    """
    counts = Roles()
    for sampled in _sampled(sources):
        try:
            rendered = encoder.render(sampled, settings.max_seq_len)
        except BadRecord:
            continue
        documents = fit_to_row(encoder.tokenize([rendered])[0], rendered, settings)
        counts.conversations += any(documents)
        for text, fitted in zip(rendered.supervision.texts, documents, strict=False):
            if fitted and fitted.answers:
                within = sampled.messages[: max(fitted.answers) + 1]  # later messages are not in the text
                _count_roles(counts, within, text.text, fitted.document, encoder)
    return counts


def _count_roles(counts: Roles, messages: Messages, text: str, document: Document, encoder: ChatEncoder) -> None:
    encoding = encoder.boundaries.encode([text])[0]
    if encoding.ids[: len(document.input_ids)] != document.input_ids.tolist():
        return  # an answer was tokenized separately, so the offsets do not match
    owner, cursor = np.full(len(text) + 1, "template", dtype=object), 0
    for message in messages:
        content = message["content"].strip()
        at = text.find(content, cursor)
        if at >= 0:
            owner[at : at + len(content)] = message["role"]
            cursor = (
                cursor if message["role"] == "system" else at + len(content)
            )  # templates may move the system prompt
    starts = [start for start, _ in encoding.offsets[: len(document.input_ids)]]
    for role, supervised in zip(owner[starts], document.supervised, strict=True):
        counts.tokens[role] += 1
        counts.supervised[role] += bool(supervised)


def is_sampled(index: int, total: int) -> bool:
    """Return whether the record with this index is one of up to SAMPLED records spread evenly over `total`."""
    return (index + 1) * SAMPLED // total > index * SAMPLED // total or total <= SAMPLED


def _sampled(sources: list[Source]) -> Iterator[Conversation]:
    total = sum(source.take for source in sources)
    for index, (_, raw) in enumerate(read_all(sources)):
        if is_sampled(index, total):
            try:
                yield raw.parse(conversation)
            except BadRecord:
                continue


class Overlap:
    """Counts training records that share questions with evaluation prompts, ignoring case, punctuation and whitespace.

    Attributes:
        identical: number of records with an identical question.
        partial: number of other records that share an OVERLAP_WORDS-gram with a prompt.
        locations: locations of the first five records of either kind.
    """

    def __init__(self, prompts: list[Conversation]) -> None:
        evaluated = [_words(turn) for asked in prompts for turn in _user_turns(asked.messages)]
        self._texts = {tuple(words) for words in evaluated}
        self._ngrams = {ngram for words in evaluated for ngram in _ngrams(words)}
        self._longest = {max(ngram, key=len) for ngram in self._ngrams}  # fast check: every overlap has one of these
        self.identical, self.partial = 0, 0
        self.locations: list[str] = []

    def add(self, source: Source, raw: RawRecord, messages: Messages) -> None:
        """Count a record, given its messages."""
        texts = [_words(turn) for turn in _user_turns(messages)]
        is_identical = any(tuple(words) in self._texts for words in texts)
        is_partial = not is_identical and any(self._shares_ngram(words) for words in texts)
        self.identical, self.partial = self.identical + is_identical, self.partial + is_partial
        if (is_identical or is_partial) and len(self.locations) < 5:
            self.locations.append(source.reader.location(raw.position))

    def _shares_ngram(self, words: list[str]) -> bool:
        return not self._longest.isdisjoint(words) and any(ngram in self._ngrams for ngram in _ngrams(words))


def _user_turns(messages: Messages) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _ngrams(words: list[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1))
