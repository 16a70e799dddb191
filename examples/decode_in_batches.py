"""Decode prompts in batches, with the drafter and with the target alone; compare outputs and speed.

    python examples/decode_in_batches.py TARGET DRAFTER [--prompts FILE] [--count 8] [--batch-size 4]

The prompts are the first turns of records `{"turns": [...]}`; the default is the project's embedded prompts.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

import data
from models.decoding.flex import generate
from models.draft import DraftModel
from models.export import load_draft, recommended
from models.target import load_target, load_tokenizer

EMBEDDED = Path(data.__file__).parent / "tiny"


def decode(
    target: PreTrainedModel, draft: DraftModel | None, prompts: list[list[int]], batch_size: int, **settings
) -> tuple[list[list[int]], str]:
    """Return the new tokens of all prompts and one line with the speed. Without a drafter, the target decodes alone."""
    tokens, accepted = [], []
    begun = time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        result = generate(target, draft, prompts[start : start + batch_size], **settings)
        tokens += result.tokens
        accepted += result.accepted()
    rate = sum(map(len, tokens)) / (time.perf_counter() - begun)
    return tokens, f"{rate:.0f} tokens/s, {sum(accepted) / len(accepted) + 1:.2f} tokens per verify step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="directory or Hub id of the drafter's target")
    parser.add_argument("drafter", help="directory or Hub id of the exported drafter")
    parser.add_argument("--prompts", type=Path, default=EMBEDDED / "prompts.jsonl")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--dtype", default="float32", help="dtype of the target; bfloat16 for large models")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = load_target(arguments.target, dtype=arguments.dtype).to(device)
    tokenizer = load_tokenizer(arguments.target)
    draft = load_draft(arguments.drafter, target)
    settings = recommended(arguments.drafter)  # the fastest mode and selection in the evaluation, on its device

    prompts = []
    for line in arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.count]:
        chat = [{"role": "user", "content": json.loads(line)["turns"][0]}]
        prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

    common = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    drafted, with_drafter = decode(target, draft, prompts, **common, **settings)
    alone, without = decode(target, None, prompts, **common)
    print(f"with the drafter: {with_drafter}\ntarget alone:     {without}")
    print(f"identical outputs: {sum(a == b for a, b in zip(drafted, alone, strict=True))}/{len(prompts)}")


if __name__ == "__main__":
    main()
