"""Supervised answers by kind, language and length, since acceptance differs between them."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from data.preprocess.tokenized import Documents
from data.report.language import UNKNOWN, language
from data.report.section import Section
from data.report.statistics import is_sampled
from data.sources.kinds import KINDS, answer_kind, length_group
from data.sources.records import Conversation

LANGUAGES = 10  # number of languages to show


@dataclass
class Answers:
    """Token counts of supervised answers."""

    by_kind: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    by_language: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # of a sample of conversations
    declared: int = 0  # number of answers whose kind is declared by their record or source


class AnswerCounter:
    """Classifies the supervised answers of all records."""

    def __init__(self, documents: Documents) -> None:
        self.answers = Answers()
        self._total = len(documents.column("outcome", all_records=True))
        records, self._turns, self._tokens = documents.answer_tokens()
        self._edges = np.searchsorted(records, np.arange(self._total + 1))

    def add(self, index: int, conversation: Conversation, kind: str | None) -> None:
        """Count the supervised answers of a record.

        Args:
            index: index of the record, counted from 0 in reading order.
            conversation: the parsed record.
            kind: its declared kind, or None to classify each answer.
        """
        found = slice(*self._edges[index : index + 2].tolist())
        sampled = is_sampled(index, self._total)
        for turn, tokens in zip(self._turns[found].tolist(), self._tokens[found].tolist(), strict=True):
            self.answers.declared += kind is not None
            self.answers.by_kind[kind or answer_kind(conversation, turn)].append(tokens)
            if sampled:
                text = str(conversation.messages[turn].get("content") or "")
                self.answers.by_language[language(text)].append(tokens)


def answer_sections(answers: Answers) -> list[Section]:
    """Return the sections on supervised answers by kind, length and language."""
    kinds = {kind: answers.by_kind[kind] for kind in KINDS if answers.by_kind[kind]}
    declared = f"answers with a kind that their record or source declares: {answers.declared:,}"
    rules = "the kind of the others follows from their text (src/data/sources/kinds.py)"
    every = sorted(tokens for found in kinds.values() for tokens in found)
    lengths = {name: list(group) for name, group in groupby(every, length_group)}
    sampled = sum(map(len, answers.by_language.values()))
    return [
        _section("Supervised answers by kind", "kind", kinds, f"{declared}; {rules}."),
        _section("Supervised answers by length", "tokens", lengths),
        _section(
            "Supervised answers by language",
            "language",
            _most_common(answers.by_language),
            f"Identified by py3langid in {sampled:,} answers of a sample of conversations; {UNKNOWN}: too short, only "
            "code or numbers, or ambiguous.",
        ),
    ]


def _most_common(groups: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the LANGUAGES largest groups, and the others as one."""
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    others = [tokens for _, found in ordered[LANGUAGES:] for tokens in found]
    return dict(ordered[:LANGUAGES]) | ({f"{len(ordered) - LANGUAGES} others": others} if others else {})


def _section(title: str, what: str, groups: dict[str, list[int]], *notes: str) -> Section:
    answers, tokens = (max(1, sum(map(count, groups.values()))) for count in (len, sum))
    rows = [
        [name, f"{len(of):,}", f"{len(of) / answers:.1%}", f"{sum(of):,}", f"{sum(of) / tokens:.1%}"]
        + [f"{int(np.median(of)):,}"]
        for name, of in groups.items()
    ]
    return Section(title, [what, "answers", "fraction", "tokens", "fraction", "median tokens"], rows, list(notes))
