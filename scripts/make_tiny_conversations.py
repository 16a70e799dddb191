"""Let the embedded target answer GSM8K's questions: training conversations in its own words, and held-out prompts.

    python scripts/make_tiny_conversations.py --target src/data/tiny/target \\
        --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out src/data/tiny

Writes `conversations.jsonl` (the first questions of the training set, greedy answers of the target; answers that were
cut off by the length limit or repeat themselves are dropped and counted) and `prompts.jsonl` (the first questions of
the test set, no answers). About 12 minutes on 2 cores.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def repeats(tokens: list[int], length: int = 12, times: int = 3) -> bool:
    """Whether some run of `length` tokens occurs `times` times: the answer loops."""
    counts: dict[tuple[int, ...], int] = {}
    for i in range(len(tokens) - length + 1):
        run = tuple(tokens[i : i + length])
        counts[run] = counts.get(run, 0) + 1
        if counts[run] >= times:
            return True
    return False


@torch.inference_mode()
def answer(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers as token ids, the end token included where it came."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [a[: a.index(end) + 1] if end in a else a for a in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--num-questions", type=int, default=3500)
    parser.add_argument("--num-prompts", type=int, default=500)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.target)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    questions = [json.loads(line)["question"] for line in args.train.read_text(encoding="utf-8").splitlines()]
    questions = questions[: args.num_questions]
    # Questions of one length side by side: the batch ends when its last answer does.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    kept: dict[int, dict] = {}
    dropped = {"cut off": 0, "repeats": 0}
    for start in tqdm(range(0, len(order), args.batch_size), desc="answers", unit="batch"):
        batch = order[start : start + args.batch_size]
        chats = [[{"role": "user", "content": questions[i]}] for i in batch]
        prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        for i, chat, tokens in zip(batch, chats, answer(model, tokenizer, prompts, args.max_new_tokens), strict=True):
            if tokens[-1] != tokenizer.eos_token_id:
                dropped["cut off"] += 1
            elif repeats(tokens):
                dropped["repeats"] += 1
            else:
                content = tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False)
                kept[i] = {"id": f"gsm8k-train-{i}", "messages": [*chat, {"role": "assistant", "content": content}]}

    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "conversations.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(kept[i], ensure_ascii=False) + "\n" for i in sorted(kept))
    tests = [json.loads(line)["question"] for line in args.test.read_text(encoding="utf-8").splitlines()]
    with (args.out / "prompts.jsonl").open("w", encoding="utf-8") as out:
        for i, question in enumerate(tests[: args.num_prompts]):
            out.write(json.dumps({"id": f"gsm8k-test-{i}", "turns": [question]}, ensure_ascii=False) + "\n")
    print(f"{len(kept)} conversations kept, dropped: {dropped}; {min(len(tests), args.num_prompts)} prompts")


if __name__ == "__main__":
    main()
