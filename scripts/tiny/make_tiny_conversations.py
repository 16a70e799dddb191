"""Generate the embedded conversations (GSM8K training questions with the target's answers) and the held-out prompts.

    python scripts/tiny/make_tiny_conversations.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out src/data/tiny

Writes `conversations.jsonl` (the first questions of the training set, answered greedily by `python -m data.regenerate`)
and `prompts.jsonl` (the first questions of the test set, without answers). Takes about 8 minutes on 2 cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def questions(file: Path, count: int) -> list[str]:
    """Return the first questions of a GSM8K file."""
    return [json.loads(line)["question"] for line in file.read_text(encoding="utf-8").splitlines()[:count]]


def write(file: Path, name: str, texts: list[str]) -> None:
    """Write questions as records with an id and without an answer."""
    records = ({"id": f"{name}-{i}", "turns": [text]} for i, text in enumerate(texts))
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-questions", type=int, default=3500)
    parser.add_argument("--num-prompts", type=int, default=500)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "prompts.jsonl", "gsm8k-test", questions(args.test, args.num_prompts))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "questions.jsonl", "gsm8k-train", questions(args.train, args.num_questions))
        call = [sys.executable, "-m", "data.regenerate", "+experiment=tiny", "data.path=questions.jsonl"]
        call += ["regenerate.local.batch_size=128", "regenerate.output=answers.jsonl", "regenerate.drop_cut_off=true"]
        subprocess.run(call, cwd=folder, check=True)
        shutil.move(Path(folder) / "answers.jsonl", args.out / "conversations.jsonl")


if __name__ == "__main__":
    main()
