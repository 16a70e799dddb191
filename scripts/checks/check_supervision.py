"""Compare the supervision of a dataset's answers with a slow reference, token for token.

    python scripts/checks/check_supervision.py conversations.jsonl TARGET

The reference is what decoding does: `apply_chat_template` with the messages before an answer and the generation prompt,
then the answer's own tokens and the end token. It takes time quadratic in the number of turns. TARGET is a directory
or Hub ID; answers must be plain text, without reasoning or tool calls. Prints the numbers of records, answers and equal
answers, and the records in which answers differ.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from data.errors import BadRecord
from data.preprocess.chat_template import ChatEncoder, load_encoder
from data.preprocess.document import Document
from data.sources.readers import open_sources, read_all
from data.sources.records import Conversation, conversation

Tokens = tuple[list[int], list[int]]  # prompt, answer


def supervised(document: Document) -> Iterator[Tokens]:
    """Yield the tokens before each supervised answer, and those of the answer."""
    ids, mask = document.input_ids.tolist(), document.supervised.astype(int)
    edges = np.flatnonzero(np.diff(np.r_[0, mask, 0]))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield ids[:start], ids[start:end]


def expected(found: Conversation, tokenizer, end: int) -> Iterator[Tokens]:
    """Yield the prompt of each answer as in decoding, and the answer's tokens."""
    for turn, message in enumerate(found.messages):
        if message["role"] == "assistant" and turn not in found.untrained:
            rendered = tokenizer.apply_chat_template(
                found.messages[:turn], tools=found.tools, add_generation_prompt=True, return_dict=True
            )
            yield rendered["input_ids"], [*tokenizer.encode(message["content"], add_special_tokens=False), end]


def compare(path: str, encoder: ChatEncoder, tokenizer, limit: int | None) -> tuple[int, int, int, int]:
    """Return the numbers of usable records, bad records, answers, and answers equal to the reference."""
    records = bad = answers = equal = 0
    for source, raw in read_all(open_sources(path, split="train", max_records=limit)):
        try:
            parsed = raw.parse(conversation)
            documents = encoder.documents(parsed)
        except BadRecord:
            bad += 1
            continue
        found = [pair for part in documents for pair in supervised(part.document)]
        reference = list(expected(parsed, tokenizer, tokenizer.eos_token_id))
        same = sum(a == b for a, b in zip(found, reference, strict=False))
        if same < len(reference):
            where = source.reader.location(raw.position)
            print(f"{where}: {same} of {len(reference)} answers equal", file=sys.stderr)
        records, answers, equal = records + 1, answers + len(reference), equal + same
    return records, bad, answers, equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("target")
    parser.add_argument("--records", type=int, help="number of records, spread evenly; default: all")
    args = parser.parse_args()
    encoder, tokenizer = load_encoder({"name": args.target, "revision": None, "tokenizer": None}, {})
    records, bad, answers, equal = compare(args.data, encoder, tokenizer, args.records)
    print(f"{records:,} records, {bad:,} bad; {equal:,} of {answers:,} answers equal the reference")
    if equal < answers:
        sys.exit("the supervision differs from the reference")


if __name__ == "__main__":
    main()
