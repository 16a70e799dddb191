"""Measure the time and memory of one stage 1 optimizer step, and compare the time with its FLOP floor.

    python scripts/bench/bench_train_step.py --preset cpu                    # a step and its phases: minutes on 2 cores
    python scripts/bench/bench_train_step.py --preset 8b --compile            # on a GPU
    python scripts/bench/bench_train_step.py --preset tiny --baseline naive   # with two straightforward baselines
    python scripts/bench/bench_train_step.py --preset cpu --sweep anchors     # does time grow as its FLOPs do?
    python scripts/bench/bench_train_step.py --preset cpu --sweep vocabulary  # memory cost of a large vocabulary

The floor is the time that the step's FLOPs (`models.cost.flops.step_flops`, counting only the query-key pairs that the
masks of these batches allow) would take at the rate of large matrix products. This rate is measured before and after
the steps; the higher value is used. The step is that of `train` without Lightning: forward pass of the target, forward
pass of the mask tokens, chunked loss, backward, clipping, AdamW. Weights and tokens are random; all slots are labeled.
Steps cycle through several batches, which are moved to the device beforehand. Full steps, phases and memory are
measured separately, because timing the phases requires device synchronization. Memory is the peak of all allocations by
PyTorch's allocator.

Baselines: `dense` materializes the masks and the logits of all slots and leaves the rest to autograd; `naive` also
reruns the target for every anchor, and is measured on a few anchors and extrapolated to all.

Requires torch and transformers, and matplotlib for the plot. Works without installing the project if PYTHONPATH=src is
set.
"""

import argparse
import gc
import statistics
import sys
from pathlib import Path

import torch
from bench_arguments import BASELINES, OBJECTIVES, SIZES, arguments, draft_of, shapes, word
from bench_report import (
    PARTS,
    Figures,
    compare_growth,
    draw_growth,
    draw_phases,
    draw_vocabulary,
    listed,
    machine,
    print_facts,
    print_growth,
    print_step,
    print_vocabulary,
    save,
)
from bench_shapes import (
    PRESETS,
    Shape,
    floor_flops,
    random_batch,
    typical_blocks,
)
from bench_steps import (
    WARM_UP,
    Mark,
    Training,
    against_floor,
    by_phase,
    compiled_graphs,
    first_wait,
    matmul_rate,
    peak_memory,
    warm_up,
    whole_steps,
)
from torch import Tensor
from transformers.utils import logging

from data.batch import Batch
from models.attention.layers import Execution
from models.loss.objectives import Objective

BATCHES = 3  # cycled through, so that nothing can be reused between steps


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def objective_of(args: argparse.Namespace) -> Objective:
    """Build the objective with the coefficients of conf/objective/."""
    return Objective(**OBJECTIVES[args.objective])


def new_training(args: argparse.Namespace, shape: Shape) -> Training:
    """Build target and drafter with random weights."""
    say(f"{args.preset}: building the target, vocabulary {shape.vocabulary:,}")
    torch.manual_seed(args.seed)
    return Training(
        PRESETS[args.preset].architecture(shape.vocabulary),
        draft_layers=args.draft_layers,
        block_size=shape.block_size,
        device=torch.device(args.device),
        dtype=args.dtype,
        execution=Execution(args.attention, args.compile, args.recompute),
        objective=objective_of(args),
        chunk=args.chunk,
    )


def new_batches(args: argparse.Namespace, shape: Shape) -> list[Batch]:
    """Build random batches on the device."""
    return [random_batch(shape, args.seed + i).to(torch.device(args.device)) for i in range(BATCHES)]


def rate_now(args: argparse.Namespace) -> float:
    """Measure the FLOP/s of large matrix products."""
    say(f"matmul rate, {args.matmul_size} x {args.matmul_size}")
    repeats = 50 if args.device == "cuda" else 5
    return matmul_rate(torch.device(args.device), args.dtype, args.matmul_size, repeats)


def rates(args: argparse.Namespace, before: float) -> Figures:
    """Measure the matmul rate again after all steps, since it drifts on a shared machine, and use the higher rate."""
    after = rate_now(args)
    used = max(before, after)
    return {"dtype": args.dtype, "size": args.matmul_size, "before": before, "after": after, "used": used}


def measure_step(args: argparse.Namespace) -> Figures:
    """Measure steps, phases, memory and baselines of a single shape."""
    (shape,) = shapes(args)
    training, batches = new_training(args, shape), new_batches(args, shape)
    before = rate_now(args)
    say(f"{WARM_UP} warm-up steps, {args.steps} full steps, {args.steps} steps by phase")
    figures = {"loss": warm_up(training, batches)}
    graphs = compiled_graphs()
    times = whole_steps(training.fast, batches, args.steps, training.device)
    phases = by_phase(training.fast, batches, args.steps, training.device)
    figures["recompilations"] = compiled_graphs() - graphs
    if args.device == "cuda":
        figures["waits"] = first_wait(training.fast, batches[0])
    say("memory of a step")
    figures["memory"] = memory_of(args, shape, training, batches[0])
    figures["baselines"] = {name: baseline(args, name, training, batches) for name in BASELINES[args.baseline]}
    parts = floor_flops(draft_of(args, shape), batches, objective_of(args))
    figures["matmul"] = rates(args, before)
    figures["step"] = against_floor(times, sum(parts.values()), figures["matmul"]["used"])
    figures["phases"] = {
        name: against_floor(laps, parts[PARTS[name]] if name in PARTS else 0, figures["matmul"]["used"])
        for name, laps in phases.items()
    }
    total = sum(phase["seconds"] for phase in figures["phases"].values())
    for phase in figures["phases"].values():
        phase["share"] = phase["seconds"] / total
    tokens = {"clean": shape.clean, "mask": shape.masks}
    figures["tokens_per_second"] = {kind: count / figures["step"]["seconds"] for kind, count in tokens.items()}
    return figures | {"flops": parts | {"step": sum(parts.values())}}


def memory_of(args: argparse.Namespace, shape: Shape, training: Training, batch: Batch) -> dict[str, int]:
    """Return the peak memory of a step in bytes, and its parts that depend on the vocabulary."""
    preset = PRESETS[args.preset]
    matrix = shape.vocabulary * preset.hidden * word(args)
    return {
        "peak": peak_memory(training.fast, batch, training),
        "held": training.held(),
        "head": matrix,
        "head and embedding": matrix if preset.tied else 2 * matrix,
        "chunk": min(args.chunk, shape.drafted) * shape.vocabulary * 4,
    }


def baseline(args: argparse.Namespace, name: str, training: Training, batches: list[Batch]) -> Figures:
    """Measure seconds and bytes of a baseline step. If it runs out of GPU memory, report that instead."""
    say(f"baseline {name}")
    total = batches[0].anchors.numel()
    few = min(args.naive_anchors, total)
    blocks = {id(batch): typical_blocks(batch, few) for batch in batches}

    def naive(batch: Batch, mark: Mark) -> Tensor:
        return training.naive(batch, blocks[id(batch)], mark)

    def fast_as_one(batch: Batch, mark: Mark) -> Tensor:
        loss = training.fast(batch)
        mark("fast")
        return loss

    step = naive if name == "naive" else training.dense
    phases: dict[str, list[float]] = {}
    try:
        whole_steps(step, batches, WARM_UP, training.device)
        for number in range(args.steps):  # interleaved with the fast step, so that drift affects both
            for one in (step, fast_as_one):
                for phase, laps in by_phase(one, batches[number % BATCHES :], 1, training.device).items():
                    phases.setdefault(phase, []).extend(laps)
        memory = peak_memory(step, batches[0], training)
    except torch.OutOfMemoryError:
        training.optimizer.zero_grad(set_to_none=True)
        return {"failed": "exceeds the GPU memory"}
    times = {phase: statistics.median(laps) for phase, laps in phases.items()}
    seconds = times["anchors"] * total / few + times["optimizer"] if name == "naive" else times["all"]
    found = {"seconds": seconds, "fast": times["fast"], "ratio": seconds / times["fast"], "memory": memory}
    return found | ({"measured": few, "anchors": total} if name == "naive" and few < total else {})


def measure_growth(args: argparse.Namespace) -> Figures:
    """Measure step times over anchors or row lengths. Shapes are interleaved, so that drift affects all of them."""
    torch._dynamo.config.recompile_limit = 64  # each shape is compiled separately
    swept = shapes(args)
    training, before = new_training(args, swept[0]), rate_now(args)
    batches = [new_batches(args, shape) for shape in swept]
    for value, own in zip(args.values, batches, strict=True):
        say(f"{value}: {WARM_UP} warm-up steps")
        warm_up(training, own)
    graphs = compiled_graphs()
    times: list[list[float]] = [[] for _ in swept]
    for number in range(args.steps):
        say(f"step {number + 1} of {args.steps}")
        for found, own in zip(times, batches, strict=True):
            found += whole_steps(training.fast, own[number % BATCHES :], 1, training.device)
    points = []
    for value, shape, own, found in zip(args.values, swept, batches, times, strict=True):
        flops = sum(floor_flops(draft_of(args, shape), own, objective_of(args)).values())
        points.append({"value": value, "flops": flops, "seconds": statistics.median(found), "times": found})
    figures = {"points": points, "recompilations": compiled_graphs() - graphs, "matmul": rates(args, before)}
    figures["sweep"] = args.sweep
    compare_growth(figures)
    return figures


def measure_vocabulary(args: argparse.Namespace) -> Figures:
    """Measure peak memory over vocabulary sizes."""
    points = []
    for shape in shapes(args):
        training, batches = new_training(args, shape), new_batches(args, shape)
        warm_up(training, batches)
        say("memory of a step")
        points.append({"value": shape.vocabulary, **memory_of(args, shape, training, batches[0])})
        del training
        gc.collect()  # free memory before the next target is created
    for point in points:
        point["limit"] = 1.3 * points[0]["peak"] + point["head and embedding"] + point["chunk"]
    within = all(point["peak"] <= point["limit"] for point in points[1:])
    return {"sweep": args.sweep, "points": points, "mask_tokens": shapes(args)[0].masks, "within": within}


def main() -> None:
    args = arguments(__doc__)
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: Figures = {"arguments": vars(args) | {"out": str(args.out)}, "machine": machine(torch.device(args.device))}
    print_facts("Machine", figures["machine"])
    batch = vars(shapes(args)[0]) | ({SIZES[args.sweep]: "swept"} if args.sweep else {})
    keys = ("draft_layers", "chunk", "dtype", "attention", "compile", "recompute", "objective")
    settings = {key: getattr(args, key) for key in keys}
    print_facts(f"Preset {args.preset}", {"batch": listed(batch), "settings": listed(settings)})
    measure, show, draw = {
        None: (measure_step, print_step, draw_phases),
        "vocabulary": (measure_vocabulary, print_vocabulary, draw_vocabulary),
    }.get(args.sweep, (measure_growth, print_growth, draw_growth))
    try:
        figures |= measure(args)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{Path(__file__).name}: {str(error).splitlines()[0]}")
    show(figures)
    name = f"{args.preset}_{args.device}_{args.sweep or 'step'}"
    print("\nWritten:", *save(args.out, name, figures, draw))


if __name__ == "__main__":
    main()
