"""Sweeps: `python -m train -m ...` runs one job per combination of settings and prints a table of all jobs."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from itertools import product
from math import nan
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from data.config.compose import composed
from data.config.validate import check_settings
from data.errors import UserError
from train.endings.agreed import NotFinished
from train.run_dir.state import read_json, write_json
from train.settings.derived import accelerator, device_count

SUMMARY = "summary.json"  # in each job's directory: its overrides, state and results
TRAINED = ("attention_tuning", "bonus_calibration")
DECODED = ("attention_tuned", "calibrated_parallel", "calibrated")


def jobs(overrides: list[str]) -> list[list[str]]:
    """Expand a sweep into one list of overrides per job.

    Returns:
        The overrides of all jobs; empty if the sweeper chooses values during the sweep, as for `interval(...)`.

    Raises:
        UserError: the overrides cannot be parsed.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(str(error).strip()) from error
    choices = []
    for given, override in zip(overrides, parsed, strict=True):
        if not override.is_sweep_override():
            choices.append([given])
        elif override.is_discrete_sweep():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            return []
    return [list(job) for job in product(*choices)]


def check_jobs(overrides: list[str]) -> None:
    """Check all jobs of a sweep before the first one starts.

    Raises:
        UserError: a job's settings are invalid, or two jobs would write to the same run directory.
    """
    taken: dict[str, list[str]] = {}
    for job in jobs(overrides):
        config = composed(job)
        check_settings(config, job)
        if other := taken.get(config.run_dir):
            swept = [new.split("=")[0].lstrip("+") for old, new in zip(other, job, strict=True) if old != new]
            name = "_".join(f"${{{key}}}" for key in swept)
            hint = (
                f"Add the swept settings to the name: 'name={name}'." if swept else "They are the same job; remove one."
            )
            raise UserError(f"Two jobs in this sweep use the same run directory, {config.run_dir}. {hint}")
        taken[config.run_dir] = job


def run_job(config: DictConfig, work: Callable[[DictConfig], None]) -> float:
    """Run one job of a sweep. A failure is recorded in the job's directory and does not affect the other jobs.

    Returns:
        τ of the last-stage drafter that was evaluated, used as the objective by optimizing Hydra sweepers; NaN if the
            job failed or evaluated no drafter.
    """
    hydra = HydraConfig.get()
    file = Path(hydra.runtime.output_dir) / SUMMARY
    summary = {"overrides": list(hydra.overrides.task), "run_dir": config.run_dir, "results": {}}
    _record(file, {**summary, "state": "stopped", "reason": "did not finish"})
    try:
        _check_ranks(config)
        work(config)
    except Exception as error:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        state = "stopped" if isinstance(error, NotFinished) else "failed"
        _record(file, {**summary, "state": state, "reason": lines[0]})
        return nan
    records = {stage: Path(config.run_dir, "records", f"{stage}.done.json") for stage in config.stages}
    summary["results"] = {stage: read_json(done)["result"] for stage, done in records.items() if done.exists()}
    _record(file, {**summary, "state": "done", "reason": ""})
    decoded = _decoded(summary["results"])
    return next((decoded[name]["tau"] for name in reversed(DECODED) if name in decoded), nan)


def _decoded(results: dict[str, Any]) -> dict[str, Any]:
    """Return the decoding results of the drafters for which τ was measured."""
    return {name: found for name, found in results.get("evaluate", {}).items() if found["tau"] is not None}


def _check_ranks(config: DictConfig) -> None:
    """Check that a job would not launch additional ranks: Lightning launches them by rerunning the entire sweep.

    Raises:
        UserError: the job is configured to use several devices and was not started by a launcher such as SLURM.
    """
    started = {"SLURM_PROCID", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if not started and device_count(config, 1 if accelerator(config) == "cpu" else 2) > 1:
        raise UserError(
            f"trainer.devices={config.trainer.get('devices')}: a single-process sweep trains on one device. "
            "Set trainer.devices=1 or hydra/launcher=submitit_slurm, or run one command per job."
        )


def _record(file: Path, summary: dict[str, Any]) -> None:
    if _first_rank():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, summary)


def _first_rank() -> bool:
    # Environment variables are used because Lightning cannot be imported during interpreter shutdown.
    return all(os.environ.get(variable, "0") == "0" for variable in ("SLURM_PROCID", "RANK"))


class SweepTable(Callback):
    """Hydra callback that prints the table of all jobs in the process that launched them (see conf/config.yaml)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Not in `on_multirun_end`: Hydra skips it if a job was killed, which is when the table is needed most.
        atexit.register(_show, Path(config.hydra.sweep.dir).absolute())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        jobs = summaries(Path(config.hydra.sweep.dir)).values()
        if _first_rank() and any(job["state"] != "done" for job in jobs):  # other ranks may get here before rank 0
            sys.exit(1)


def summaries(sweep_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the summaries of all started jobs, keyed by job number."""
    files = sorted(sweep_dir.glob(f"*/{SUMMARY}"), key=lambda file: (len(file.parent.name), file.parent.name))
    return {file.parent.name: read_json(file) for file in files}


def _show(sweep_dir: Path) -> None:
    if not _first_rank():
        return
    text = table(summaries(sweep_dir))
    print(f"\n{text}", flush=True)
    if sweep_dir.is_dir():
        (sweep_dir / "table.md").write_text(text, encoding="utf-8")
        print(f"table: {sweep_dir / 'table.md'}", flush=True)


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Format all jobs as a Markdown table aligned for the terminal, followed by the reasons why jobs did not finish."""
    swept = _swept([job["overrides"] for job in summaries.values()])
    decoded = [name for name in DECODED if any(name in _decoded(job["results"]) for job in summaries.values())]
    header = ["job", *_short(swept), "state", *(f"τ {name} (95%, verify steps)" for name in decoded)]
    header += ["tuning: val loss, τ", "calibration: val loss, τ", "MFLOP per block", "run directory"]
    rows = [header]
    for number, job in summaries.items():
        values = dict(override.split("=", 1) for override in job["overrides"] if "=" in override)
        row = [number, *(values.get(key, "") for key in swept), job["state"]]
        rows.append([*row, *_figures(job["results"], decoded), job["run_dir"]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    reasons = [f"job {number} {job['state']}: {job['reason']}" for number, job in summaries.items() if job["reason"]]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])]) + "\n"


def _figures(results: dict[str, Any], names: list[str]) -> list[str]:
    decoded = _decoded(results)
    cells = [_tau(decoded[name]) if name in decoded else "" for name in names]
    for stage in TRAINED:
        values = [results.get(stage, {}).get(f"val/{figure}") for figure in ("loss", "tau_estimate")]
        cells.append(", ".join(f"{value:.3f}" for value in values if value is not None))
    flops = results.get("export", {}).get("block_flops")
    return [*cells, f"{flops / 1e6:.1f}" if flops else ""]


def _tau(found: dict[str, Any]) -> str:
    interval = "" if found["low"] is None else f"{found['low']:.2f}-{found['high']:.2f}, "  # none for a single prompt
    return f"{found['tau']:.3f} ({interval}{found['verify_steps']:,})"


def _swept(overrides: list[list[str]]) -> list[str]:
    """Return the keys whose values differ between jobs."""
    common = set(overrides[0]).intersection(*overrides[1:]) if overrides else set()
    return list(dict.fromkeys(o.split("=", 1)[0] for job in overrides for o in job if o not in common))


def _short(keys: list[str]) -> list[str]:
    """Shorten each key to its last part if that part is unique."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]
