"""Reports for `bench_train_step.py`: plain-text tables, fits over a sweep, JSON, PNG. Units: seconds, bytes, FLOPs."""

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

Figures = dict[str, Any]
PARTS = {
    "target pass": "target pass",
    "mask pass": "mask pass",
    "loss": "head and loss",
}  # measured phase -> part of the floor
SWEPT = {"anchors": "anchors", "rows": "row length", "vocabulary": "vocabulary"}
TOLERANCE = 1.1  # maximum ratio of a measured slope to the floor's slope


def machine(device: torch.device) -> dict[str, str]:
    """Describe device, thread count and library versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return {"device": f"{device.type}: {name}", "threads": str(torch.get_num_threads()), "versions": versions}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(known, platform.processor() or platform.machine())


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with minimal column widths, the first column left-aligned and the others right-aligned."""
    lines = [header, *rows] if any(header) else rows
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{title}")
    for line in lines:
        first, *others = (
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  " + "  ".join([first, *others]).rstrip())
    print(end="", flush=True)


def print_facts(title: str, facts: dict[str, str]) -> None:
    """Print name-value pairs, one per line."""
    width = max(map(len, facts))
    print(f"\n{title}", *(f"  {name.ljust(width)}  {fact}" for name, fact in facts.items()), sep="\n", flush=True)


def listed(values: Figures) -> str:
    """Format names and values on one line."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:,}" if type(value) is int else f"{name.replace('_', ' ')} {value}"
        for name, value in values.items()
    )


def ms(seconds: float) -> str:
    """Format seconds as milliseconds with at least three significant digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def mb(size: float) -> str:
    """Format bytes as megabytes."""
    return f"{size / 1e6:,.1f} MB"


def flops(value: float) -> str:
    """Format FLOPs with a unit prefix; for rates, the caller appends "/s"."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= unit:
            return f"{value / unit:,.2f} {prefix}FLOP"
    return f"{value / 1e6:,.2f} MFLOP"


def spread(times: Sequence[float]) -> str:
    """Format the range of times."""
    return f"{ms(min(times))} to {ms(max(times))}"


def print_step(figures: Figures) -> None:
    """Print all measurements of one shape."""
    step, rate = figures["step"], figures["matmul"]["used"]
    print_matmul(figures["matmul"])
    print_table(
        "FLOPs of the step that cannot be done without (models.cost.flops), and their time at the matmul rate",
        ("part", "FLOPs", "floor, ms"),
        [(part, flops(value), ms(value / rate)) for part, value in figures["flops"].items()],
    )
    facts = {"time": f"{ms(step['seconds'])} ms (median of {len(step['times'])}; {spread(step['times'])})"}
    facts |= {"floor": f"{ms(step['floor'])} ms", "time / floor": f"{step['ratio']:.2f}"}
    facts |= {"fraction of peak": f"{1 / step['ratio']:.1%}", "mean loss": f"{figures['loss']:.4f}"}
    facts |= {f"{kind} tokens/s": f"{value:,.0f}" for kind, value in figures["tokens_per_second"].items()}
    facts |= {"recompilations": f"{figures['recompilations']} after the warm-up (expected: 0)"}
    if "waits" in figures:
        facts |= {"host waits for GPU": figures["waits"] or "never (torch.cuda.set_sync_debug_mode)"}
    print_facts("Whole steps; batches are on the device beforehand", facts)
    rows = []
    for name, phase in figures["phases"].items():
        ratio = (f"{phase['ratio']:.2f}", f"{1 / phase['ratio']:.1%}") if phase["floor"] else ("", "")
        floor = ms(phase["floor"]) if phase["floor"] else ""
        rows.append((name, ms(phase["seconds"]), spread(phase["times"]), f"{phase['share']:.1%}", floor, *ratio))
    header = ("phase", "ms", "range", "of the sum", "floor, ms", "time / floor", "of peak")
    print_table("Phases, each finished before the next begins; loss with its gradient down to the slots", header, rows)
    memory = figures["memory"]
    print_facts(
        "Peak memory of tensors in a step",
        {
            "peak": mb(memory["peak"]),
            "of which weights, optimizer": mb(memory["held"]),
            "of which head weights": mb(memory["head"]),
            "one chunk of logits": f"{mb(memory['chunk'])} (slots x V x 4 bytes)",
        },
    )
    if figures["baselines"]:
        print_baselines(figures)


def print_matmul(matmul: Figures) -> None:
    """Print the rate of large matrix products before and after the steps."""
    title = f"Matmul rate: {matmul['dtype']}, {matmul['size']:,} x {matmul['size']:,}, random data, best of several"
    facts = {name: f"{flops(matmul[name])}/s" for name in ("before", "after")}
    print_facts(title, facts | {"used": f"{flops(matmul['used'])}/s, the higher one"})


def print_baselines(figures: Figures) -> None:
    """Print the baselines next to the fast step."""
    fast = figures["step"]["seconds"]
    rows = [("fast", ms(fast), "", "", mb(figures["memory"]["peak"]), "")]
    for name, found in figures["baselines"].items():
        if "failed" in found:
            rows.append((name, "", "", "", "", found["failed"]))
            continue
        remark = f"SCALED from {found['measured']} of {found['anchors']} anchors" if "measured" in found else ""
        rows.append(
            (name, ms(found["seconds"]), ms(found["fast"]), f"{found['ratio']:.2f}", mb(found["memory"]), remark)
        )
    print_table("Baselines of the same step", ("", "ms", "fast step, ms", "x fast", "peak memory", ""), rows)


def least_squares(x: Sequence[float], y: Sequence[float], degree: int) -> list[float]:
    """Fit y = a + b x + ... by least squares and return [a, b, ...]."""
    scale = max(x)  # avoids ill-conditioning from large powers of x
    powers = torch.tensor([[(value / scale) ** k for k in range(degree + 1)] for value in x], dtype=torch.float64)
    solution = torch.linalg.lstsq(powers, torch.tensor(y, dtype=torch.float64)[:, None], driver="gelsd").solution
    return [float(value) / scale**k for k, value in enumerate(solution[:, 0])]


def slopes(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Return the log-log slope between consecutive points."""
    return [math.log(y[i + 1] / y[i]) / math.log(x[i + 1] / x[i]) for i in range(len(x) - 1)]


def compare_growth(figures: Figures) -> None:
    """Add floors, fits and slopes to a sweep's points, and whether time grows no faster than its floor."""
    points, rate = figures["points"], figures["matmul"]["used"]
    for point in points:
        point["floor"] = point["flops"] / rate
        point["ratio"] = point["seconds"] / point["floor"]
    x = [point["value"] for point in points]
    degree = min(2 if figures["sweep"] == "rows" else 1, len(x) - 1)
    for kind in ("seconds", "floor"):
        y = [point[kind] for point in points]
        figures |= {f"fit_{kind}": least_squares(x, y, degree), f"slopes_{kind}": slopes(x, y)}
    pairs = zip(figures["slopes_seconds"], figures["slopes_floor"], strict=True)
    figures["within"] = all(measured <= TOLERANCE * floor for measured, floor in pairs)


def print_growth(figures: Figures) -> None:
    """Print a sweep over anchors or row lengths."""
    print_matmul(figures["matmul"])
    rows = []
    for i, point in enumerate(figures["points"]):
        steps = [f"{figures[f'slopes_{kind}'][i - 1]:.3f}" if i else "" for kind in ("seconds", "floor")]
        values = (ms(point["seconds"]), spread(point["times"]), flops(point["flops"]), ms(point["floor"]))
        rows.append((f"{point['value']:,}", *values, f"{point['ratio']:.2f}", *steps))
    swept = SWEPT[figures["sweep"]]
    header = (swept, "ms", "range", "FLOPs", "floor, ms", "time / floor", "slope", "floor's slope")
    print_table(f"Sweep over {swept}; slopes are log-log, from the line above", header, rows)
    facts = {name: _formula(figures[f"fit_{kind}"]) for name, kind in (("time", "seconds"), ("floor", "floor"))}
    facts["recompilations"] = f"{figures['recompilations']} after the warm-up (expected: 0)"
    print_facts(f"Least squares in ms, x = {swept}", facts)
    verdict = "no measured slope exceeds" if figures["within"] else "a measured slope exceeds"
    print(f"\nConclusion: {verdict} the floor's by more than {TOLERANCE - 1:.0%}.", flush=True)


def _formula(coefficients: Sequence[float]) -> str:
    return " + ".join(f"{value * 1e3:.4g}{('', ' x', ' x^2')[k]}" for k, value in enumerate(coefficients)).replace(
        "+ -", "- "
    )


def print_vocabulary(figures: Figures) -> None:
    """Print peak memory by vocabulary size, and whether it grows only by head, embedding and one chunk of logits."""
    points, small = figures["points"], figures["points"][0]
    rows = [
        (f"{point['value']:,}", *(mb(point[key]) for key in ("peak", "head", "chunk")), mb(point["limit"]))
        for point in points
    ]
    rows[0] = (*rows[0][:-1], "")
    header = ("vocabulary", "peak", "head and embedding", "one chunk of logits", "limit")
    print_table(f"Peak memory of tensors in a step of {figures['mask_tokens']:,} mask tokens", header, rows)
    limit = f"1.3 x {mb(small['peak'])} + weights of head and embedding + one chunk of logits"
    print(f"\nConclusion: every peak within {limit}: {'yes' if figures['within'] else 'no'}.", flush=True)


def save(folder: Path, name: str, figures: Figures, draw: Callable[[Any, Figures], None]) -> list[Path]:
    """Write JSON and, if matplotlib is installed, PNG. Each file is written atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json"]
    _replace(files[0], lambda temporary: temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: matplotlib is not installed.")
        return files
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure.subplots(), figures)
    files.append(folder / f"{name}.png")
    _replace(files[1], lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return files


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(file)


def draw_phases(axes: Any, figures: Figures) -> None:
    """Draw bars of time by phase next to the floor."""
    phases = figures["phases"]
    for offset, key, label in ((-0.2, "seconds", "measured"), (0.2, "floor", "floor")):
        axes.bar([i + offset for i in range(len(phases))], [1e3 * p[key] for p in phases.values()], 0.4, label=label)
    axes.set_xticks(range(len(phases)), list(phases))
    axes.set_ylabel("ms")
    axes.set_title(
        f"Training step, preset {figures['arguments']['preset']}, on {figures['machine']['device']}", fontsize="medium"
    )
    axes.legend()


def draw_growth(axes: Any, figures: Figures) -> None:
    """Draw measured time and floor over a sweep."""
    x = [point["value"] for point in figures["points"]]
    for key, label in (("seconds", "measured"), ("floor", "floor")):
        axes.loglog(x, [1e3 * point[key] for point in figures["points"]], marker="o", label=label)
    axes.set_xticks(x, [f"{value:,}" for value in x])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter("{x:,g}")
    axes.set_xlabel(SWEPT[figures["sweep"]])
    axes.set_ylabel("ms")
    axes.set_title(
        f"Training step, preset {figures['arguments']['preset']}, on {figures['machine']['device']}", fontsize="medium"
    )
    axes.legend()


def draw_vocabulary(axes: Any, figures: Figures) -> None:
    """Draw bars of peak memory next to its limit."""
    points = figures["points"]
    for offset, key, label in ((-0.2, "peak", "peak"), (0.2, "limit", "limit")):
        axes.bar([i + offset for i in range(len(points))], [point[key] / 1e6 for point in points], 0.4, label=label)
    axes.set_xticks(range(len(points)), [f"{point['value']:,}" for point in points])
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("MB")
    axes.set_title("Peak memory of tensors in a training step", fontsize="medium")
    axes.legend()
