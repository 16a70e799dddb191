"""Compare supervision with decoding under the chat templates of published model families, token for token.

    python scripts/checks/check_templates.py

For every answer, a slow reference (tests/helpers/supervision.py) gives the prompt tokens that decoding starts from, and
the answer's tokens up to the token at which generation stops. Prints a Markdown table of supervised answers and the
reasons for refused ones. Exits with status 1 if an answer differs, or is missing without a reason.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers.chat import supervised_runs
from helpers.families import FAMILIES
from helpers.supervision import CONVERSATIONS, TOOLS, WITH_TOOLS, expected

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder
from data.sources.records import Conversation

COLUMNS = {
    "one turn": ["one turn"],
    "many turns": ["many turns"],
    "system prompt": ["system prompt"],
    "reasoning": [name for name in CONVERSATIONS if name.startswith("reasoning")],
    "tools": list(WITH_TOOLS),
}


@dataclass
class Cell:
    """Answers of one kind of conversation under one template."""

    answers: int = 0
    supervised: int = 0
    wrong: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # reason -> refused answers

    def text(self, numbers: dict[str, int]) -> str:
        """Return the share of supervised answers, with the numbers of the reasons for the others."""
        notes = ", ".join(str(numbers.setdefault(reason, len(numbers) + 1)) for reason in self.reasons)
        wrong = f" **{self.wrong} wrong**" if self.wrong else ""
        return f"{self.supervised}/{self.answers}" + (f" [{notes}]" if notes else "") + wrong


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    numbers: dict[str, int] = {}
    print("| template | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    wrong = 0
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer()
        encoder = ChatEncoder(tokenizer, family.kwargs, family.stop_ids(tokenizer))
        cells = [_cell(name, tokenizer, encoder, kinds) for kinds in COLUMNS.values()]
        print(f"| {name} | " + " | ".join(cell.text(numbers) for cell in cells) + " |")
        wrong += sum(cell.wrong for cell in cells)
    print("\nReasons for refusing the other answers:\n")
    for reason, number in numbers.items():
        print(f"{number}. {reason}")
    if wrong:
        sys.exit(f"{wrong} answers differ from the reference.")


def _cell(name: str, tokenizer: Any, encoder: ChatEncoder, kinds: list[str]) -> Cell:
    cell = Cell()
    for kind in kinds:
        tools = TOOLS if kind in WITH_TOOLS else None
        conversation = Conversation((WITH_TOOLS if tools else CONVERSATIONS)[kind], tools)
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        cell.answers += answers
        try:
            rendered = encoder.render(conversation)
        except BadRecord as error:
            cell.reasons[str(error)] += answers
            continue
        cell.reasons.update(rendered.supervision.refused.values())
        found = supervised_runs(encoder.tokenize([rendered])[0])
        reference, _ = expected(name, tokenizer, conversation)
        cell.supervised += len(found)
        cell.wrong += sum(run not in reference for run in found)
        cell.wrong += answers - len(found) - len(rendered.supervision.refused)
    return cell


if __name__ == "__main__":
    main()
