"""What is kept is finite: a step whose loss or gradient is not is skipped, and weights that are not go nowhere."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

# Clipping, here and in DeepSpeed, squares the norm in float32.
LARGEST_NORM = torch.finfo(torch.float32).max ** 0.5
SUMS = 4  # figures of a rank's share of a step before its gradient norms
COUNTED = ("val/loss", "val/tau_estimate", "val/tau")  # an interval's ends may be NaN: one prompt has none


@dataclass(frozen=True)
class StepFigures:
    """What all ranks know of a step before its optimizer step."""

    loss: float  # mean over the global batch, nats per weighted slot
    weight: float  # sum over the global batch: the divisor of the gradients
    gradient_norm: float  # of that mean's gradient, before clipping
    fault: str  # says what is not finite, and on which rank; empty if the step can be made
    blocks: float = 0.0  # of the global batch, those where the assistant's text has tokens to predict
    labelled: float = 0.0  # of these, those that teach something


def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """[parameters] Euclidean norm of each gradient; 0 where there is none."""
    gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in parameters]
    return torch.stack(torch._foreach_norm(gradients))


def judged(rows: list[list[float]], names: list[str], *, in_pieces: bool) -> StepFigures:
    """The step's figures from those of every rank.

    Args:
        rows: by rank: sum of losses, sum of weights, blocks, labelled blocks, and the norm of each parameter's
            gradient, before division.
        names: of the parameters.
        in_pieces: whether each rank holds pieces of the gradients (ZeRO), or all of them, summed over the ranks.
    """
    loss, weight, blocks, labelled = (sum(row[i] for row in rows) for i in range(SUMS))
    weight = max(weight, 1e-6)
    norm = math.hypot(*(value for row in (rows if in_pieces else rows[:1]) for value in row[SUMS:]))
    return StepFigures(loss / weight, weight, norm / weight, _fault(rows, names, norm), blocks, labelled)


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
    return "" if norm < LARGEST_NORM else f"the square of the gradient's norm, {norm:.1e}, is not finite"


def _on(ranks: list[int], world: int) -> str:
    if world == 1:
        return ""
    return f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def shortened(names: list[str]) -> str:
    """The first of a list of names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinity or a NaN. Waits for the device once."""
    if not tensors:
        return []
    finite = torch.stack([tensor.isfinite().all().cpu() for tensor in tensors.values()])
    return [name for name, good in zip(tensors, finite.tolist(), strict=True) if not good]


def read_finite(path: Path) -> dict[str, Tensor]:
    """The weights that a stage has left, by exported name.

    Raises:
        UserError: one of them is not finite, or the file is damaged.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, it does not read as safetensors ({error}).") from error
    check_finite_weights(tensors, path)
    return tensors


def check_finite_weights(tensors: dict[str, Tensor], source: Path) -> None:
    """
    Raises:
        UserError: a weight is not finite, in what a stage starts from.
    """
    if names := not_finite(tensors):
        raise UserError(
            f"{source}: {shortened(names)} not finite, so nothing can start from it. It was changed since it was "
            f"written, or an older version kept such weights. Run the stage {source.parent.name} again under another "
            "name=..., with a lower learning rate if training diverged."
        )


def check_state(trainer: lightning.Trainer, tensors: dict[str, Tensor], directory: Path, what: str) -> None:
    """Nothing that is not finite is saved. Called on every rank, with the same tensors.

    Raises:
        Diverged: on every rank, if any rank holds a value that is not finite.
    """
    names = not_finite(tensors)
    if not trainer.strategy.reduce_boolean_decision(bool(names), all=False):
        return
    named = f" ({shortened(names)})" if names else ""
    raise Diverged(f"Step {trainer.global_step}: the {what} are not finite{named}. {way_out(directory)}")


def way_out(directory: Path) -> str:
    """What to do once training has diverged."""
    last = next(iter(checkpoints_in(directory)), None)
    stage = directory.parent.name
    again = f"The last good checkpoint is {last}: the same command goes on from it. If" if last else "If"
    return (
        f"{again} it ends here again, choose a lower stage.{stage}.module.learning_rate or stage.{stage}.gradient_clip "
        "under another name=..., or look for a broken device where always the same rank is named."
    )


class SkippedSteps(Callback):
    """Counts, names and logs the steps that were skipped, and ends a stage that skips too many in a row.

    A skipped step changes neither weights nor the optimizer's state. It counts as a step: data and learning rate go on
    as if it had been made, under every strategy alike.
    """

    def __init__(self, directory: Path, most: int) -> None:
        """
        Args:
            directory: of the checkpoints.
            most: so many skipped steps in a row end the stage.
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
        """
        Raises:
            Diverged: too many in a row, or all steps of the stage.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        fault = pl_module.step.fault
        if not fault:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.total}, step=step)
        say(f"    step {step}: skipped, {fault} ({self.in_a_row} in a row, the stage ends at {self.most})")
        if self.in_a_row >= self.most or (step == trainer.max_steps and self.total == step):
            raise Diverged(
                f"Step {step}: {self.in_a_row} steps in a row were skipped, because {fault}. {way_out(self.directory)}"
            )


def skipped_steps(trainer: lightning.Trainer) -> int:
    """How many steps of the stage were skipped."""
    return next(callback.total for callback in trainer.callbacks if isinstance(callback, SkippedSteps))
