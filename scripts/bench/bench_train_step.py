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
from dataclasses import replace
from pathlib import Path

import torch
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
    Preset,
    Shape,
    floor_flops,
    free_memory,
    least_memory,
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
from models.attention.packed import KINDS
from models.draft import DraftModel
from models.loss.objectives import Objective

BATCHES = 3  # cycled through, so that nothing can be reused between steps
OBJECTIVES = {"ce": {}, "kl": {"ce": 0.0, "kl": 1.0}, "tv": {"ce": 0.0, "tv": 1.0}, "mixture": {"ce": 0.1, "tv": 0.9}}
SWEEPS = {"anchors": [8, 16, 32, 64, 128], "rows": [256, 512, 1024, 2048, 4096], "vocabulary": [8192, 151936]}
SIZES = {"anchors": "anchors", "rows": "max_seq_len", "vocabulary": "vocabulary"}  # swept field of Shape
BASELINES = {"none": (), "dense": ("dense",), "naive": ("dense", "naive")}
SWEPT_MASKS = 2048  # mask tokens in the sweep over vocabularies, unless --anchors is given
SWEPT_ANCHORS = 64  # maximum anchors in the sweep over row lengths, so that they fit short rows


class OneLineErrors(argparse.ArgumentParser):
    """Argument parser that reports errors without the usage text."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return int(text)


def several(text: str) -> list[int]:
    """Parse two or more comma-separated positive integers and return them sorted."""
    values = sorted({positive(value.strip()) for value in text.split(",")})
    if len(values) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two values or more")
    return values


def arguments() -> argparse.Namespace:
    """Parse and check the command line. Shapes default to the preset's."""
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="shape of target and batches")
    for name in ("max-seq-len", "anchors", "documents", "vocabulary", "draft-layers"):
        add(f"--{name}", type=positive, help="default: the preset's")
    add("--rows", type=positive, default=1, help="rows per batch")
    add("--chunk", type=positive, default=2048, help="slots whose logits are held at once")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the target; default: bfloat16 on GPUs, otherwise float32",
    )
    add("--attention", choices=KINDS, default="auto")
    add("--compile", action="store_true", help="torch.compile of layers and loss")
    add("--recompute", action="store_true", help="activation checkpointing of the draft layers")
    add("--objective", choices=OBJECTIVES, default="ce")
    add("--threads", type=positive, help="CPU threads of PyTorch")
    add("--steps", type=positive, default=5, help=f"timed steps, after {WARM_UP} warm-up steps")
    add("--seed", type=int, default=0)
    add("--baseline", choices=("none", "dense", "naive"), default="none", help="naive: both baselines")
    add("--naive-anchors", type=positive, default=4, help="anchors measured in the naive baseline")
    add("--sweep", choices=SWEEPS, help="sweep over sizes instead of a single shape; rows: the row length")
    add("--values", type=several, help="comma-separated values of the sweep")
    add("--matmul-size", type=positive, help="matrix size for the peak rate; default: depends on the device")
    add("--out", type=Path, default=Path("outputs/bench_train_step"), help="output directory for JSON and PNG")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if problem := _contradiction(args, preset):
        parser.error(problem)
    if args.sweep:
        args.values = args.values or SWEEPS[args.sweep]
    if args.sweep == "vocabulary":
        args.anchors = args.anchors or SWEPT_MASKS // preset.block_size
    if args.sweep == "rows":
        args.anchors = args.anchors or min(preset.anchors, SWEPT_ANCHORS)
    for name in ("max_seq_len", "anchors", "documents", "vocabulary", "draft_layers"):
        setattr(args, name, getattr(args, name) or getattr(preset, name))
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.matmul_size = args.matmul_size or (8192 if args.device == "cuda" else 2048)
    problems = filter(None, (shape.misfit() for shape in shapes(args)))
    if problem := next(problems, None) or _too_large(args):
        parser.error(problem)
    return args


def _contradiction(args: argparse.Namespace, preset: Preset) -> str | None:
    """Describe an invalid combination of arguments, independent of the shape; None if they are valid."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda, but PyTorch sees no GPU"
    if args.device == "cpu" and args.attention == "flex":
        return "--attention flex has no gradient on CPUs; use sdpa or auto"
    if args.values and not args.sweep:
        return "--values belongs to --sweep"
    if args.sweep and args.baseline != "none":
        return "--baseline is measured at a single shape, without --sweep"
    if args.draft_layers and args.draft_layers > preset.layers:
        return f"--draft-layers {args.draft_layers}, but the target has {preset.layers}"
    if args.out.exists() and not args.out.is_dir():
        return f"--out {args.out}: expected a directory"
    return None


def shapes(args: argparse.Namespace) -> list[Shape]:
    """Return the shapes to measure."""
    size = PRESETS[args.preset].block_size
    shape = Shape(args.rows, args.max_seq_len, args.documents, args.anchors, size, args.vocabulary)
    return [replace(shape, **{SIZES[args.sweep]: value}) for value in args.values] if args.sweep else [shape]


def _too_large(args: argparse.Namespace) -> str | None:
    """Explain why the largest shape's minimum memory is not available; None if it is. Avoids an out-of-memory kill."""
    free, options = free_memory(args.device), {"word": word(args), "chunk": args.chunk, "recompute": args.recompute}
    found = [least_memory(draft_of(args, shape), shape, **options) for shape in shapes(args)]
    parts = max(found, key=lambda parts: sum(parts.values()))
    if free is None or sum(parts.values()) <= free:
        return None
    listed = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    need = sum(parts.values()) / 2**30
    return f"{args.preset} in {args.dtype} needs at least {need:.1f} GiB ({listed}); free: {free / 2**30:.1f} GiB"


def draft_of(args: argparse.Namespace, shape: Shape) -> DraftModel:
    """Return drafter and target without data."""
    return PRESETS[args.preset].draft(shape.vocabulary, args.draft_layers)


def word(args: argparse.Namespace) -> int:
    """Return the bytes per element of the target."""
    return getattr(torch, args.dtype).itemsize


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
    args = arguments()
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
