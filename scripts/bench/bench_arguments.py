"""Command line of `bench_train_step.py`: options, their checks, and the shapes and the drafter that they select."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from bench_shapes import PRESETS, Preset, Shape, free_memory, least_memory
from bench_steps import WARM_UP

from models.attention.packed import KINDS
from models.draft import DraftModel

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


def arguments(description: str | None) -> argparse.Namespace:
    """Parse and check the command line. Shapes default to the preset's."""
    parser = OneLineErrors(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
