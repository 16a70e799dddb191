"""Loss curves of a training run across all restarts."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_losses(stage_dirs: dict[str, Path], path: Path) -> None:
    """Plot the training and validation loss of each trained stage across all restarts."""
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
        finish(figure, axes)
    finish(figure, all_axes[0][0], path)


def finish(figure, axes, path: Path | None = None) -> None:
    """Add a grid and a legend to the axes. If a path is given, save and close the figure."""
    axes.grid(alpha=0.3)
    axes.legend()
    if path:
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def read_metrics(stage_dir: Path) -> dict[int, dict[str, float]]:
    """Read a stage's CSV logs. Values logged after a restart override earlier ones.

    Returns:
        Metrics of each step: step -> metric name -> value.
    """
    rows: dict[int, dict[str, float]] = {}
    files = sorted((stage_dir / "logs").glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1]))
    for file in files:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if None in row or None in row.values() or not row["step"]:
                    continue  # row truncated when the run was killed
                values = {key: float(value) for key, value in row.items() if value and key not in ("step", "epoch")}
                rows.setdefault(int(row["step"]), {}).update(values)
    return rows
