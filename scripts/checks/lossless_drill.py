"""Compare all decoding modes, selection rules and batch sizes with the target's own greedy output, in float32.

    python scripts/checks/lossless_drill.py --draft checkpoints/tiny/export    # the embedded target, 500 prompts
    python scripts/checks/lossless_drill.py --prompts 100 --new-tokens 16      # an untrained drafter, faster
    python scripts/checks/lossless_drill.py --families                         # random targets of several architectures

All combinations decode the same prompts. The reference is transformers' `generate`, run on one prompt at a time. Prints
the number of identical outputs. Any difference is an error and is reported with the margin by which the target
preferred its own token; rounding can only reverse margins of about 1e-5.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from check_families import FAMILIES, SIZES, VOCABULARY
from rich.console import Console
from rich.table import Table

from data.preprocess.chat_template import ChatEncoder
from data.sources.readers import read_strictly
from data.sources.records import prompt
from models.decoding.flex import generate
from models.decoding.selection import OFF, Selection
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.export.artifact_io import load_draft
from models.target import load_target, load_tokenizer

TINY = Path(__file__).resolve().parents[2] / "src" / "data" / "tiny"
MODES = ("parallel", "sequential")
SELECTIONS = (OFF, Selection("cumulative_product", 0.01), Selection("min_confidence", 0.3))
BATCH_SIZES = range(1, 9)


def embedded(drafter: str | None, count: int):
    """Return the embedded target, a drafter for it, and held-out prompts."""
    target, tokenizer = load_target(str(TINY / "target")), load_tokenizer(str(TINY / "target"))
    if drafter:
        draft = load_draft(drafter, target)
    else:
        draft = DraftModel(target, DraftConfig(num_layers=6, block_size=8, calibrator_rank=0))
    encoder = ChatEncoder(tokenizer, {})
    messages = read_strictly(str(TINY / "prompts.jsonl"), prompt, split="test", limit=count, setting="--prompts")
    return target, draft, [encoder.prompt(m) for m in messages]


def random_family(kind: str, count: int):
    """Return a target with random weights, a drafter copied from it, and prompts of 1 to 40 random tokens."""
    torch.manual_seed(0)
    target = load_target(None, architecture=SIZES | FAMILIES[kind])
    draft = DraftModel(target, DraftConfig(num_layers=3, block_size=6, calibrator_rank=0))
    return target, draft, [torch.randint(3, VOCABULARY, (1 + i % 40,)).tolist() for i in range(count)]


def own_answers(name: str, target, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    answers = []
    for tokens in prompts:
        ids = torch.tensor([tokens])
        output = target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        answers.append(output[0, len(tokens) :].tolist())
        progress(f"{name}, the target alone", len(answers), len(prompts))
    return answers


@torch.no_grad()
def difference(target, tokens: list[int], own: list[int], other: list[int]) -> str:
    """Describe the first difference of two answers, with the target's margin for its own token."""
    pairs = itertools.zip_longest(own, other)
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    best = target(torch.tensor([tokens + own[:at]])).logits[0, -1].topk(2).values.tolist()
    return f"token {at}: {other[at : at + 1]} instead of {own[at : at + 1]}, margin {best[0] - best[1]:.2e}"


started = {}


def progress(name: str, done: int, total: int) -> None:
    """Print a line that overwrites itself: rate since the first call, and remaining time."""
    seconds = time.monotonic() - started.setdefault(name, time.monotonic())
    if done % 50 and done != total or not seconds:
        return
    rate, end = done / seconds, "\n" if done == total else "\r"
    print(f"{name}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left   ", end=end, file=sys.stderr)


def drill(name: str, target, draft, prompts: list[list[int]], new_tokens: int, modes: list[str], table: Table) -> int:
    """Run one target through all combinations, one table row per mode and rule. Return the number of differences."""
    own = own_answers(name, target, prompts, new_tokens)
    combinations = list(itertools.product(modes, SELECTIONS, BATCH_SIZES))
    total, done, wrong = len(combinations) * len(prompts), 0, 0
    for (mode, selection), group in itertools.groupby(combinations, lambda c: c[:2]):
        identical, gained, steps = [], 0, 0
        for _, _, size in group:
            same = 0
            for first in range(0, len(prompts), size):
                numbers = range(first, min(first + size, len(prompts)))
                batch = [prompts[i] for i in numbers]
                result = generate(target, draft, batch, max_new_tokens=new_tokens, mode=mode, selection=selection)
                gained, steps = gained + sum(result.accepted()), steps + len(result.accepted())
                for i, answer in zip(numbers, result.tokens, strict=True):
                    same += answer == own[i]
                    if answer != own[i]:
                        wrong += 1
                        where = difference(target, prompts[i], own[i], answer)
                        print(f"\n{name}, {mode}, {selection}, batch {size}, prompt {i}: {where}", file=sys.stderr)
                    done += 1
                    progress(name, done, total)
            identical.append(f"{same}")
        rule = selection.rule if selection == OFF else f"{selection.rule} {selection.threshold}"
        table.add_row(name, mode, rule, *identical, f"{1 + gained / max(steps, 1):.2f}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--draft", help="directory or Hub id of a drafter for the embedded target; default: untrained")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--families", action="store_true", help="random targets of several architectures instead")
    arguments = parser.parse_args()
    titles = ("target", "mode", "selection", *(f"batch {size}" for size in BATCH_SIZES), "τ")
    table = Table(
        title=f"Identical outputs of {arguments.prompts} prompts, at most {arguments.new_tokens} new tokens each"
    )
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < 3 else "right", no_wrap=True)
    kinds = FAMILIES if arguments.families else ("embedded",)
    wrong = 0
    for kind in kinds:
        count = arguments.prompts
        parts = random_family(kind, count) if arguments.families else embedded(arguments.draft, count)
        wrong += drill(kind, *parts, arguments.new_tokens, arguments.modes, table)
    Console(width=160).print(table)
    sys.exit(f"{wrong} answers differ from the target's own." if wrong else 0)


if __name__ == "__main__":
    main()
