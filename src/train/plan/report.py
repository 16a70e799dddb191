"""`plan=true`: cost of a run, estimated from its settings without downloading, loading or training anything."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from data.config.compose import preset
from data.errors import UserError
from data.terminal import terminal
from models.cost.hardware import GIB, GPUS
from models.cost.memory import FLOAT32, PARTS
from train.names import TRAINED
from train.plan.estimate import LIBRARIES, Estimate, Machine, disk_parts, estimate, machine_of, peak_memory
from train.plan.target import local_config

GB = 10**9


def plan(config: DictConfig) -> None:
    """Print the estimated cost of the chosen training stages.

    Raises:
        UserError: the target's sizes are unknown, the global batch does not divide evenly, or a stage does not fit in
            memory. In the last case, the message lists changes that would make it fit.
    """
    chosen = [stage for stage in TRAINED if stage in config.stages]
    if not chosen:
        raise UserError(f"plan=true is about the training stages; choose one or more of {', '.join(TRAINED)}.")
    target, machine = local_config(config), machine_of(config)
    estimates = [estimate(config, stage, target, machine) for stage in chosen]
    print_plan(terminal(), config, target, machine, estimates)
    refusals = [refusal(config, target, machine, e) for e in estimates if not e.memory.fits]
    if refusals:
        raise UserError("\n".join(refusals))


def print_plan(
    console: Console, config: DictConfig, target: PretrainedConfig, machine: Machine, estimates: list[Estimate]
) -> None:
    """Print the memory, FLOPs and time of each stage, and the run's host memory and disk usage."""
    tables = _memory(machine, estimates), _arithmetic(config, machine, estimates)
    for table in (*tables, _elsewhere(config, target, machine, estimates)):
        console.print(table)
    hours = sum(e.seconds * e.steps for e in estimates) / 3600
    console.print(f"all steps: {_figure(hours)} hours; validation and evaluation are not counted")


def _table(title: str, first: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, min_width=24)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _memory(machine: Machine, estimates: list[Estimate]) -> Table:
    title = f"Memory of one rank at its peak, GiB, on {machine.name}"
    table = _table(title, "part", [e.stage for e in estimates])
    for part in PARTS:
        table.add_row(part, *(_figure(e.memory.parts[part] / GIB) for e in estimates))
    table.add_section()
    table.add_row("peak", *(_figure(e.memory.bytes / GIB) for e in estimates))
    table.add_row("in the phase", *(e.memory.phase for e in estimates))
    table.add_row("available", *(_figure(e.memory.limit / GIB) for e in estimates))
    table.add_row("rows per micro-batch, micro-batches", *(f"{e.rows}, {e.micro_batches}" for e in estimates))
    return table


def _arithmetic(config: DictConfig, machine: Machine, estimates: list[Estimate]) -> Table:
    share = config.hardware.mfu
    title = f"TFLOP of a step on one rank; time at {share:.0%} of {machine.flops / 1e12:,.3g} TFLOP/s"
    table = _table(title, "part", [e.stage for e in estimates])
    for part in estimates[0].flops:
        table.add_row(part, *(_figure(e.flops[part] / 1e12) for e in estimates))
    table.add_section()
    table.add_row("step", *(_figure(sum(e.flops.values()) / 1e12) for e in estimates))
    table.add_row("seconds per step", *(_figure(e.seconds) for e in estimates))
    table.add_row("steps", *(f"{e.steps:,}" for e in estimates))
    table.add_row("hours", *(_figure(e.seconds * e.steps / 3600) for e in estimates))
    return table


def _elsewhere(config: DictConfig, target: PretrainedConfig, machine: Machine, estimates: list[Estimate]) -> Table:
    """Tabulate disk usage and, for GPU runs, host memory."""
    settings, weights = config.model.target, estimates[-1].weights
    download = 0 if settings.name is None or Path(settings.name).exists() else 2 * weights.target
    rows = {"disk: download of the target, in bfloat16": download}
    parts = disk_parts(config, target, [*(e.stage for e in estimates), "export"])
    rows |= {f"disk: {name}": count for name, count in parts.items()}
    if machine.gpu:
        # Each rank loads the full target to host memory before moving it to the GPU, even under ZeRO 3.
        rank = weights.target * getattr(torch, settings.dtype).itemsize + FLOAT32 * weights.drafter + LIBRARIES
        rows["host memory of a rank, while it loads"] = rank
        rows[f"host memory of a node, {machine.per_node} ranks"] = machine.per_node * rank
    table = _table("Disk, without the data, and host memory, GB", "part", ["GB"])
    for name, size in rows.items():
        table.add_row(name, _figure(size / GB))
    return table


def _figure(value: float) -> str:
    """Format a number with one decimal, or with two significant digits below 1."""
    return "0" if not value else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def refusal(config: DictConfig, target: PretrainedConfig, machine: Machine, estimated: Estimate) -> str:
    """Return a message that explains why a stage does not fit in memory and lists changes that would make it fit."""
    stage, memory = estimated.stage, estimated.memory
    text = (
        f"{stage} takes {memory.bytes / GIB:.1f} GiB on each rank, but {memory.limit / GIB:.1f} GiB of "
        f"{machine.memory / GIB:.1f} are available ({machine.name})."
    )
    ways = []
    for kind in ways_out(config, stage, machine):
        ways += first_that_fits(config, stage, target, kind)
    if not ways:
        for kind in lesser_training(config, stage):
            ways += first_that_fits(config, stage, target, kind)
    if machine.gpu:
        larger = sorted(GPUS, key=lambda name: GPUS[name].memory)
        ways += first_that_fits(config, stage, target, [{"hardware.gpu": name} for name in larger])
    if not ways:
        return f"{text} None of the changes tried makes it fit; choose a smaller target."
    return f"{text} It would fit with any of these:\n" + "\n".join(ways)


def first_that_fits(
    config: DictConfig, stage: str, target: PretrainedConfig, changes: list[dict[str, Any]]
) -> list[str]:
    """Find the first change that makes the stage fit in memory.

    The last change saves the most memory, so the others are not tried if it does not suffice.

    Returns:
        One line with the change and the new estimate; an empty list if no change suffices.
    """
    if not changes or _fitting(config, stage, target, changes[-1]) is None:
        return []
    return [next(filter(None, (_fitting(config, stage, target, change) for change in changes)))]


def _fitting(config: DictConfig, stage: str, target: PretrainedConfig, change: dict[str, Any]) -> str | None:
    """Describe a change and its new estimate. Return None if the stage still does not fit or cannot be estimated."""
    changed = apply(config, change)
    machine = machine_of(changed)
    try:
        memory = peak_memory(changed, stage, target, machine)
    except UserError:
        return None
    words = " ".join(f"{key}={_as_written(value)}" for key, value in change.items())
    return f"  {words}   ({memory.bytes / GIB:.1f} GiB, {machine.name})" if memory.fits else None


def _as_written(value: Any) -> str:
    """Format a value for the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def apply(config: DictConfig, change: dict[str, Any]) -> DictConfig:
    """Return a copy of the configuration with changed values; `trainer` names a preset, as on the command line."""
    changed = config.copy()
    OmegaConf.set_struct(changed, False)
    for key, value in change.items():
        if key == "trainer":
            changed.trainer = preset("trainer", value)
        else:
            OmegaConf.update(changed, key, value)
    return changed


def ways_out(config: DictConfig, stage: str, machine: Machine) -> Iterator[list[dict[str, Any]]]:
    """Yield groups of changes that do not affect the training result, starting with the least invasive."""
    settings, here = config.stage[stage], f"stage.{stage}"
    share = max(1, settings.global_batch_size // machine.ranks)
    rows = settings.micro_batch_size or share
    passes = [{f"{here}.micro_batch_size": n} for n in range(rows - 1, 0, -1) if share % n == 0]
    chunks = [{f"{here}.module.chunk": n} for n in _halves(settings.module.chunk, 256)]
    prompts = [{f"{here}.decode.batch_size": n} for n in _halves(settings.decode.batch_size, 1)]
    least = {f"{here}.micro_batch_size": 1}
    smaller = [*passes, *chunks, *prompts, *(least | chunk for chunk in chunks)]
    smaller += [least | chunk | prompts[-1] for chunk in chunks if prompts]
    yield smaller
    if _trains_layers(config, stage) and not config.runtime.activation_checkpointing:
        yield [{"runtime.activation_checkpointing": True} | change for change in ({}, *smaller)]
    if not machine.gpu:
        return
    # These presets use every GPU of a node, so each rank gets fewer rows.
    presets = [{"trainer": "zero2"}, *([] if config.adapter else [{"trainer": "zero3"}])]
    yield [*presets, *(preset | least for preset in presets)]


def _trains_layers(config: DictConfig, stage: str) -> bool:
    """Return whether a stage stores activations of the draft layers, which checkpointing could recompute."""
    return stage == "attention_tuning" or config.stage[stage].module.joint


def lesser_training(config: DictConfig, stage: str) -> Iterator[list[dict[str, Any]]]:
    """Yield groups of changes that reduce training quality: lower precision, fewer blocks, shorter rows."""
    settings, here = config.stage[stage], f"stage.{stage}"
    least = {f"{here}.micro_batch_size": 1, f"{here}.module.chunk": min(256, settings.module.chunk)}
    least[f"{here}.decode.batch_size"] = 1
    if _trains_layers(config, stage):
        least["runtime.activation_checkpointing"] = True
    if config.model.target.dtype != "bfloat16":
        yield [least | {"model.target.dtype": "bfloat16"}]
    yield [least | {f"{here}.num_anchors": n} for n in _halves(settings.num_anchors, 8)]
    yield [least | {"data.max_seq_len": n} for n in _halves(config.data.max_seq_len, 256)]


def _halves(value: int, least: int) -> list[int]:
    """Return the results of repeatedly halving `value`, as long as they are at least `least`."""
    found = []
    while (value := value // 2) >= least:
        found.append(value)
    return found
