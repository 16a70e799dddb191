"""Training faults as callbacks: a non-finite value on one rank, a diverged run, a loop stopped from outside."""

import math
from collections.abc import Collection

import torch
from lightning.pytorch.callbacks import Callback

OVERFLOW = 1e25  # finite; its square in float32 is not


class BadLoss(Callback):
    """Multiply the loss of a micro-batch on one rank by `value` in the given steps, counted from 0.

    Infinity is added instead, so that the gradient stays finite.
    """

    def __init__(self, steps: Collection[int], value: float = math.nan, rank: int = 0, number: int = 0) -> None:
        self.steps, self.value, self.rank, self.number = set(steps), value, rank, number

    def on_train_start(self, trainer, pl_module):
        whole = pl_module.loss

        def broken(batch):
            loss, *others = whole(batch)
            here = trainer.training and trainer.global_step in self.steps and trainer.global_rank == self.rank
            if here and pl_module._micro_batch == self.number:
                loss = loss + self.value if math.isinf(self.value) else loss * self.value
            return (loss, *others)

        pl_module.loss = broken


class InfiniteLoss(BadLoss):
    """A class, because no setting may be infinite."""

    def __init__(self, steps: Collection[int], rank: int = 0) -> None:
        super().__init__(steps, math.inf, rank)


class BadGradient(Callback):
    """Set one value of one parameter's gradient after the backward pass of a step."""

    def __init__(self, steps: Collection[int], value: float = math.nan) -> None:
        self.steps, self.value = set(steps), value

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            list(pl_module.trained().values())[-1].grad.view(-1)[0] = self.value


class BadWeight(Callback):
    """Set one value of one parameter at the end of a step."""

    def __init__(self, step: int, value: float = math.nan) -> None:
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(iter(pl_module.trained().values())).view(-1)[0] = self.value


class BadValidation(Callback):
    """Replace the validation loss at some steps; the other metrics stay plausible."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = set(steps)

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            pl_module._validation[0] = math.nan
            pl_module._validation[2] *= 100


class StopAt(Callback):
    """Ask Lightning to stop in micro-batch `number` of a step, like a user's early-stopping callback."""

    def __init__(self, step: int, number: int = 0) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and pl_module._micro_batch == self.number:
            trainer.should_stop = True
