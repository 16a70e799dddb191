"""What a person looks at in the end: a table, and two pictures."""

import csv
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from train.evaluation import EvaluationReport

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"untuned": "#9aa5b1", "attention_tuned": "#2878b5", "calibrated": "#c8443c"}


def print_report(report: EvaluationReport, run_dir: Path) -> None:
    """The evaluation as a table in the terminal."""
    table = Table(
        title=f"{report.prompts} held-out prompts, greedy, {report.dtype}, up to {report.max_new_tokens} new tokens"
    )
    for column, justify in (
        ("decoder", "left"),
        ("τ", "right"),
        ("verify steps", "right"),
        ("tokens/s", "right"),
        ("speed-up", "right"),
    ):
        table.add_column(column, justify=justify)
    base = report.target_tokens_per_second
    table.add_row("target alone", "1.00", "", f"{base:.0f}", "1.00x")
    for name, variant in report.variants.items():
        speed = variant.tokens_per_second
        table.add_row(name, f"{variant.tau:.2f}", f"{variant.verify_steps:,}", f"{speed:.0f}", f"{speed / base:.2f}x")
    console = Console()
    console.print(table)
    identical = min(variant.identical for variant in report.variants.values())
    console.print(f"lossless: {identical}/{report.prompts} prompts identical", highlight=False)
    console.print(f"drafter: {run_dir / 'export'}   figures and plots: {run_dir / 'evaluate'}", highlight=False)


def plot_acceptance(report: EvaluationReport, path: Path) -> None:
    """Share of verify steps that accepted each slot, for every variant."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, variant in report.variants.items():
        slots = range(1, len(variant.acceptance_by_slot) + 1)
        label = f"{name.replace('_', ' ')}, τ = {variant.tau:.2f}"
        axes.plot(slots, variant.acceptance_by_slot, marker="o", label=label, color=COLOURS.get(name))
    axes.set(xlabel="slot of the block", ylabel="share of verify steps that accepted it", ylim=(0, 1))
    axes.set_title(f"Acceptance by slot, {report.prompts} held-out prompts")
    _finish(figure, axes, path)


def plot_losses(stage_dirs: dict[str, Path], path: Path) -> None:
    """Training and validation loss of the trained stages, over all restarts."""
    curves = {name: read_metrics(directory) for name, directory in stage_dirs.items()}
    curves = {name: rows for name, rows in curves.items() if rows}
    if not curves:
        return
    figure, all_axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False)
    for axes, (name, rows) in zip(all_axes[0], curves.items(), strict=True):
        for key, style in (("train/loss", "-"), ("val/loss", "o--")):
            points = sorted((step, row[key]) for step, row in rows.items() if key in row)
            axes.plot(*zip(*points, strict=True), style, label=key) if points else None
        axes.set(xlabel="step", ylabel="loss (nats per drafted token, weighted)", title=name.replace("_", " "))
        _finish(figure, axes)
    _finish(figure, all_axes[0][0], path)


def _finish(figure, axes, path: Path | None = None) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
    if path:
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def read_metrics(stage_dir: Path) -> dict[int, dict[str, float]]:
    """step -> figures from the CSV logs of a stage; what a restart logged again replaces what was there."""
    rows: dict[int, dict[str, float]] = {}
    files = sorted((stage_dir / "logs").glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1]))
    for file in files:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if None in row or None in row.values() or not row["step"]:
                    continue  # cut short when the run was killed
                values = {key: float(value) for key, value in row.items() if value and key not in ("step", "epoch")}
                rows.setdefault(int(row["step"]), {}).update(values)
    return rows
