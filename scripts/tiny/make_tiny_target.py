"""Train the embedded target and its tokenizer: a small Qwen3 language model on GSM8K.

    python scripts/tiny/make_tiny_target.py --train gsm8k_train.jsonl --out src/data/tiny/target

`--train` is GSM8K's `train.jsonl` (openai/grade-school-math, MIT license): one `question` and one `answer` per line.
The model has 8 layers, hidden size 192, vocabulary size 2048 and 3.6M parameters (7.3 MB in bfloat16). Training takes
about 20 minutes on 2 cores. The embedded target's tokenizer and template are byte-identical to this script's output;
for its weights, see `src/data/tiny/README.md`.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# `{% generation %}` marks the assistant's text, which defines the supervision exactly.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with a separate token per digit, so that numbers are composed instead of memorized."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|MASK|>",
        model_input_names=["input_ids", "attention_mask"],  # the default of transformers 4 has token_type_ids
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack_rows(documents: list[list[int]], max_seq_len: int) -> list[tuple[list[int], list[int]]]:
    """Pack documents first-fit in the given order. Return unpadded rows of token ids and per-document positions."""
    rows: list[tuple[list[int], list[int]]] = []
    open_rows: list[int] = []
    for document in documents:
        row = next((r for r in open_rows if len(rows[r][0]) + len(document) <= max_seq_len), None)
        if row is None:
            rows.append(([], []))
            row = len(rows) - 1
            open_rows = [*open_rows[-31:], row]
        rows[row][0].extend(document)
        rows[row][1].extend(range(len(document)))
    return rows


def collate(rows: list[tuple[list[int], list[int]]], max_seq_len: int, pad_id: int) -> tuple[torch.Tensor, ...]:
    """Return input_ids, position_ids, labels, each [rows, max_seq_len]; padding and document starts have no label."""
    ids = torch.full((len(rows), max_seq_len), pad_id)
    positions = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (tokens, position) in enumerate(rows):
        n = len(tokens)
        ids[i, :n] = torch.tensor(tokens)
        positions[i, :n] = torch.tensor(position)
        positions[i, n:] = torch.arange(max_seq_len - n)
        labels[i, :n] = torch.tensor([-100 if p == 0 else t for t, p in zip(tokens, position, strict=True)])
    return ids, positions, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.2)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=320)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    records = [json.loads(line) for line in args.train.read_text(encoding="utf-8").splitlines()]
    chats = [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in records
    ]
    tokenizer = train_tokenizer([m["content"] for chat in chats for m in chat], vocab_size=2048)
    # `return_dict` determines the type, which the annotation leaves open.
    encoded = [cast(BatchEncoding, tokenizer.apply_chat_template(chat, return_dict=True)) for chat in chats]
    documents: list[list[int]] = [chat["input_ids"][: args.max_seq_len] for chat in encoded]
    print(f"{len(documents)} conversations, {sum(map(len, documents)):,} tokens")

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=2048,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # accepted by every config, but not annotated
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    rows_per_epoch = len(pack_rows(documents, args.max_seq_len))
    steps = int(args.epochs * rows_per_epoch / args.batch_rows)
    warmup = 100

    def factor(step: int) -> float:
        progress = (step - warmup) / max(1, steps - warmup)
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rows: list[tuple[list[int], list[int]]] = []
    started = time.time()
    running: float | None = None
    for step in range(steps):
        if len(rows) < args.batch_rows:
            rows = pack_rows(random.sample(documents, len(documents)), args.max_seq_len)
            random.shuffle(rows)
        batch = [rows.pop() for _ in range(args.batch_rows)]
        ids, positions, labels = collate(batch, args.max_seq_len, tokenizer.pad_token_id)
        # Without an attention mask, transformers infers the documents from the restarting positions.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            elapsed = time.time() - started
            remaining = elapsed / (step + 1) * (steps - step - 1)
            print(f"step {step}/{steps} loss {running:.4f}, {elapsed:.0f} s, {remaining:.0f} s remaining", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # The name of this class in both transformers 4.57 and 5.
    config_file = args.out / "tokenizer_config.json"
    settings = json.loads(config_file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # 4.57 also returns token_type_ids by default
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
