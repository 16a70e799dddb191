"""Measure the time of a verify step by decoding mode and batch size, and compare it with its compute and memory floor.

    python scripts/bench/bench_decoding.py --preset cpu                  # a minute on 2 cores
    python scripts/bench/bench_decoding.py --preset 8b --dtype bfloat16  # on a GPU

Weights and KV cache are random, since timings do not depend on the decoded text. The floor of a forward pass is the
larger of two times, based on rates measured in the same run: its FLOPs (`models.cost.flops.DecodingFlops`) at the rate
of large matrix products, and its minimum memory traffic (weights and KV cache) at the rate of a large matrix-vector
product. The "break-even τ" is the number of tokens that a step must yield to match the speed of the target alone.

Requires torch and transformers. Works without installing the project if PYTHONPATH=src is set.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from bench_report import machine, print_facts, print_table
from bench_shapes import PRESETS
from bench_steps import Clock, matmul_rate

from models.cost.flops import DecodingFlops
from models.decoding.forward_passes import ForwardPasses
from models.decoding.kv_cache import KVCache
from models.draft import DraftModel
from models.draft_config import DraftConfig
from models.target import load_target

ALONE, MODES = "target alone", ("sequential", "parallel")


def arguments() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        SystemExit: arguments are unknown or contradictory.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="shape of the target")
    parser.add_argument("--rows", default="1,2,4,8,16", help="batch sizes")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--candidates", type=int, help="tokens verified per step; default: the block size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=7, help="timed steps, of which the median is reported")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_decoding"))
    return parser.parse_args()


def read_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the memory bandwidth (bytes/s) of a large matrix-vector product, which dominates at batch size 1."""
    matrix = torch.randn(8192, 16384, device=device, dtype=dtype)
    vector = torch.randn(16384, device=device, dtype=dtype)
    matrix @ vector
    return matrix.nbytes / min(times(lambda: matrix @ vector, device, 10))


def times(work: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Return the seconds of each of `count` calls, after two warm-up calls."""
    for _ in range(2):
        work()
    clock = Clock(device)
    for _ in range(count):
        work()
        clock.mark()
    return [seconds for _, seconds in clock.laps()]


def floor(
    draft: DraftModel, flops: DecodingFlops, mode: str, args: argparse.Namespace, rows: int, rates: tuple[float, float]
) -> dict:
    """Return lower bounds of the step time in seconds: compute, memory, and the sum over passes of the larger one."""
    candidates = 1 if mode == ALONE else args.candidates
    parts = flops.step(
        context=args.context, candidates=candidates, blocks={ALONE: 0, MODES[0]: 1}.get(mode, candidates)
    )
    config, word = draft.target.config, draft.target.dtype.itemsize
    cache = rows * 2 * config.num_key_value_heads * config.head_dim * args.context * word  # of one layer
    # Two FLOPs per weight and token: the weights that a token uses.
    head, layers = word * flops.head / 2, word * flops.token / 2
    draft_layers = word * flops.block / 2 / draft.block_size  # projectors and FFN
    projections = word * sum(
        p.numel() for name, p in draft.attention_parameters().items() if name.endswith("_proj.weight")
    )
    target = (parts["target"] + candidates * flops.head, layers + len(draft.target.model.layers) * cache + head)
    blocks = parts["draft"] + parts["redundant blocks"]
    own = projections + len(draft.layers) * cache  # drafter projectors, cache reread
    logits = ((draft.block_size - 1) * flops.head, head)
    if mode == ALONE:
        passes = [target]
    elif mode == "sequential":
        passes = [target, (blocks, draft_layers + len(draft.layers) * cache), logits]
    else:
        passes = [(target[0] + blocks, target[1] + own), logits]
    arithmetic, memory = ([rows * f / rates[0] for f, _ in passes], [b / rates[1] for _, b in passes])
    least = sum(map(max, zip(arithmetic, memory, strict=True)))
    return {"arithmetic": sum(arithmetic), "memory": sum(memory), "floor": least, "flops": rows * sum(parts.values())}


@torch.inference_mode()
def measure(draft: DraftModel, args: argparse.Namespace, rows: int, mode: str) -> float:
    """Return the median seconds of a step at this batch size."""
    target, device, size = draft.target, draft.target.device, draft.block_size
    config, count = target.config, 1 if mode == ALONE else args.candidates
    shape = (1, config.num_key_value_heads, rows * args.context, config.head_dim)
    packed = [
        tuple(torch.randn(shape, device=device, dtype=target.dtype) for _ in range(2)) for _ in target.model.layers
    ]
    capacity = args.context + count
    cache = KVCache(packed, [args.context] * rows, [capacity] * rows, [capacity], slots=count * size)
    passes = ForwardPasses(target, draft, cache)
    del packed
    candidates = torch.randint(config.vocab_size, (rows, count), device=device)
    positions, reach = args.context + torch.arange(count, device=device).expand(rows, -1), args.context + count

    def step() -> None:
        if mode == "parallel":
            blocks = passes.verify_and_draft(candidates, positions, reach)[1]
        else:
            passes.verify(candidates, positions, reach)
        if mode == "sequential":
            blocks = passes.draft_blocks(positions[:, -1:] + 1, reach)
        if mode != ALONE:
            draft.logits(blocks[:, 0, 1:]).max(-1)

    return median(times(step, device, args.steps))


def main() -> None:
    args = arguments()
    preset, device = PRESETS[args.preset], torch.device(args.device)
    args.candidates = args.candidates or preset.block_size
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    print_facts("Machine", machine(device))
    with torch.device(device):
        target = load_target(None, architecture=preset.architecture(preset.vocabulary), dtype=args.dtype)
    draft = DraftModel(
        target, DraftConfig(num_layers=preset.draft_layers, block_size=preset.block_size, calibrator_rank=0)
    )
    flops = DecodingFlops.of(draft)
    rates = (matmul_rate(device, args.dtype, 2048, 8), read_rate(device, dtype))
    print_facts("Rates", {"products": f"{rates[0] / 1e9:,.0f} GFLOP/s", "reading": f"{rates[1] / 1e9:,.1f} GB/s"})
    found, lines = [], []
    for rows in map(int, args.rows.split(",")):
        alone = None
        for mode in (ALONE, *MODES):
            seconds, least = measure(draft, args, rows, mode), floor(draft, flops, mode, args, rows, rates)
            alone = alone or seconds
            found.append({"rows": rows, "mode": mode, "seconds": seconds, **least})
            bound = "memory" if least["memory"] > least["arithmetic"] else "arithmetic"
            cells = [f"{1e3 * seconds:,.1f}", f"{1e3 * least['floor']:,.1f}", bound, f"{seconds / least['floor']:.2f}"]
            lines.append([str(rows), mode, f"{least['flops'] / 1e9:,.2f}", *cells, f"{seconds / alone:.2f}"])
            print(f"{rows} rows, {mode}: {1e3 * seconds:,.1f} ms", flush=True)
    header = ["rows", "mode", "GFLOP", "ms", "floor, ms", "bound by", "ms / floor", "break-even τ"]
    print_table(
        f"A step: {args.candidates} candidates, {args.context} tokens before them, preset {args.preset}", header, lines
    )
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.preset}_{args.device}.json"
    file.write_text(json.dumps({"machine": machine(device), "rates": rates, "steps": found}, indent=2) + "\n")
    print(f"\nWritten: {file}")


if __name__ == "__main__":
    main()
