"""Non-finite values: steps with a non-finite loss or gradient are skipped; non-finite weights are never saved."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.errors import UserError
from train.endings.agreed import Diverged
from train.run_dir.checkpoint_names import checkpoints_in
from train.terminal import say

# Gradient clipping squares the norm in float32, both in PyTorch and in DeepSpeed.
LARGEST_NORM = torch.finfo(torch.float32).max ** 0.5
SUMS = 4  # number of sums that precede the gradient norms in a rank's row
COUNTED = ("val/loss", "val/tau_estimate", "val/tau")  # not the interval bounds: they are NaN for a single prompt


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of a training step, known to all ranks before the optimizer step."""

    loss: float  # mean over the global batch, in nats per unit of slot weight
    weight: float  # total slot weight of the global batch, by which the gradients are divided
    gradient_norm: float  # norm of the gradient of the mean loss, before clipping
    fault: str  # names the non-finite value and its rank; empty if all values are finite
    blocks: float = 0.0  # blocks in the global batch with assistant tokens to predict
    labelled: float = 0.0  # how many of those blocks have a label in this stage


def latest_step(module: lightning.LightningModule | None) -> StepMetrics:
    """Return a `DraftTraining` module's metrics for its latest step."""
    return cast(StepMetrics, module.step)  # type: ignore[union-attr]  # callbacks get Lightning's base class


def callbacks_of(trainer: lightning.Trainer) -> list[Callback]:
    """Return the trainer's callbacks."""
    return trainer.callbacks  # type: ignore[attr-defined]  # Lightning's types omit the attribute


def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of each parameter's gradient, [parameters]; 0 for parameters without a gradient."""
    gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in parameters]
    return torch.stack(torch._foreach_norm(gradients))


def step_metrics(rows: list[list[float]], names: list[str], *, sharded: bool) -> StepMetrics:
    """Combine the values from all ranks into the metrics of a step.

    Args:
        rows: one row per rank: loss sum, weight sum, blocks, labeled blocks, and the norm of each parameter's
            gradient before division by the weight.
        names: parameter names.
        sharded: whether each rank holds a shard of the gradients (ZeRO) instead of full gradients summed over ranks.
    """
    loss, weight, blocks, labelled = (sum(row[i] for row in rows) for i in range(SUMS))
    weight = max(weight, 1e-6)
    norm = math.hypot(*(value for row in (rows if sharded else rows[:1]) for value in row[SUMS:]))
    return StepMetrics(loss / weight, weight, norm / weight, _fault(rows, names, norm), blocks, labelled)


def _fault(rows: list[list[float]], names: list[str], norm: float) -> str:
    losses = [rank for rank, row in enumerate(rows) if not all(map(math.isfinite, row[:2]))]
    if losses:
        return f"the loss{_on(losses, len(rows))} is not finite"
    bad = {rank: [name for name, value in zip(names, row[SUMS:], strict=True) if not math.isfinite(value)]
           for rank, row in enumerate(rows)}  # fmt: skip
    ranks = [rank for rank, found in bad.items() if found]
    if ranks:
        found = [name for name in names if any(name in bad[rank] for rank in ranks)]
        return f"the gradient of {shortened(found)}{_on(ranks, len(rows))} is not finite"
    return "" if norm < LARGEST_NORM else f"the square of the gradient norm, {norm:.1e}, is not finite"


def _on(ranks: list[int], world: int) -> str:
    if world == 1:
        return ""
    return f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def shortened(names: list[str]) -> str:
    """Shorten a list of names to the first name and the number of others."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that contain inf or NaN."""
    if not tensors:
        return []
    finite = torch.stack([tensor.isfinite().all().cpu() for tensor in tensors.values()])
    return [name for name, good in zip(tensors, finite.tolist(), strict=True) if not good]


def read_finite(path: Path) -> dict[str, Tensor]:
    """Load a stage's output weights, keyed by exported name, and check that they are finite.

    Raises:
        UserError: a weight is not finite, or the file is damaged.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: not a valid safetensors file ({error}).") from error
    if names := not_finite(tensors):
        raise UserError(
            f"{path}: non-finite values in {shortened(names)}. Either the file was modified, or it was saved by an "
            f"older version of this code after training diverged. Rerun stage {path.parent.name} with a different "
            "`name`; if training diverged, lower the learning rate."
        )
    return tensors


def check_state(trainer: lightning.Trainer, tensors: dict[str, Tensor], directory: Path, what: str) -> None:
    """Check that the tensors to be saved are finite. Must be called on every rank, with the same tensors.

    Raises:
        Diverged: a tensor on any rank is not finite; raised on every rank.
    """
    names = not_finite(tensors)
    if not trainer.strategy.reduce_boolean_decision(bool(names), all=False):
        return
    named = f" ({shortened(names)})" if names else ""
    raise Diverged(f"Step {trainer.global_step}: the {what} are not finite{named}. {advice(directory)}")


def advice(directory: Path) -> str:
    """Return advice for a diverged training run: resume, lower the learning rate or check the hardware."""
    last = next(iter(checkpoints_in(directory)), None)
    stage = directory.parent.name
    resume = f"Rerun the command to resume from the last good checkpoint, {last}. " if last else ""
    return (
        f"{resume}If the error recurs, decrease stage.{stage}.module.learning_rate or stage.{stage}.gradient_clip "
        "under a new name=...; if it always names the same rank, check that rank's device."
    )


class SkippedSteps(Callback):
    """Counts, reports and logs skipped steps, and stops a stage that skips too many in a row.

    A skipped step changes neither weights nor optimizer state, but it counts as a step: data and learning rate advance
    as usual, under every strategy.
    """

    def __init__(self, directory: Path, most: int) -> None:
        """
        Args:
            directory: checkpoint directory.
            most: number of consecutive skipped steps after which the stage is stopped.
        """
        self.directory, self.most = directory, most
        self.total = self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record whether the step was skipped.

        Raises:
            Diverged: too many consecutive steps, or all steps of the stage, were skipped.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        fault = latest_step(pl_module).fault
        if not fault:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.total}, step=step)
        say(f"    step {step}: skipped because {fault} ({self.in_a_row} in a row; the stage stops at {self.most})")
        if self.in_a_row >= self.most or (step == trainer.max_steps and self.total == step):
            raise Diverged(
                f"Step {step}: {self.in_a_row} steps in a row were skipped because {fault}. {advice(self.directory)}"
            )


def skipped_steps(trainer: lightning.Trainer) -> int:
    """Return the number of steps that the stage has skipped."""
    return next(callback.total for callback in callbacks_of(trainer) if isinstance(callback, SkippedSteps))
