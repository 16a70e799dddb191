"""Measure regeneration in this process, by batch size, in comparison with transformers' `generate`.

    python scripts/bench/benchmark_regeneration.py                                          # the embedded target
    python scripts/bench/benchmark_regeneration.py --draft checkpoints/tiny/export
    python scripts/bench/benchmark_regeneration.py --target /path/to/SmolLM2-135M-Instruct --num-questions 64

Every decoder answers the same questions greedily. With several repeats, the decoders take turns, so that other programs
on the machine affect all of them; the table shows medians. The last column counts the answers that equal those of
transformers, token by token.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import data.threads  # noqa: F401

# isort: split
import torch  # after data.threads
from bench_report import machine, print_facts, print_table
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from data.preprocess.chat_template import load_encoder
from data.regenerate.conversation import Sample, Sampling
from data.regenerate.local_backend import LocalBackend
from data.sources.readers import open_sources, read_all
from data.sources.records import prompt

TINY = Path(__file__).resolve().parents[2] / "src" / "data" / "tiny"


class Result(NamedTuple):
    """The answers of a run, with its time in seconds and the time until the first answer."""

    answers: dict[str, list[int]]
    seconds: float
    first: float

    @property
    def speed(self) -> float:
        return sum(map(len, self.answers.values())) / self.seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default=str(TINY / "target"), help="directory or Hub id")
    add("--draft", help="exported drafter of the target")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--questions", default=str(TINY / "prompts.jsonl"), help="file of conversations, in any format")
    add("--num-questions", type=int, default=128)
    add("--max-new-tokens", type=int, default=96)
    add("--batch-sizes", default="1,8,32", help="transformers uses the largest one")
    add("--repeats", type=int, default=1)
    return parser.parse_args()


def own_decoder(args: argparse.Namespace, batch_size: int, draft: str | None) -> Callable[[list[Sample]], Result]:
    """Return the backend of data.regenerate as a function of samples."""
    settings = {"name": args.target, "revision": None, "tokenizer": None, "dtype": args.dtype}
    encoder, tokenizer = load_encoder(settings, {})
    sampling = Sampling(
        temperature=0.0, top_p=1.0, max_new_tokens=args.max_new_tokens, seed=0, drop_cut_off=False, repeat_words=12,
        repeat_times=0,
    )  # fmt: skip
    backend = LocalBackend(settings, tokenizer, encoder, sampling, batch_size=batch_size, device="auto", draft=draft)

    def run(samples: list[Sample]) -> Result:
        times: list[float] = []
        answers: dict[str, list[int]] = {}

        def on_finish(sample: Sample) -> None:
            times.append(time.perf_counter())
            answers[sample.id] = sample.token_ids[len(sample.questions)]

        start = time.perf_counter()
        backend.run(samples, on_finish, answered_before=False, on_tokens=lambda count: None)
        return Result(answers, times[-1] - start, times[0] - start)

    return run


def transformers_decoder(args: argparse.Namespace, batch_size: int) -> Callable[[list[Sample]], Result]:
    """Return `generate` on padded batches, sorted by length, as a function of samples."""
    encoder, _ = load_encoder({"name": args.target, "revision": None, "tokenizer": None}, {})
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=getattr(torch, args.dtype)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def answer(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = torch.tensor([[encoder.pad_id] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        how = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "pad_token_id": encoder.pad_id}
        found = model.generate(padded, attention_mask=mask, **how)[:, longest:].tolist()
        ended = [next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids)) for ids in found]
        return [ids[:end] for ids, end in zip(found, ended, strict=True)]

    def run(samples: list[Sample]) -> Result:
        answers: dict[str, list[int]] = {}
        start = time.perf_counter()
        first = 0.0
        asked = [(encoder.prompt(sample.ask()), sample.id) for sample in samples]
        asked.sort(key=lambda pair: -len(pair[0]))
        for begin in range(0, len(asked), batch_size):
            prompts, ids = zip(*asked[begin : begin + batch_size], strict=True)
            answers |= dict(zip(ids, answer(list(prompts)), strict=True))
            first = first or time.perf_counter() - start
        return Result(answers, time.perf_counter() - start, first)

    return run


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    sources = open_sources(args.questions, split="train", max_records=args.num_questions)
    conversations = [raw.parse(prompt).messages for _, raw in read_all(sources)]
    print_facts("Machine", machine(device) | {"target": args.target, "dtype": args.dtype})
    baseline = f"transformers, batch of {max(sizes)}"
    # A small batch answers fewer questions: its speed does not depend on their number.
    counts = {baseline: args.num_questions}
    decoders = {baseline: transformers_decoder(args, max(sizes))}
    for draft in [None, args.draft] if args.draft else [None]:
        for size in sizes:
            name = f"this project, {size} in flight{', with the drafter' * bool(draft)}"
            decoders[name] = own_decoder(args, size, draft)
            counts[name] = min(args.num_questions, 4 * size)
    results: dict[str, list[Result]] = {name: [] for name in decoders}
    for _ in range(args.repeats):
        for name, run in decoders.items():
            messages = conversations[: counts[name]]
            results[name].append(run([Sample(str(i), list(own)) for i, own in enumerate(messages)]))
            print(f"{name}: {results[name][-1].speed:,.1f} tokens/s", flush=True)
    own, speed = results[baseline][0].answers, median(result.speed for result in results[baseline])
    rows = []
    for name, found in results.items():
        answers = found[0].answers
        rate, equal = median(result.speed for result in found), sum(own[key] == ids for key, ids in answers.items())
        first = median(result.first for result in found)
        rows.append((name, f"{rate:,.1f}", f"{rate / speed:.2f}", f"{first:.1f}", f"{equal}/{len(answers)}"))
    title = f"Regeneration, up to {args.max_new_tokens} new tokens"
    print_table(title, ("decoder", "tokens/s", "relative", "first answer, s", "equal answers"), rows)


if __name__ == "__main__":
    main()
